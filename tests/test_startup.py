"""The modules that importing the package and each command load; times are in benchmarks/startup.py."""

import json
import subprocess
import sys

import pytest
from hostile import HOSTILE
from models import bert

HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "evaluate", "matplotlib", "numpy", "yaml")

SCRIPT = """
import json, sys
sys.argv[0] = "hf-prune"
try:
    {code}
except SystemExit as ending:
    assert not ending.code, ending.code
print(json.dumps([name for name in {names} if name in sys.modules]))
"""


def loaded(code, *arguments, names=HEAVY, cwd=None):
    """Which of these modules a new interpreter has loaded after the code."""
    script = SCRIPT.format(code=code, names=names)
    command = [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def loaded_by(*arguments, names=HEAVY, cwd=None):
    return loaded("from hf_prune.cli.commands import app; app()", *arguments, names=names, cwd=cwd)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("startup") / "model"
    bert().save_pretrained(folder)
    return folder


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import hf_prune; dir(hf_prune)") == set()
    assert loaded("from hf_prune.errors import RecipeError; import hf_prune.config.checks") == set()
    assert loaded("import hf_prune; hf_prune.__version__; hf_prune.HfPruneError") == set()


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("recipes",), ("init", "summarization")])
def test_commands_that_need_no_model_load_nothing_heavy(arguments, tmp_path):
    assert loaded_by(*arguments, cwd=tmp_path) == set()


def test_a_mistake_at_the_door_is_told_without_loading_anything_heavy():
    code = "import hf_prune.cli.commands as cli; assert cli.app(standalone_mode=False) == 2"
    assert loaded(code, "init", "translation") == set()
    assert loaded(code, "run", "quickstrat") == set()


def test_a_recipe_that_is_no_yaml_is_refused_without_loading_anything_heavy_but_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text(HOSTILE["aliases"][0], encoding="utf-8")
    code = "import hf_prune.cli.commands as cli; assert cli.app(standalone_mode=False) == 2"
    assert loaded(code, "validate", tmp_path / "recipe.yaml") == {"yaml"}


def test_a_configuration_loads_no_trainer():
    assert loaded("from hf_prune import PruningConfig, DistillationConfig") <= {"torch", "numpy"}


def test_the_pruner_loads_no_data_sets_and_no_plots():
    assert not loaded("from hf_prune import Pruner") & {"datasets", "evaluate", "matplotlib"}


def test_a_trainer_loads_no_plots():
    assert not loaded("from hf_prune import PruningTrainer") & {"evaluate", "matplotlib"}


def test_a_report_and_the_plan_of_a_model_load_no_trainer(saved):
    names = (*HEAVY, "transformers.trainer")
    unneeded = {"datasets", "evaluate", "matplotlib", "transformers.trainer"}
    assert not loaded_by("report", saved, names=names) & unneeded
    assert not loaded_by("plan", saved, "sparsity=0.5", names=names) & unneeded


def test_validating_loads_training_arguments_and_no_trainer():
    names = (*HEAVY, "transformers.trainer", "transformers.training_args")
    found = loaded_by("validate", "quickstart", names=names)
    assert "transformers.training_args" in found
    assert not found & {"datasets", "evaluate", "matplotlib", "transformers.trainer"}
