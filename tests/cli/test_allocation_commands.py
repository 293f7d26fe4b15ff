"""`hf-prune sensitivity`, and the qualities and allocations that `hf-prune prune` takes."""

import json

import pytest
from models import llama
from test_commands import invoke
from text_models import save_text_model, texts

from hf_prune import PruningConfig
from hf_prune.recipe.loading import parse_pruning
from hf_prune.saved.report import make_report

pytestmark = pytest.mark.usefixtures("eighty_columns")

SIZES = ("--samples", 6, "--length", 16)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A language model, a model of another kind, and texts; no test may change them."""
    folder = tmp_path_factory.mktemp("material")
    save_text_model(folder / "model", llama)
    lines = [json.dumps({"text": text}) for text in texts(300)]
    (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def measured(material, tmp_path_factory):
    """The folder that the command writes, and what it prints."""
    folder = tmp_path_factory.mktemp("measured") / "sensitivity"
    given = ("--data", material / "texts.jsonl", *SIZES, "--windows", 3, "--rates", "0.6,0.3", "--sparsity", 0.5)
    result = invoke("sensitivity", material / "model", "--output", folder, *given)
    assert result.exit_code == 0, result.output
    return folder, result.output, given


def test_the_price_is_said_before_and_files_after(measured):
    folder, output, _ = measured
    assert "87 forward passes of 16 tokens" in " ".join(output.split())  # (1 + 14 · 2) · 3
    assert {path.name for path in folder.iterdir()} >= {
        "measured.jsonl",
        "sensitivity.json",
        "sensitivity.png",
        "allocation.json",
        "allocation.png",
    }
    content = json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))
    assert len(content["tensors"]) == 14
    assert all(set(one["losses"]) == {"0.3", "0.6"} for one in content["tensors"].values())
    shares = json.loads((folder / "allocation.json").read_text(encoding="utf-8"))
    weights = [one["units"] for one in content["tensors"].values()]
    assert sum(round(share * of) for share, of in zip(shares.values(), weights, strict=True)) == sum(weights) // 2
    assert content["allocation"]["sparsity"] == 0.5


def test_what_is_measured_is_not_measured_again(measured, material):
    folder, _, given = measured
    before = (folder / "measured.jsonl").read_bytes()
    assert invoke("sensitivity", material / "model", "--output", folder, *given).exit_code == 0
    assert (folder / "measured.jsonl").read_bytes() == before
    other = invoke("sensitivity", material / "model", "--output", folder, *given, "--method", "wanda")
    assert other.exit_code == 2
    assert "expected measurements of the same model" in other.output


def test_an_allocation_is_taken_from_its_file(measured, material, tmp_path):
    path = measured[0] / "allocation.json"
    shares = json.loads(path.read_text(encoding="utf-8"))
    config = parse_pruning(["method=sparsegpt", "sparsity=0.5", f"overrides=@{path}"])
    assert config == PruningConfig(method="sparsegpt", sparsity=0.5, overrides=shares)
    data = ("--data", material / "texts.jsonl", *SIZES)
    result = invoke(
        "prune", material / "model", tmp_path / "out", *data, "--sparsity", 0.5, "--set", f"overrides=@{path}"
    )
    assert result.exit_code == 0, result.output
    assert make_report(tmp_path / "out").prunable_sparsity == pytest.approx(0.5, abs=1e-9)


def test_a_file_that_is_not_there_is_one_line(material, tmp_path):
    data = ("--data", material / "texts.jsonl", "--sparsity", 0.5)
    result = invoke("prune", material / "model", tmp_path / "out", *data, "--set", "overrides=@nowhere.json")
    assert result.exit_code == 2
    assert "expected @FILE" in result.output
    assert not (tmp_path / "out").exists()


def test_a_quality_is_searched_and_what_was_tried_is_said(material, tmp_path):
    data = ("--data", material / "texts.jsonl", *SIZES)
    options = ("--method", "magnitude", "--target-quality", 0.9999, "--sparsity", 0.6)
    result = invoke("prune", material / "model", tmp_path / "out", *data, *options)
    assert result.exit_code in (0, 2), result.output
    said = " ".join(result.output.split())
    assert "Sparsity 0.6: perplexity" in said
    if result.exit_code == 0:
        assert "at which 0.9999 of the dense model's quality is kept" in (tmp_path / "out" / "README.md").read_text()
        assert make_report(tmp_path / "out").prunable_sparsity <= 0.6 + 1e-3
    else:
        assert "found none" in said


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("prune", ("--target-quality", 1.5), "target_quality: expected 0 < target_quality < 1"),
        ("prune", ("--target-quality", 0.9, "--resume"), "a search starts anew"),
        ("sensitivity", ("--rates", "0.3;0.5"), "expected numbers with commas"),
        ("sensitivity", ("--rates", "0.3", "--sparsity", 0.5), "expected at most the highest of the rates, 0.3"),
        ("sensitivity", ("--rates", "1.3"), "expected sparsities between 0 and 1"),
        ("sensitivity", ("--windows", 0), "expected 1 or more"),
    ],
)
def test_what_cannot_be_done_is_one_line(material, tmp_path, command, options, message):
    output = (tmp_path / "out",) if command == "prune" else ("--output", tmp_path / "out")
    given = ("--data", material / "texts.jsonl", *SIZES, *options)
    result = invoke(command, material / "model", *output, *given)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
