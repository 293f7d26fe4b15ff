"""Sweeps: each point as a plain run would give it, with one dense run; continued after a kill; compared at the end."""

import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_commands import invoke, printed, refused
from test_run import reviews, save_tiny_bert, tree, write_csv, write_recipe

from hf_prune.compare.pareto import Limits
from hf_prune.errors import LaunchError, RecipeError
from hf_prune.publish.record import load_record
from hf_prune.recipe.dense_run import Shared
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import examples_of, prepare
from hf_prune.recipe.run import run
from hf_prune.sweep.dense_runs import dense_key, find_dense, make_dense
from hf_prune.sweep.plan import plan_sweep
from hf_prune.sweep.sweep import run_sweep

GRID = ("pruning.sparsity=0.5,0.9",)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model and a data set; no test may change them."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_csv(folder / "reviews.csv", reviews())
    return folder


def distilled(folder, material, **changes):
    """A recipe with a dense run that is distilled from, and groups of the test split."""
    given = {"dense": {"max_steps": 6}, "distillation": {"weight": 0.5}, "dataset__group_by": "source"}
    return write_recipe(folder, material, **{**given, "training__per_device_eval_batch_size": 4} | changes)


def sweep(path, *settings, limits=None, **changes):
    """The result of a sweep in `sweep` beside the recipe, and what it said."""
    said = []
    plan = plan_sweep(path, settings, path.parent / "sweep", **changes)
    return run_sweep(plan, limits, command="hf-prune sweep", say=said.append), said


def trained_dense(said):
    return said.count("Fine-tuning the dense model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("finished")
    path = distilled(folder, material, training__report_to="tensorboard", training__run_name="tiny")
    before = tree(material)
    result, said = sweep(path, *GRID, limits=Limits(min_sparsity=0.8))
    assert tree(material) == before
    return {"path": path, "out": folder / "sweep", "result": result, "said": said}


def point(finished, sparsity):
    return finished["out"] / "points" / f"sparsity={sparsity}"


def test_the_dense_model_is_trained_once(finished):
    assert trained_dense(finished["said"]) == 1
    (dense,) = finished["out"].glob("dense-*")
    assert f"The dense model is the one in {dense / 'dense'}" in finished["said"]


SAME_FILES = ("model.safetensors", "config.json", "pruning_config.json")


def tokenizer_in(folder):
    """A saved tokenizer without what it was last called with: that of a plain run depends on datasets' cache."""
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {"truncation": None}


def test_a_point_is_what_a_plain_run_gives_bit_for_bit(finished, tmp_path):
    settings = ["pruning.sparsity=0.9", f"output_dir={tmp_path / 'plain'}", "training.report_to=none"]
    plain = run(load_recipe(finished["path"], settings), say=[].append)
    (dense,) = finished["out"].glob("dense-*/dense")
    for ours, other in (
        (dense, tmp_path / "plain" / "dense"),
        (point(finished, 0.9) / "model", tmp_path / "plain" / "model"),
    ):
        names = [name for name in SAME_FILES if (other / name).exists()]
        assert len(names) == (3 if other.name == "model" else 2)
        assert tokenizer_in(ours) == tokenizer_in(other)
        for name in names:
            assert (ours / name).read_bytes() == (other / name).read_bytes(), name
    masks, other = (
        load_file(folder / "model" / "pruning_masks.safetensors")
        for folder in (point(finished, 0.9), tmp_path / "plain")
    )
    assert masks.keys() == other.keys()
    assert all(torch.equal(masks[name], other[name]) for name in masks)
    written = json.loads((point(finished, 0.9) / "results.json").read_text(encoding="utf-8"))
    assert (written["dense"], written["pruned"], written["groups"]) == (plain.dense, plain.pruned, plain.groups)
    assert (written["parameters"], written["file_bytes"]) == (plain.parameters, plain.file_bytes)
    assert "validation" not in json.loads((tmp_path / "plain" / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"calibration": {"samples": 16, "batch_size": 4}}, id="at once"),
        pytest.param(
            {
                "model__vocabulary": "data",
                "pruning": [
                    {"structure": "neurons", "sparsity": 0.5},
                    {"sparsity": 0.5, "shared_values": 4, "begin": 2},
                ],
            },
            id="fewer tokens and neurons, shared values",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"training__bf16": True, "training__eval_strategy": "steps", "training__eval_steps": 2},
            id="bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_with_a_shared_dense_model_gives_the_same_weights_for_other_recipes_too(material, tmp_path, changes):
    path = distilled(tmp_path, material, **changes)
    plain = run(load_recipe(path), say=[].append)
    recipe = load_recipe(path, [f"output_dir={tmp_path / 'shared'}"])
    examples = examples_of(prepare(recipe))
    made = make_dense(tmp_path / "sweep", recipe, examples, say=[].append)
    found = find_dense(tmp_path / "sweep", recipe)
    assert found == made
    shared = run(recipe, say=[].append, shared=Shared(examples, found))
    assert (shared.base, shared.dense, shared.at_once, shared.pruned) == (
        plain.base,
        plain.dense,
        plain.at_once,
        plain.pruned,
    )
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "shared"))
    assert first.keys() == second.keys()
    assert [name for name, weight in first.items() if not torch.equal(weight, second[name])] == []


