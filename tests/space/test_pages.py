"""What a page's files say, and what the page computes, without gradio and without a Hub."""

import json
import re
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from huggingface_hub import HfApi
from models import bert
from running import classifier, language_model, save_pair, summariser
from test_commands import invoke, printed, refused
from test_project import pinned
from text_models import save_text_model

import hf_prune
from hf_prune.errors import CardError, SpaceError
from hf_prune.publish.push_plan import NOTHING_THERE, Remote, RemoteFile
from hf_prune.publish.record import RunRecord, save_record
from hf_prune.saved.model import SavedModel
from hf_prune.space import app
from hf_prune.space.app import Opened, Timed, classify, in_turns, open_models, read_settings, said_of_classes, write
from hf_prune.space.files import GRADIO_VERSION, make_page
from hf_prune.space.push import MADE_NAME, page_plan
from hf_prune.space.settings import Dense, find_dense, make_settings, task_for

TEXT = "w5 w6 w7"
ALONE = Dense(None, None, "Alone.")

pytestmark = pytest.mark.usefixtures("eighty_columns")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder, classifier)
    return folder


def page_of(folder, dense=ALONE, examples=(), name="somebody/small"):
    saved = SavedModel(folder)
    return make_page(saved, make_settings(saved, name, dense, examples))


def metadata_of(files):
    return yaml.safe_load(files["README.md"].decode().split("---")[1])


# ---- Files ----


def test_a_page_names_models_on_the_hub_and_no_path(pair):
    files = page_of(pair / "pruned", Dense("somebody/dense", "abc", "The dense model is the teacher."))
    assert set(files) == {"README.md", "app.py", "requirements.txt", "space.json"}
    settings = json.loads(files["space.json"])
    assert (settings["pruned"], settings["dense"], settings["dense_revision"]) == (
        "somebody/small",
        "somebody/dense",
        "abc",
    )
    assert len(settings["examples"]) == 3
    assert settings["imports"] == []
    assert not any(str(pair).encode() in content for content in files.values())
    said = metadata_of(files)
    assert said["models"] == ["somebody/small", "somebody/dense"]
    assert (said["sdk"], said["sdk_version"], said["app_file"]) == ("gradio", GRADIO_VERSION, "app.py")
    assert said["python_version"] == "3.11"
    assert files["requirements.txt"].decode().splitlines() == [
        f"torch=={version('torch').split('+')[0]}",
        f"transformers=={version('transformers')}",
    ]


def test_the_page_that_is_sent_is_the_one_that_is_tested(pair):
    with open(app.__file__, "rb") as file:
        assert page_of(pair / "pruned")["app.py"] == file.read()
    assert pinned("constraints.txt")["gradio"] == GRADIO_VERSION


def test_a_packed_model_has_the_package_that_opens_it(pair, tmp_path):
    hf_prune.save_packed(pair / "pruned", tmp_path / "packed")
    files = page_of(tmp_path / "packed")
    assert json.loads(files["space.json"])["imports"] == ["hf_prune"]
    assert f"hf-prune=={hf_prune.__version__}\n" in files["requirements.txt"].decode()


def test_examples_of_the_user_replace_the_others_and_are_searched_for_secrets(pair):
    assert json.loads(page_of(pair / "pruned", examples=["One."])["space.json"])["examples"] == ["One."]
    with pytest.raises(CardError, match=r"space\.json: contains what looks like a Hub token"):
        page_of(pair / "pruned", examples=["hf_" + "aB3" * 11])


def test_an_explanation_comes_along_unless_it_lies_elsewhere(tmp_path):
    save_text_model(tmp_path / "model", classifier)
    (tmp_path / "model" / "explain").mkdir()
    page = tmp_path / "model" / "explain" / "index.html"
    page.write_text("<h1>Explained</h1>")
    assert page_of(tmp_path / "model")["explain/index.html"] == page
    page.rename(tmp_path / "elsewhere.html")
    page.symlink_to(tmp_path / "elsewhere.html")
    with pytest.raises(SpaceError, match="got a link to outside"):
        page_of(tmp_path / "model")


# ---- Which models ----


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: transformers.BertForMaskedLM(bert().config), r"got fill-mask \(BertForMaskedLM\)"),
        (summariser, r"text2text-generation \(T5.*\)\. If it writes summaries, say so .* pipeline_tag: summarization"),
        (lambda: bert(problem_type="multi_label_classification"), "one label of several, got several labels"),
        (lambda: bert(num_labels=1), "one label of several, got a number"),
    ],
)
def test_other_tasks_are_refused_by_name(tmp_path, build, message):
    save_text_model(tmp_path / "model", build)
    [line] = refused("space", tmp_path / "model", tmp_path / "page")
    assert re.search(message, line)
    assert not (tmp_path / "page").exists()
    assert "text-classification, text-generation, summarization" in line or "several" in message


