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
found = {{}}
for arguments, code in json.loads(sys.argv[1]):
    sys.argv = ["hf-prune", *arguments]
    try:
        exec(code)
    except SystemExit as ending:
        assert not ending.code, ending.code
    found[code if not arguments else arguments[0]] = [name for name in {names} if name in sys.modules]
print(json.dumps(found))
"""
APP = "from hf_prune.cli.commands import app; app()"


def loaded_after(*steps, names=HEAVY, cwd=None):
    """Which of these modules a new interpreter has loaded after each step: arguments, and code that reads them."""
    steps = [([str(argument) for argument in arguments], code) for arguments, code in steps]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(names=names), json.dumps(steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=True)
    return {step: set(found) for step, found in json.loads(done.stdout.splitlines()[-1]).items()}


def loaded(code, *arguments, cwd=None):
    """Which modules a new interpreter has loaded after the code."""
    [found] = loaded_after((arguments, code), cwd=cwd).values()
    return found


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import hf_prune; dir(hf_prune)") == set()
    assert loaded("from hf_prune.errors import RecipeError; import hf_prune.config.checks") == set()
    assert loaded("import hf_prune; hf_prune.__version__; hf_prune.HfPruneError") == set()


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("recipes",), ("init", "summarization")])
def test_commands_that_need_no_model_load_nothing_heavy(arguments, tmp_path):
    assert loaded(APP, *arguments, cwd=tmp_path) == set()


def test_a_mistake_at_the_door_is_told_without_loading_anything_heavy():
    code = "import hf_prune.cli.commands as cli; assert cli.app(standalone_mode=False) == 2"
    assert loaded(code, "init", "translation") == set()
    assert loaded(code, "run", "quickstrat") == set()


def test_a_recipe_that_is_no_yaml_is_refused_without_loading_anything_heavy_but_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text(HOSTILE["aliases"][0], encoding="utf-8")
    code = "import hf_prune.cli.commands as cli; assert cli.app(standalone_mode=False) == 2"
    assert loaded(code, "validate", tmp_path / "recipe.yaml") == {"yaml"}


# ---- Steps that load more and more, in one interpreter: what a later one has not loaded, no earlier one has ----

CONFIGURATION = "from hf_prune import PruningConfig, DistillationConfig"
PRUNER = "from hf_prune import Pruner"
TRAINER = "from hf_prune import PruningTrainer"


@pytest.fixture(scope="module")
def by_import():
    return loaded_after(([], CONFIGURATION), ([], PRUNER), ([], TRAINER))


def test_a_configuration_loads_no_trainer(by_import):
    assert by_import[CONFIGURATION] <= {"torch", "numpy"}


def test_the_pruner_loads_no_data_sets_and_no_plots(by_import):
    assert not by_import[PRUNER] & {"datasets", "evaluate", "matplotlib"}


def test_a_trainer_loads_no_plots(by_import):
    assert "transformers" in by_import[TRAINER]
    assert not by_import[TRAINER] & {"evaluate", "matplotlib"}


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    saved = tmp_path_factory.mktemp("startup") / "model"
    bert().save_pretrained(saved)
    return loaded_after(
        (["report", saved], APP),
        (["plan", saved, "sparsity=0.5"], APP),
        (["validate", "quickstart"], APP),
        names=(*HEAVY, "transformers.trainer", "transformers.training_args"),
    )


UNNEEDED = {"datasets", "evaluate", "matplotlib", "transformers.trainer"}


@pytest.mark.parametrize("command", ["report", "plan"])
def test_a_report_and_the_plan_of_a_model_load_no_trainer(by_command, command):
    assert "torch" in by_command[command]
    assert not by_command[command] & UNNEEDED


def test_validating_loads_training_arguments_and_no_trainer(by_command):
    assert "transformers.training_args" in by_command["validate"]
    assert not by_command["validate"] & UNNEEDED