def test_a_dense_model_that_has_changed_is_trained_again(finished):
    (folder,) = finished["out"].glob("dense-*/dense")
    recipe = plan_sweep(finished["path"], GRID, finished["out"]).points[0].recipe
    assert find_dense(finished["out"], recipe).folder == folder
    file = folder / "model.safetensors"
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert find_dense(finished["out"], recipe) is None
    finally:
        file.write_bytes(content)


def test_points_and_the_dense_model_are_evaluated_on_the_validation_split(finished):
    (dense,) = finished["out"].glob("dense-*/dense")
    for sparsity in (0.5, 0.9):
        written = json.loads((point(finished, sparsity) / "results.json").read_text(encoding="utf-8"))
        record = load_record(point(finished, sparsity) / "model")
        last = record.evaluations[-1]
        assert (last.part, last.samples) == ("validation", 8)
        assert written["validation"] == {"dense": last.dense_metrics, "pruned": last.metrics}
        assert load_record(dense).evaluations[-1].metrics == last.dense_metrics
        assert "8 samples, the validation split." in (point(finished, sparsity) / "model" / "README.md").read_text()


def test_the_card_of_the_dense_model_is_that_of_no_pruned_one(finished):
    (dense,) = finished["out"].glob("dense-*/dense")
    card = (dense / "README.md").read_text(encoding="utf-8")
    assert "| metric | this model |" in card
    assert "was not measured" not in card
    assert load_record(dense).costs