def test_a_card_says_that_a_model_writes_summaries(tmp_path):
    save_pair(tmp_path, summariser)
    assert task_for(SavedModel(tmp_path / "pruned")) == "summarization"


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    bert().save_pretrained(tmp_path / "model")
    with pytest.raises(SpaceError, match="expected a tokenizer beside the model"):
        task_for(SavedModel(tmp_path / "model"))


def test_a_dense_model_must_answer_the_same_question(pair, tmp_path):
    save_text_model(tmp_path / "three", lambda: bert(num_labels=3))
    save_text_model(tmp_path / "writer", language_model)
    bert().save_pretrained(tmp_path / "mute")
    for name, message in (
        ("three", "has 3 labels, and the pruned model 2"),
        ("writer", "is a model for text-generation, and the pruned one for text-classification"),
        ("mute", "has no tokenizer"),
    ):
        [line] = refused("space", pair / "pruned", tmp_path / "page", "--dense", tmp_path / name)
        assert "--dense: " in line
        assert message in line
    assert not (tmp_path / "page").exists()


def test_a_space_cannot_read_folders(pair):
    with pytest.raises(
        SpaceError, match=r"--dense: expected the name of a model on the Hub, got the folder .* Push it"
    ):
        find_dense(SavedModel(pair / "pruned"), str(pair / "dense"), HfApi())


def test_without_a_dense_model_the_page_says_so(pair):
    found = find_dense(SavedModel(pair / "pruned"), None, HfApi())
    assert found.name is None
    files = page_of(pair / "pruned", found)
    assert "shown alone" in json.loads(files["space.json"])["dense_is"]
    assert metadata_of(files)["models"] == ["somebody/small"]


def save_run(folder):
    """A folder as that of a recipe's run, with `model` and `dense`, and the record beside the pruned model."""
    save_pair(folder, classifier)
    (folder / "pruned").rename(folder / "model")
    save_record(folder / "model", RunRecord(name=folder.name, recipe={"task": "text-classification", "dense": {}}))


def test_a_page_of_a_run_has_its_name_its_dense_model_and_no_path_where_it_is_read(tmp_path):
    save_run(tmp_path / "reviews")
    printed("space", tmp_path / "reviews/model", tmp_path / "page")
    settings = read_settings(tmp_path / "page")
    assert (settings.title, settings.pruned_name) == ("reviews and its dense model", "reviews")
    assert (settings.dense, settings.dense_name) == (str(tmp_path / "reviews/dense"), "dense")
    assert settings.dense_is == "The dense model is the one that the same run trained."
    introduction = app.introduction(settings, open_models(settings))
    card = (tmp_path / "page/README.md").read_text()
    assert "The pruned model `reviews` and the dense model `dense`: " in card
    assert "- Pruned: `reviews`, " in introduction
    assert "- Dense: `dense`, " in introduction
    assert str(tmp_path) not in card + introduction


def test_without_a_record_a_page_has_the_name_of_the_folder_of_the_run(tmp_path):
    save_run(tmp_path / "reviews")
    (tmp_path / "reviews/model/run_record.json").unlink()
    settings = make_settings(SavedModel(tmp_path / "reviews/model"), str(tmp_path / "reviews/model"), ALONE, [])
    assert (settings.title, settings.dense_name) == ("reviews", None)


def test_for_the_hub_the_dense_model_of_the_run_must_be_pushed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "reviews")
    output = invoke("space", "reviews/model", "page", "--model", "somebody/small").stdout
    assert "is not on the Hub (hf-prune push reviews/dense USER/DENSE sends it there). Name one with --dense" in output
    assert not any(str(tmp_path) in path.read_text() for path in Path("page").iterdir())


def test_a_dense_model_of_the_run_that_does_not_fit_is_left_out(tmp_path):
    save_run(tmp_path / "reviews")
    (tmp_path / "reviews/dense/tokenizer.json").unlink()
    (tmp_path / "reviews/dense/tokenizer_config.json").unlink()
    found = find_dense(SavedModel(tmp_path / "reviews/model"), None, HfApi(), is_local=True)
    assert (found.name, found.why_not) == (None, ("the dense model of its run has no tokenizer",))


