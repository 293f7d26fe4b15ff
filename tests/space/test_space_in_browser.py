"""Pages that the genuine gradio serves, in a real browser: what is typed, answered and shown."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from running import classifier, language_model, running, save_pair, summariser
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_prune.cli.commands import app

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio: make test-space"),
    # Of what gradio and the browser's client leave open when they end.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

TEXT = "w5 w6 w7"
WAIT = 60_000  # milliseconds

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 900}

EXPLANATION = """<!doctype html><html lang="en"><head><title>Explained</title></head><body>
<h1>3 "answers" flipped &amp; more</h1><a href="#worst">Worst</a>
<p style="height: 3000px"></p><h2 id="worst">Worst slices</h2>
</body></html>"""


def write_page(folder, *options):
    """The page of the folder's pair, as the command writes it."""
    arguments = ["space", folder / "pruned", folder / "page", "--dense", folder / "dense", *options]
    app([str(one) for one in arguments], standalone_mode=False)
    return folder / "page"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of each task's page, and the folder of its models; a page is started when it is first asked for."""
    addresses, contexts = {}, []

    def start(task):
        if task not in addresses:
            folder = tmp_path_factory.mktemp(task)
            save_pair(folder, {"classes": classifier, "texts": language_model, "summaries": summariser}[task])
            if task == "classes":
                (folder / "pruned" / "explain").mkdir()
                (folder / "pruned" / "explain" / "index.html").write_text(EXPLANATION)
            contexts.append(running(write_page(folder), folder))
            addresses[task] = contexts[-1].__enter__(), folder
        return addresses[task]

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture
def visit(browser):
    """Opens an address; afterwards, the console has no error, nothing came from elsewhere, nothing is too wide."""
    opened = []

    def open_page(address, viewport=WIDE, color_scheme="light"):
        page = browser.new_page(viewport=viewport, color_scheme=color_scheme)
        page.set_default_timeout(WAIT)
        page.complaints = []
        page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: _note_foreign(page, request.url, address))
        opened.append(page)
        page.goto(address)
        return page

    yield open_page
    for page in opened:
        assert page.complaints == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        page.close()


def _note_foreign(page, url, address):
    if not url.startswith((address, "data:", "blob:", "about:")):
        page.complaints.append(f"asked for {url}")


def ask(page, text=TEXT):
    """What the page says of both answers."""
    page.locator("#text textarea").fill(text)
    page.get_by_role("button", name="Answer with both models").click()
    said = page.locator("#said")
    said.filter(has_text="median of").or_(said.filter(has_text="one run")).wait_for()
    return said.inner_text()


def picture(page, name):
    """A picture to look at, in the folder of PAGE_PICTURES, if that is set."""
    if "PAGE_PICTURES" in os.environ:
        page.screenshot(path=Path(os.environ["PAGE_PICTURES"], f"{name}.png"))


@pytest.mark.parametrize(("viewport", "scheme"), [(WIDE, "light"), (NARROW, "light"), (WIDE, "dark")])
def test_probabilities_are_those_of_transformers(served, visit, viewport, scheme):
    address, folder = served("classes")
    page = visit(address, viewport, scheme)
    said = ask(page)
    best = []
    for name in ("pruned", "dense"):
        model = AutoModelForSequenceClassification.from_pretrained(folder / name)
        inputs = AutoTokenizer.from_pretrained(folder / name)(TEXT, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            values = model(**inputs).logits[0].softmax(-1)
        shown = page.locator(f"#{name}").inner_text().split()
        best.append(shown[shown.index(name.capitalize()) + 1])
        assert best[-1] == model.config.id2label[int(values.argmax())]
        for index, label in model.config.id2label.items():
            percent = shown[len(shown) - 1 - shown[::-1].index(label) + 1]
            assert abs(float(percent.removesuffix("%")) - 100 * float(values[index])) <= 0.51
    assert said.startswith("Both models agree." if best[0] == best[1] else "The models disagree.")
    assert "ms" in said
    picture(page, f"classes-{viewport['width']}-{scheme}")


def test_an_explanation_is_a_frame_of_its_own(served, visit):
    page = visit(served("classes")[0])
    page.get_by_role("tab", name="What pruning changed").click()
    frame = page.frame_locator("iframe[title='What pruning changed']")
    assert frame.get_by_role("heading", level=1).inner_text() == '3 "answers" flipped & more'
    picture(page, "explanation")
    frame.get_by_role("link", name="Worst").click()  # and not the page around it, once more in the frame
    page.wait_for_function("document.querySelector('iframe') !== null")
    [inside] = [one for one in page.frames if one.parent_frame is not None]
    inside.wait_for_function("window.scrollY > 1000")


def test_an_example_fills_the_text_and_no_text_is_a_message(served, visit):
    address, folder = served("classes")
    page = visit(address)
    page.get_by_role("button", name="Answer with both models").click()
    page.get_by_text("Enter a text.").wait_for()
    [first, *_] = json.loads((folder / "page" / "space.json").read_text())["examples"]
    page.get_by_text(first).first.click()
    page.wait_for_function("text => document.querySelector('#text textarea').value === text", arg=first)


@pytest.mark.parametrize("task", ["texts", "summaries"])
def test_texts_are_those_of_transformers(served, visit, task):
    address, folder = served(task)
    page = visit(address, NARROW if task == "summaries" else WIDE)
    said = ask(page)
    written = []
    for name in ("pruned", "dense"):
        auto_class = AutoModelForCausalLM if task == "texts" else AutoModelForSeq2SeqLM
        model, tokenizer = auto_class.from_pretrained(folder / name), AutoTokenizer.from_pretrained(folder / name)
        inputs = tokenizer(TEXT, return_tensors="pt", return_token_type_ids=False)
        # A page lets a language model write half of what it can read, here 32 tokens, at most.
        limit = 16 if task == "texts" else 40
        ids = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0]
        new = ids[inputs["input_ids"].shape[1] :] if task == "texts" else ids[1:]
        written.append(tokenizer.decode(new, skip_special_tokens=True))
        assert page.locator(f"#{name} textarea").input_value() == written[-1]
        assert f"({len(new)} tokens)" in said
    assert said.startswith("Both models wrote the same." if written[0] == written[1] else "The texts differ.")
    assert page.get_by_role("tab").count() == 0
    picture(page, task)
