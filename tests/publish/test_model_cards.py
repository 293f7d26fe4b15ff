"""The cards in model_cards/ are those that their run records and counts make, and every shipped recipe has one."""

import io
import json
import re
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from hf_prune.publish.card import read_card
from hf_prune.publish.card_explained import EXPLAIN_NAMES, Explained
from hf_prune.publish.card_merge import merge_cards
from hf_prune.publish.card_metadata import generated_metadata
from hf_prune.publish.card_text import render_card
from hf_prune.publish.explanation import load_explanation
from hf_prune.publish.plots import plot_layers, plot_schedule, plot_units
from hf_prune.publish.record import load_record
from hf_prune.publish.sparsity_json import Figures
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.precision import changes_to_float32

ROOT = Path(__file__).parents[2]
CARDS = sorted(path for path in (ROOT / "model_cards").iterdir() if path.is_dir())


def figures_of(folder):
    return Figures.model_validate_json((folder / "sparsity.json").read_bytes())


def location_of(folder):
    return f"outputs/{folder.name}/model"


def test_the_recipes_that_the_makefile_lists_have_their_cards():
    listed = re.search(r"^CARDS \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1].split()
    assert [path.name for path in CARDS] == sorted(listed)
    assert set(listed) <= {path.stem for path in (ROOT / "recipes").glob("*.yaml")}


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_a_card_is_the_one_that_its_record_makes(folder):
    figures, record = figures_of(folder), load_record(folder)
    explanation = load_explanation(folder)
    if explanation is not None:
        assert explanation.files == record.weights
        explanation = Explained(explanation, frozenset(name for name in EXPLAIN_NAMES if (folder / name).is_file()))
    rendered = render_card(figures, record, location_of(folder), explained=explanation)
    assert figures.metadata == generated_metadata(figures, record)
    kept = (folder / "README.md").read_text(encoding="utf-8")
    assert kept == merge_cards(rendered, here=None)
    assert kept == merge_cards(rendered, here=read_card(folder))


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_recipe_in_a_card_is_the_shipped_one(folder):
    record = load_record(folder)
    path, changes = ROOT / "recipes" / f"{folder.name}.yaml", [f"output_dir=outputs/{folder.name}"]
    changes += ["explain={}"] if load_explanation(folder) is not None else []
    if not record.recipe["training"].get("bf16"):  # where that is slow, `hf-prune run` says what to change
        changes += changes_to_float32(load_recipe(path))
    assert record.recipe == load_recipe(path, changes).model_dump(exclude_unset=True)


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_figures_of_a_card_add_up(folder):
    card, figures, record = read_card(folder).text, figures_of(folder), load_record(folder)
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d×]+) \| ([\d,]+) \| ([\d.]+)% \|$", card, re.MULTILINE)
    prunable = [tensor.name for tensor in figures.tensors if tensor.prunable]
    assert [row[0] for row in rows] == ([] if figures.only_smaller else prunable)
    weights = [int(np.prod([int(side) for side in shape.split("×")])) for _, shape, _, _ in rows]
    zeros = [int(count.replace(",", "")) for _, _, count, _ in rows]
    shares = [float(share) for *_, share in rows]
    assert shares == [round(100 * zero / weight, 2) for zero, weight in zip(zeros, weights, strict=True)]
    if figures.only_smaller:
        before, after = figures.removed.parameters
        assert f"| parameters | {before:,} | {after:,} |" in card
        assert after == sum(tensor.weights for tensor in figures.tensors)
    else:
        assert f"| prunable tensors | {sum(weights):,} | {sum(zeros):,} | {sum(zeros) / sum(weights):.2%} |" in card
        assert sum(zeros) / sum(weights) == pytest.approx(record.target_sparsity, abs=1e-6)
    everything = sum(tensor.weights for tensor in figures.tensors), sum(tensor.zeros for tensor in figures.tensors)
    assert f"| all tensors | {everything[0]:,} | {everything[1]:,} | {everything[1] / everything[0]:.2%} |" in card
    assert figures.files == record.weights
    assert sum(file.size for file in record.weights.values()) == figures.file_bytes
    evaluation = record.evaluation
    dense, pruned = evaluation.dense_metrics[evaluation.main_metric], evaluation.metrics[evaluation.main_metric]
    kept = dense / pruned if evaluation.main_metric == "perplexity" else pruned / dense
    others = [evaluation.base_metrics, evaluation.at_once_metrics]  # of a model that is pruned at once
    base, at_once = (f"{one[evaluation.main_metric]:.4f} | " if one else "" for one in others)
    assert f"| {base}{dense:.4f} | {at_once}{pruned:.4f} | {pruned - dense:+.4f} | {kept:.1%} |" in card