def test_the_command_writes_a_page_once(pair, tmp_path):
    output = printed("space", pair / "pruned", tmp_path / "page", "--dense", pair / "dense", "--example", "One.")
    assert "paths of this machine" in output
    settings = read_settings(tmp_path / "page")
    assert (settings.pruned, settings.dense) == (str(pair / "pruned"), str(pair / "dense"))
    assert "models" not in yaml.safe_load((tmp_path / "page" / "README.md").read_text().split("---")[1])
    [line] = refused("space", pair / "pruned", tmp_path / "page")
    assert "expected a new or empty folder" in line
    [line] = refused("push", pair / "pruned", "somebody/small", "--dense", "somebody/dense")
    assert "--dense: must not be set without --space" in line


# ---- What a Space keeps ----


def test_what_somebody_changed_in_a_space_stays(pair):
    files = page_of(pair / "pruned")
    made = json.loads(page_plan(files, "somebody/page", NOTHING_THERE, {}).files[MADE_NAME])["files"]
    there = {name: RemoteFile(1, digest, False) for name, digest in made.items()}
    there["README.md"] = RemoteFile(1, "another", False)
    plan = page_plan(files, "somebody/page", Remote("head", there, True, None, False), made)
    assert "README.md" not in plan.files
    assert list(plan.left_out) == ["README.md"]
    assert json.loads(plan.files[MADE_NAME])["files"] == made


def test_an_explanation_that_is_gone_is_removed(pair):
    made = {"explain/index.html": "digest"}
    there = Remote("head", {"explain/index.html": RemoteFile(1, "digest", False)}, True, None, False)
    assert page_plan(page_of(pair / "pruned"), "somebody/page", there, made).removed == ["explain/index.html"]
    assert page_plan(page_of(pair / "pruned"), "somebody/page", there, {}).removed == []


# ---- What the page computes ----


@pytest.fixture(scope="module")
def opened(pair):
    settings = make_settings(
        SavedModel(pair / "pruned"), str(pair / "pruned"), Dense(str(pair / "dense"), None, ""), []
    )
    return open_models(settings)


def test_probabilities_are_those_of_the_model(opened, pair):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(pair / "pruned")
    tokenizer = transformers.AutoTokenizer.from_pretrained(pair / "pruned")
    with torch.no_grad():
        values = model(tokenizer(TEXT, return_tensors="pt")["input_ids"]).logits[0].softmax(-1)
    expected = dict(zip(("negative", "positive"), values.tolist(), strict=True))
    assert classify(opened[0], TEXT) == pytest.approx(expected)


def test_a_long_text_is_cut_to_what_the_model_can_read(opened):
    assert opened[0].limit == 32
    assert classify(opened[0], "w5 " * 500) == classify(opened[0], "w5 " * 31)


def test_a_tokenizer_without_a_limit_has_that_of_the_positions(opened):
    tokenizer = transformers.AutoTokenizer.from_pretrained(opened[0].tokenizer.name_or_path, model_max_length=10**30)
    assert Opened("Pruned", opened[0].model, tokenizer).limit == 30


def test_a_language_model_writes_at_most_half_of_what_it_can_read(tmp_path):
    save_text_model(tmp_path / "model", language_model)
    [one] = open_models(make_settings(SavedModel(tmp_path / "model"), str(tmp_path / "model"), ALONE, []))
    written = write(one, "w5 " * 500, 200)
    assert written.tokens == len(written.text.split()) == 16
    assert write(one, TEXT, 3).tokens == 3


def test_models_are_timed_in_turns_the_order_reversed_every_other_round():
    order = []
    timed = in_turns([lambda: order.append("a"), lambda: order.append("b") or time.sleep(0.02)], seconds=0.1)
    assert "".join(order[:8]) == "abbaabba"
    assert 1 < len(timed.rounds) <= 6
    assert timed.seconds[1] >= 0.02
    assert len(in_turns([lambda: 1, lambda: 2], seconds=0).rounds) == 1


def test_speeds_are_compared_within_rounds(opened):
    answers = [{"negative": 0.6, "positive": 0.4}, {"negative": 0.3, "positive": 0.7}]
    said = said_of_classes(opened, Timed(answers, [[0.001, 0.002], [0.1, 0.2], [0.001, 0.002]]))
    assert "The models disagree." in said
    assert "pruned 1.0 ms, dense 2.0 ms (median of 3, measured in turns)" in said
    assert "2.0 times as fast" in said
    assert "about the same time" in said_of_classes(opened, Timed(answers[:1] * 2, [[1.0, 1.05]]))