def test_the_page_has_all_models_and_the_best_by_validation_data(finished):
    result = finished["result"]
    assert [model.name for model in result.comparison.models] == ["dense", "sparsity=0.5", "sparsity=0.9"]
    assert result.comparison.choice.best.name == "sparsity=0.9"  # the only one within the limits
    assert (result.comparison.measure.part, result.comparison.measure.tested) == ("validation", True)
    written = json.loads((finished["out"] / "comparison" / "compare.json").read_text(encoding="utf-8"))
    assert written["best"] == "sparsity=0.9"
    assert written["push"] == f"hf-prune push {point(finished, 0.9) / 'model'} USER/NAME"
    page = (finished["out"] / "comparison" / "index.html").read_text(encoding="utf-8")
    assert "../points/sparsity%3D0.9/model/README.md" in page
    assert result.failed == {}


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_tensorboard_has_the_final_figures_once_and_the_name_of_the_point(finished, sparsity):
    scalars, texts = {}, []
    for file in (point(finished, sparsity) / "runs").rglob("events*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            scalars.setdefault(tag, []).extend(event.value for event in events.Scalars(tag))
        if "args/text_summary" in events.Tags()["tensors"]:
            texts += [event.tensor_proto.string_val[0].decode() for event in events.Tensors("args/text_summary")]
    results = json.loads((point(finished, sparsity) / "results.json").read_text(encoding="utf-8"))
    expected = {
        "test/accuracy": results["pruned"]["accuracy"],
        "eval/accuracy": results["validation"]["pruned"]["accuracy"],
        "test/prunable_sparsity": results["prunable_sparsity"],
        "test/parameters": results["parameters"]["pruned"],
        "test/file_bytes": results["file_bytes"]["pruned"],
        "test/milliseconds_1": 1000 * results["costs"][0]["model"]["seconds"],
    }
    assert {tag: scalars[tag] for tag in expected} == {tag: [pytest.approx(value)] for tag, value in expected.items()}
    assert f'"run_name": "tiny sparsity={sparsity}"' in texts[0]


def test_the_dense_run_is_reported_by_the_name_of_its_folder(finished):
    (dense,) = finished["out"].glob("dense-*")
    texts = []
    for file in dense.rglob("events*"):
        events = EventAccumulator(str(file)).Reload()
        if "args/text_summary" in events.Tags()["tensors"]:
            texts += [event.tensor_proto.string_val[0].decode() for event in events.Tensors("args/text_summary")]
    assert f'"run_name": "tiny {dense.name}"' in texts[0]


def test_what_is_finished_is_not_run_again_and_a_grid_may_grow(finished):
    before = tree(finished["out"] / "points", *finished["out"].glob("dense-*"))
    _, said = sweep(finished["path"], *GRID)
    assert tree(finished["out"] / "points", *finished["out"].glob("dense-*")) == before
    assert said == ["sparsity=0.5: finished before", "sparsity=0.9: finished before"]
    plan = plan_sweep(finished["path"], ["pruning.sparsity=0.5,0.7,0.9"], finished["out"])
    assert [plan.is_finished(one) for one in plan.points] == [True, False, True]


def test_another_recipe_is_refused_in_the_same_folder_before_anything_is_written(finished):
    before = tree(finished["out"])
    for settings, found in (
        (["pruning.sparsity=0.5,0.9", "training.seed=7"], "training.seed (for all points) was not set and is now 7."),
        (["pruning.sparsity=0.5,0.9"], "the sweep was a grid and is now one with --trials; what trials draw from was"),
    ):
        trials = 2 if len(settings) == 1 else None
        expected = f"--output: expected the folder of this sweep, .* begun with other settings: {re.escape(found)}"
        with pytest.raises(RecipeError, match=expected):
            plan_sweep(finished["path"], settings, finished["out"], trials)
    state, begun = finished["out"] / "sweep.json", (finished["out"] / "sweep.json").read_bytes()
    try:
        state.write_text("{}", encoding="utf-8")
        with pytest.raises(RecipeError, match="--output: expected a sweep of this version of hf-prune, got "):
            plan_sweep(finished["path"], GRID, finished["out"])
    finally:
        state.write_bytes(begun)
    text = finished["path"].read_text(encoding="utf-8")
    try:
        finished["path"].write_text(text.replace("weight: 0.5", "weight: 0.25"), encoding="utf-8")
        with pytest.raises(RecipeError, match=r"distillation.weight \(in the recipe\) was 0.5 and is now 0.25\."):
            plan_sweep(finished["path"], GRID, finished["out"])
    finally:
        finished["path"].write_text(text, encoding="utf-8")
    results = point(finished, 0.5) / "results.json"
    content = results.read_text(encoding="utf-8")
    try:
        results.write_text(content.replace('"max_steps": 4', '"max_steps": 5'), encoding="utf-8")
        with pytest.raises(RecipeError, match=r"expected the results of this recipe in .*, found those of another"):
            plan_sweep(finished["path"], GRID, finished["out"])
    finally:
        results.write_text(content, encoding="utf-8")
    assert tree(finished["out"]).keys() == before.keys()


# ---- A kill, and points that fail ----


def test_a_sweep_that_is_killed_is_continued_and_ends_as_if_it_had_not_been(material, tmp_path, finished):
    path = distilled(tmp_path, material, training__report_to="tensorboard", training__run_name="tiny")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "hf_prune",
        "sweep",
        str(path),
        *GRID,
        "--output",
        str(tmp_path / "sweep"),
    ]
    first = tmp_path / "sweep" / "points" / "sparsity=0.5" / "results.json"
    second = tmp_path / "sweep" / "points" / "sparsity=0.9"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 300
        while not (first.exists() and second.exists()) and process.poll() is None and time.monotonic() < ends:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (second / "results.json").exists()
    before = tree(first.parent, *(tmp_path / "sweep").glob("dense-*"))
    result, said = sweep(path, *GRID)
    assert tree(first.parent, *(tmp_path / "sweep").glob("dense-*")) == before
    assert trained_dense(said) == 0
    assert said[0] == "sparsity=0.5: finished before"
    assert len(result.comparison.models) == 3
    for sparsity in (0.5, 0.9):
        ours = tmp_path / "sweep" / "points" / f"sparsity={sparsity}" / "model" / "model.safetensors"
        assert ours.read_bytes() == (point(finished, sparsity) / "model" / "model.safetensors").read_bytes()