def test_the_figures_of_the_readme_are_those_of_the_quickstarts_card():
    folder = ROOT / "model_cards" / "quickstart"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    figures, record = figures_of(folder), load_record(folder)
    dense, pruned = (one["accuracy"] for one in (record.evaluation.dense_metrics, record.evaluation.metrics))
    assert f"| dense | {dense:.2%} |" in readme
    assert f"| pruned | {pruned:.2%} ({pruned / dense:.1%}) |" in readme
    assert f"accuracy {dense:.4f} {pruned:.4f} {pruned / dense:.1%}" in readme
    before, after = figures.removed.parameters
    assert f"parameters {before:,} {after:,} {after / before:.1%}" in readme
    for cost, samples in zip(record.costs, ("a sample", "32 samples"), strict=True):
        slow, fast = (f"{1000 * one.seconds:.1f}" for one in (cost.dense, cost.model))
        assert f"milliseconds, {samples} {slow} {fast} {cost.speedup:.2f}x the speed" in readme
        assert f"| {slow} |" in readme
        assert f"| {fast} ({cost.speedup:.1f} times faster) |" in readme


def test_the_benchmark_in_the_readme_is_the_one_that_was_measured():
    folder = ROOT / "benchmarks" / "structure"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    sizes = json.loads((folder / "sizes.json").read_text(encoding="utf-8"))

    def of(setting):
        return {row["seed"]: row for row in rows if (row["task"], row["setting"]) == ("sentences", setting)}

    small, long, dense = map(of, ("global: neurons 1/16, heads 1/6, layers 4 of 6", "dense, as many steps", "dense"))
    assert len(small) == len(long) == len(dense) == 3
    folders = {seed: "sentences-global--neurons-1-16--heads-1-6--layers-4-of-6-" + str(seed) for seed in small}
    kept = statistics.mean(small[seed]["test"] / long[seed]["test"] for seed in small)
    faster = statistics.mean(sizes[folders[seed]]["faster"]["32"] for seed in small)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"go further: {faster:.1f} times faster with {kept:.1%} of the accuracy" in readme


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_the_pictures_of_a_card_are_those_of_its_record(folder):
    figures, record = figures_of(folder), load_record(folder)
    counted = "units" if figures.only_smaller else "layers"
    drawn = {counted: io.BytesIO(), "schedule": io.BytesIO()}
    if figures.only_smaller:
        plot_units(figures.removed, drawn[counted])
    else:
        shares = {tensor.name: tensor.sparsity for tensor in figures.prunable}
        plot_layers(shares, drawn[counted], "Zeros by tensor, counted in the saved files")
    assert {path.stem for path in (folder / "assets").iterdir()} == set(drawn)
    plot_schedule(record.history, drawn["schedule"], "Sparsity while fine-tuning", record.evaluation.main_metric)
    for name, picture in drawn.items():
        kept, new = as_pixels(folder / "assets" / f"{name}.png"), as_pixels(picture)
        assert kept.shape == new.shape
        if f"matplotlib=={matplotlib.__version__}" in (ROOT / "constraints.txt").read_text(encoding="utf-8"):
            assert np.abs(kept - new).mean() < 1  # of 255: other fonts differ by a few pixels


def as_pixels(source):
    return np.asarray(Image.open(source).convert("L"), dtype=float)


@pytest.mark.parametrize("folder", CARDS, ids=lambda folder: folder.name)
def test_nothing_of_the_machine_is_in_a_card(folder):
    for name in ("README.md", "sparsity.json", "run_record.json"):
        text = (folder / name).read_text(encoding="utf-8")
        assert re.findall(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|var)\b[^\s\"]*", text) == []
        assert "hf_" not in text.replace("hf_prune", "")
