"""`hf-prune explain`: a saved model explained from the command line, and what is refused."""

import json
import re

import pytest
import torch
from explained import classifier, language_model
from models import bert, llama, t5
from test_commands import invoke, refused, words
from test_run import tree, write_csv
from text_models import save_text_model, texts

from hf_prune import Pruner, PruningConfig
from hf_prune.cli.print_explain import print_explanation
from hf_prune.publish.explanation import SAME_WEIGHTS, load_explanation
from hf_prune.publish.explanation_words import summary
from hf_prune.recipe.explain_data import written

pytestmark = pytest.mark.usefixtures("eighty_columns")

QUICK = ("--max-length", 16, "--resamples", 100, "--without-costs")


def save_pruned(folder, build):
    """A random model, dense and pruned, each with its tokenizer."""

    def scattered():
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn_like(parameter) / 2)
        return model

    def pruned():
        model = scattered()
        pruner = Pruner(model, PruningConfig(sparsity=0.7, begin=0, end=1, frequency=1), total_steps=2)
        pruner.step()
        return model

    save_text_model(folder / "dense", scattered)
    save_text_model(folder / "pruned", pruned)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Models and data sets; tests write only where they say."""
    folder = tmp_path_factory.mktemp("material")
    save_pruned(folder / "bert", bert)
    save_pruned(folder / "llama", llama)
    save_text_model(folder / "t5", t5)
    rows = [
        {"text": f"{text}{' not' if number % 3 == 0 else ''}", "label": number % 2, "kind": "ab"[number % 2]}
        for number, text in enumerate(texts(90))
    ]
    write_csv(folder / "texts.csv", rows)
    write_csv(folder / "three.csv", [row | {"label": number % 3} for number, row in enumerate(rows)])
    (folder / "empty.csv").write_text("text,label\n")
    (folder / "nothing.csv").touch()
    (folder / "splits").mkdir()
    for split in ("train", "validation"):
        write_csv(folder / f"splits/{split}.csv", rows)
    return folder


def explained(*arguments):
    """What the command prints; the path of a temporary folder may be long."""
    result = invoke("explain", *arguments, *QUICK)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_a_classifier_is_explained_beside_the_dense_model(material, tmp_path):
    pruned, dense = material / "bert/pruned", material / "bert/dense"
    before = tree(pruned)
    arguments = [pruned, "--dense", dense, "--data", material / "texts.csv", "--test-size", 50, "--slice", "kind"]
    said = words(explained(*arguments, "--expression", "ones=w1", "--show-texts", "--output", tmp_path))
    assert "pruned, beside bert/dense, on 50 samples" in said
    assert "Right to wrong" in said
    assert tree(pruned) == before
    found = load_explanation(tmp_path)
    assert {one.by for one in found.slices} >= {"kind", "negations", "ones", "rarity", "length", "label"}
    assert found.answers.flipped[0].text
    assert [one.training_samples for one in found.gaps] == [40, 40]
    assert str(tmp_path.parent) not in found.model_dump_json()
    assert found.command == (
        "hf-prune explain . --dense ../dense --data path/to/texts.csv --max-length 16 --test-size 50 --slice kind "
        "--expression ones=w1 --show-texts --without-costs --resamples 100"
    )
    told = (tmp_path / "explain/explanation.md").read_text()
    assert "Run it in the model's folder, the one that has config.json; put the real paths" in told


def test_paths_are_written_from_a_models_folder_where_they_name_no_folder_elsewhere(tmp_path, monkeypatch):
    model, home, far = tmp_path / "work/out/model", tmp_path / "work/data.csv", tmp_path / "far/data.csv"
    for path in (model / "config.json", tmp_path / "work/out/dense/config.json", home, far):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert written(str(model.parent / "dense"), model) == "../dense"
    assert written(str(home), model) == "../../data.csv"
    assert written(str(far), model) == "path/to/data.csv"
    assert written(str(home), home.parent / "out") == "../data.csv"
    assert written("user/name", model) == "user/name"
    assert written("package:name/data.csv", model) == "package:name/data.csv"
    monkeypatch.chdir(tmp_path)
    assert written("far/data.csv", model) == "../../../far/data.csv"
    monkeypatch.chdir(model)
    assert written("../../../far/data.csv", model) == "../../../far/data.csv"
    monkeypatch.chdir("/")
    assert written(str(far), model) == "path/to/data.csv"


def test_a_language_model_is_explained_and_printed_as_json(material, tmp_path):
    arguments = [material / "llama/pruned", "--dense", material / "llama/dense", "--data", material / "texts.csv"]
    found = json.loads(explained(*arguments, "--split", "train", "--slice", "kind", "--output", tmp_path, "--json"))
    assert {one["by"] for one in found["slices"]} >= {"kind", "position", "token frequency"}
    assert found["answers"]["flipped"] == []
    assert found == json.loads((tmp_path / "explain/explanation.json").read_text())


def test_what_is_counted_and_units_are_printed_by_name(capsys):
    print_explanation(language_model(), [])
    printed = capsys.readouterr().out
    assert "texts" in printed.splitlines()[0]
    assert "Metrics, with 95% intervals (loss in nats)" in printed
    assert re.search(r"^ +tokens +dense +pruned", printed, flags=re.MULTILINE)
    print_explanation(classifier(), [])
    assert re.search(r"^ +samples +dense +pruned", capsys.readouterr().out, flags=re.MULTILINE)


def test_texts_are_not_written_unless_they_may_be(material, tmp_path):
    arguments = [material / "bert/pruned", "--dense", material / "bert/dense", "--data", material / "texts.csv"]
    explained(*arguments, "--without-perturbations", "--output", tmp_path)  # on the only split
    found = load_explanation(tmp_path)
    assert "--split train" in found.command
    assert "--without-perturbations" in found.command
    assert found.perturbations == ()
    flipped = found.answers.flipped
    assert flipped
    assert {one.text for one in flipped} == {None}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("bert/pruned", ["--data", "texts.csv", "--split", "test"], "--split: expected one of train, got 'test'"),
        ("bert/pruned", ["--data", "splits"], "--split: expected one of train, validation, got none"),
        ("bert/pruned", ["--data", "texs.csv"], "--data: expected a file or folder, found nothing at"),
        ("bert/pruned", ["--data", "empty.csv"], "--data: empty.csv has no rows"),
        ("bert/pruned", ["--data", "nothing.csv"], "--data: nothing.csv has no rows"),
        ("bert/pruned", ["--data", "texts.csv", "--training-split", "train"], "--training-split: must differ from"),
        (
            "bert/pruned",
            ["--data", "texts.csv", "--training-data", "no.csv"],
            "--training-data: expected a file or folder",
        ),
        ("bert/pruned", ["--data", "texts.csv", "--where", "kind=c"], "--where: no row of the"),
        ("bert/pruned", ["--data", "texts.csv", "--text-column", "a"], "--text-column: expected one of text, label,"),
        ("bert/pruned", ["--data", "three.csv"], "expected the labels of the model (LABEL_0, LABEL_1), got 2"),
        ("bert/pruned", ["--data", "texts.csv", "--slice", "nope"], "--slice: expected one of text, label, kind"),
        (
            "bert/pruned",
            ["--data", "texts.csv", "--label-column", "text"],
            "--text-column: must differ from --label-column",
        ),
        ("bert/pruned", ["--data", "texts.csv", "--expression", "w1"], "--expression: expected NAME=REGEX, got 'w1'"),
        ("bert/pruned", ["--data", "texts.csv", "--expression", "a=("], "'(' is not a regular expression"),
        ("bert/pruned", ["--data", "texts.csv", "--dtype", "int8"], "--dtype: expected one of auto, float32, bfloat16"),
        ("bert/pruned", ["--data", "texts.csv", "--device", "cuda:99"], "--device: expected a device that torch can"),
        ("bert/pruned", ["--data", "texts.csv", "--device", "nope"], "--device: expected a device of torch"),
        ("bert/pruned", ["--data", "texts.csv", "--device", "meta"], "--device: expected a device that can compute"),
        ("bert/pruned", ["--data", "texts.csv", "--resamples", 3], "--resamples: input should be greater than"),
        ("bert/pruned", ["--data", "texts.csv", "--validation-size", 3], "must not be set without --test-size"),
        ("bert/pruned", ["--data", "texts.csv", "--dense", "llama/dense"], "dense: expected a model like Bert"),
        ("t5", ["--data", "texts.csv"], "text-classification or text-generation"),
        ("nothing", ["--data", "texts.csv"], "expected a folder with a saved model, found nothing"),
    ],
)
def test_what_does_not_fit_is_refused(material, monkeypatch, model, options, message):
    monkeypatch.chdir(material)
    before = tree(material)
    assert message in "\n".join(refused("explain", model, *QUICK, *options))
    assert tree(material) == before


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """The folder of a run, one without config.json, and one with half of its weights."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("run/model", "bare", "cut", "good"):
        save_text_model(folder / name, bert)
    (folder / "bare/config.json").unlink()
    weights = folder / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    return folder