# A sweep whose process is killed, as for memory, while its first point is run.
KILLED = """
import os, signal, sys
from pathlib import Path
import hf_prune.sweep.sweep as module
from hf_prune.sweep.plan import plan_sweep

run = module.run
def killed_or_run(recipe, *others):
    if "0.5" in recipe.output_dir:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(recipe, *others)

module.run = killed_or_run
module.run_sweep(plan_sweep(Path(sys.argv[1]), sys.argv[3:], Path(sys.argv[2])), say=[].append)
"""


def test_a_point_during_which_the_process_is_killed_twice_has_failed_and_the_others_go_on(material, tmp_path):
    path = write_recipe(tmp_path, material, training__max_steps=1)
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(path), str(tmp_path / "sweep"), *GRID]
    points = tmp_path / "sweep" / "points"
    for _ in range(2):
        assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert not (points / "sparsity=0.9").exists()
    result, _ = sweep(path, *GRID)
    [(name, error)] = result.failed.items()
    assert name == "sparsity=0.5"
    assert "the process was killed twice while this ran, as the system does where memory runs out" in error
    assert error in (points / name / "error.txt").read_text(encoding="utf-8")
    assert error in html.unescape((tmp_path / "sweep/comparison/index.html").read_text(encoding="utf-8"))
    assert (points / "sparsity=0.9" / "results.json").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL  # tried again
    assert list(sweep(path, *GRID)[0].failed) == [name]
    assert sweep(path, *GRID)[0].failed == {}  # and here nothing kills it
    assert not (tmp_path / "sweep" / "begun.json").exists()


def test_a_dense_run_during_which_the_process_was_killed_twice_is_not_tried_for_each_point(material, tmp_path):
    path = distilled(tmp_path, material)
    plan = plan_sweep(path, GRID, tmp_path / "sweep")
    dense = f"dense-{dense_key(plan.first.recipe)[:8]}"
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(plan.state), encoding="utf-8")
    (tmp_path / "sweep" / "begun.json").write_text(json.dumps({dense: 2}), encoding="utf-8")
    result, said = sweep(path, *GRID)
    first, second = result.failed.values()
    assert first.startswith("RecipeError: the process was killed twice while this ran")
    assert second.startswith("RecipeError: dense: the dense run that this point shares has failed: the process was")
    assert trained_dense(said) == 0


@pytest.mark.usefixtures("eighty_columns")
def test_a_point_that_fails_is_recorded_the_others_go_on_and_the_command_ends_with_an_error(material, tmp_path):
    path = write_recipe(tmp_path, material, training__max_steps=2)
    swept = 'pruning.targets=[".*query.weight"],["nothing"],[".*key.weight", ".*value.weight"]'
    result = invoke("sweep", path, swept, "--output", tmp_path / "sweep")
    assert result.exit_code == 1
    folders = sorted((tmp_path / "sweep" / "points").iterdir())
    assert len(folders) == 3
    (failed,) = [folder for folder in folders if not (folder / "results.json").exists()]
    assert "targets=-nothing-" in failed.name
    error = (failed / "error.txt").read_text(encoding="utf-8")
    assert error.startswith("RecipeError: command line: pruning.targets")
    assert "Traceback" in error
    written = json.loads((tmp_path / "sweep" / "comparison" / "compare.json").read_text(encoding="utf-8"))
    assert list(written["failed"]) == [failed.name]
    assert len(written["models"]) == 2
    pruned = [
        name.split(".")[-2]
        for folder in folders
        if folder != failed
        for name, weight in load_file(folder / "model" / "model.safetensors").items()
        if float((weight == 0).float().mean()) == 0.5
    ]
    assert sorted(pruned) == ["key", "key", "query", "query", "value", "value"]
    assert "failed: RecipeError" in result.stdout