NO_CONFIG = "expected a saved model with config.json, found none; "


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        ("run", f"run: {NO_CONFIG}the folder model in it has a model: give run/model"),
        ("bare", f"bare: {NO_CONFIG}give a folder that save_pretrained has written"),
        (
            "cut",
            "cut/model.safetensors: expected the bytes of the tensors that the header lists, got more or fewer; copy "
            "or download the file again, it may be cut off",
        ),
    ],
)
def test_a_folder_that_is_no_whole_model_is_refused_by_every_command(broken, monkeypatch, model, problem):
    monkeypatch.chdir(broken)
    data = ["--data", "none.csv"]
    commands = [["explain", model, *data], ["explain", "good", "--dense", model, *data], ["space", model, "page"]]
    commands += [["export", model, "exported", "--to", "onnx"], *([["compare", model]] if model != "run" else [])]
    commands += [["report", model], ["card", model], ["push", model, "somebody/film", "--dry-run"]]
    for command in commands:
        assert refused(*command) == [f"hf-prune: {problem}"]


def test_a_dense_model_with_the_same_weights_is_warned_of(material, tmp_path, caplog):
    pruned = material / "bert/pruned"
    said = words(explained(pruned, "--dense", pruned, "--data", material / "texts.csv", "--output", tmp_path))
    assert SAME_WEIGHTS in said
    assert SAME_WEIGHTS in caplog.messages
    found = load_explanation(tmp_path)
    assert summary(found)[0] == SAME_WEIGHTS
    assert SAME_WEIGHTS in (tmp_path / "explain/index.html").read_text().partition("</section>")[0]
    assert SAME_WEIGHTS not in summary(found.model_copy(update={"notes": ()}))


@pytest.mark.parametrize("output", ["texts.csv", "texts.csv/explained"])
def test_a_file_as_output_is_refused_before_anything_is_measured(material, monkeypatch, output):
    monkeypatch.chdir(material)
    told = "\n".join(refused("explain", "bert/pruned", "--data", "no such data", *QUICK, "--output", output))
    assert "--output: expected a folder to write into, found a file at " in told


def test_a_folder_that_cannot_be_written_into_is_refused(material, monkeypatch):
    monkeypatch.chdir(material)
    told = refused("explain", "bert/pruned", "--data", "no such data", *QUICK, "--output", "/proc/explained")
    assert "is not writable" in "\n".join(told)