# Values that are refused when training begins, and with which no model has room in any memory.
NO_SCHEDULE = "training.lr_scheduler_type=linear,cosine_with_min_lr"
TOO_LARGE = 10**12


def test_a_point_without_memory_fails_alone_and_later_only_what_is_missing_is_run(material, tmp_path):
    config = {"model_type": "bert", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = {"config": config | {"intermediate_size": 32}, "tokenizer": str(material / "model")}
    path = write_recipe(tmp_path, material, model=model, training__max_steps=1)
    swept = f"model.config.intermediate_size=32,{TOO_LARGE},64"
    result, said = sweep(path, swept)
    assert list(result.failed) == [f"intermediate_size={TOO_LARGE}"]
    assert "can't allocate memory" in result.failed[f"intermediate_size={TOO_LARGE}"]
    points = tmp_path / "sweep/points"
    shutil.rmtree(points / "intermediate_size=64")
    before = tree(points / "intermediate_size=32")
    result, said = sweep(path, swept)  # the point that has failed is the first that is missing, and stops none
    assert said[0] == "intermediate_size=32: finished before"
    assert tree(points / "intermediate_size=32") == before
    assert (points / "intermediate_size=64/results.json").exists()
    assert list(result.failed) == [f"intermediate_size={TOO_LARGE}"]
    assert (points / f"intermediate_size={TOO_LARGE}/error.txt").exists()


def test_a_bad_value_that_is_found_in_training_is_told_with_its_point(material, tmp_path):
    path = write_recipe(tmp_path, material, training__max_steps=1)
    result, said = sweep(path, NO_SCHEDULE)
    [(name, error)] = result.failed.items()
    assert name == "lr_scheduler_type=cosine_with_min_lr"
    assert error.startswith("ValueError: One of min_lr or min_lr_rate should be set")
    assert f"{name} failed: {error}" in said


@pytest.mark.usefixtures("eighty_columns")
def test_a_dense_run_that_fails_is_tried_once_and_nothing_is_compared(material, tmp_path):
    path = distilled(tmp_path, material, dense={"lr_scheduler_type": "cosine_with_min_lr"})
    ended = invoke("sweep", path, *GRID, "--output", tmp_path / "sweep")
    assert ended.exit_code == 1
    assert ended.stdout.count("Fine-tuning the dense model") == 1
    assert "No point was finished: there is nothing to compare." in ended.stdout
    assert "sparsity=0.5 failed: ValueError: One of min_lr" in ended.stdout
    assert "sparsity=0.9 failed: RecipeError: dense: the dense run that this point shares has failed" in ended.stdout
    assert not (tmp_path / "sweep/comparison").exists()


def test_a_first_point_that_cannot_be_run_is_refused_before_anything_is_written(material, tmp_path):
    path = write_recipe(tmp_path, material)
    before = tree(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.freeze"):
        sweep(path, 'model.freeze=["nothing"],[]')
    assert tree(tmp_path) == before


# ---- Plans ----


def test_a_metric_that_points_do_not_have_is_refused_after_the_first(material, tmp_path):
    path = distilled(tmp_path, material)
    arguments = ("sweep", path, *GRID, "--output", tmp_path / "sweep")
    for _ in range(2):  # also when it is continued, before another point is run
        refusal = invoke(*arguments, "--metric", "f1")
        assert (refusal.exit_code, "--metric: sparsity=0.5 has accuracy, got 'f1'" in refusal.stderr) == (2, True)
        assert [one.name for one in (tmp_path / "sweep/points").iterdir()] == ["sparsity=0.5"]


def test_settings_that_touch_the_dense_run_have_dense_runs_of_their_own(material, tmp_path):
    path = distilled(tmp_path, material)
    settings = ["training.learning_rate=0.01,0.02", "pruning.sparsity=0.5,0.9"]
    plan = plan_sweep(path, settings, tmp_path / "sweep")
    assert len(plan.points) == 4
    assert len({dense_key(one.recipe) for one in plan.points}) == 2
    for swept, number in (
        ("training.max_steps=4,8", 1),  # the dense run has its own
        ("distillation.weight=0.5,0.7", 1),
        ("model.freeze=[],[.*query.*]", 2),
        ("dataset.max_train_samples=20,30", 2),
    ):
        plan = plan_sweep(path, [swept], tmp_path / "sweep")
        assert len({dense_key(one.recipe) for one in plan.points}) == number, swept


@pytest.mark.usefixtures("eighty_columns")
def test_a_dry_run_lists_the_points_and_writes_nothing(material, tmp_path):
    path = distilled(tmp_path, material)
    before = tree(tmp_path)
    output = ("--output", "there")  # nothing is there; and the path of a test is longer than a line
    said = printed("sweep", path, "pruning.sparsity=0.5,0.7", "pruning.method=magnitude,random", "--dry-run", *output)
    rows = [line.split() for line in said.splitlines()]
    assert ["sparsity=0.5,method=magnitude", "to", "run"] in rows
    assert ["sparsity=0.7,method=random", "to", "run"] in rows
    assert "Dense runs for these points: 1." in said
    assert "Folder: there. Nothing was run." in said
    assert "0.5..0.9" in printed("sweep", path, "pruning.sparsity=0.5..0.9", "--trials", 3, "--dry-run", *output)
    assert plan_sweep(path, GRID).output == tmp_path / "out_sweep"
    assert tree(tmp_path) == before


def test_an_entry_of_a_list_of_configurations_is_named_by_its_place(material, tmp_path):
    path = write_recipe(tmp_path, material, pruning=[{"sparsity": 0.5}, {"sparsity": 0.6, "method": "random"}])
    plan = plan_sweep(path, ["pruning.1.sparsity=0.7,0.8"], tmp_path / "sweep")
    assert [[config.sparsity for config in one.recipe.pruning_configs] for one in plan.points] == [
        [0.5, 0.7],
        [0.5, 0.8],
    ]


@pytest.mark.parametrize(
    ("settings", "changes", "problem"),
    [
        (["pruning.sparsity=0.5"], {}, "expected a key with several values"),
        (["pruning.sparsity=0.5..0.9"], {}, r"pruning.sparsity: expected values with commas, or --trials N"),
        (["pruning.sparsity=0.5,0.50"], {}, "expected different settings, got sparsity=0.5 and sparsity=0.50"),
        (["pruning.sparsity=0.5,1.5"], {}, r"command line: pruning.sparsity: "),
        (["pruning.sparsty=0.5,0.6"], {}, r"pruning.sparsty: unknown key; did you mean 'sparsity'"),
        (["dataset.test_size=10,20"], {}, r"dataset.test_size: must not be swept"),
        (["metrics=[f1],[accuracy]"], {}, "metrics: must not be swept"),
        (
            ["pruning.sparsity=0.5,0.6", "training.push_to_hub=true"],
            {},
            r"training.push_to_hub: must not be set in a sweep",
        ),
        (["pruning.sparsity=0.5,0.6"], {"trials": 0}, "--trials: expected 1 or more, got 0"),
        (["pruning.sparsity=0.5,0.6"], {"against": "bytes"}, "--against: must not be set without --trials"),
        (
            ["pruning.sparsity=0.5,0.6"],
            {"trials": 2, "against": "size"},
            "--against: expected sparsity, bytes, latency",
        ),
    ],
)
def test_what_cannot_be_swept_is_refused(material, tmp_path, settings, changes, problem):
    path = write_recipe(tmp_path, material)
    with pytest.raises(RecipeError, match=problem):
        plan_sweep(path, settings, tmp_path / "sweep", **changes)
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_something_else_is_refused(material, tmp_path):
    path = write_recipe(tmp_path, material)
    with pytest.raises(RecipeError, match="expected an empty folder or that of a sweep"):
        plan_sweep(path, GRID, material)
    with pytest.raises(RecipeError, match="expected a folder, found a file"):
        plan_sweep(path, GRID, path)


def test_several_processes_are_refused(material, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(LaunchError, match="expected one process, got 2: run each point with hf-prune run"):
        plan_sweep(write_recipe(tmp_path, material), GRID, tmp_path / "sweep")


@pytest.mark.usefixtures("eighty_columns")
def test_the_command_refuses_in_one_line(material, tmp_path):
    path = write_recipe(tmp_path, material)
    (line,) = refused("sweep", path, "pruning.sparsity=0.5..0.9")
    assert line.startswith("hf-prune: command line: pruning.sparsity: expected values with commas, or --trials N")
    assert os.listdir(tmp_path) == ["recipe.yaml"]
