import ast
import functools
import importlib.metadata
import re
import socket
import sys
import tomllib
from pathlib import Path

import pytest

import hf_prune

PACKAGE = Path(hf_prune.__file__).parent

# Each module may import only from those before it. A new module needs its place here.
ORDER = [
    "messages",
    "schedules",
    "regions",
    "criteria",
    "distributed",
    "optimizers",
    "targets",
    "adapters",
    "engines",
    "selection",
    "patterns",
    "allocation",
    "penalties",
    "config",
    "distillation",
    "teachers",
    "mask_files",
    "plan",
    "statistics",
    "unit_shards",
    "ranking",
    "replicas",
    "masks",
    "weight_penalties",
    "pruning_state",
    "pruner",
    "callback",
    "checkpoints",
    "sigterm",
    "metrics",
    "plots",
    "markdown",
    "report",
    "record",
    "describe",
    "figures",
    "card_merge",
    "citations",
    "card_text",
    "card",
    "push_plan",
    "hub_errors",
    "hub",
    "task_loss",
    "trainer_loss",
    "trainer_record",
    "trainer_hub",
    "trainer",
    "launch",
    "yaml_loader",
    "recipe_values",
    "recipe",
    "data",
    "tasks",
    "recipe_model",
    "shipped",
    "run",
    "__init__",
    "cli",
    "__main__",
]


def imports_of(module):
    """What a module imports anywhere in its source, functions included: (our modules, top-level names of others)."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{module}: a relative import out of the package"
            base = "hf_prune" if node.level else ""
            names = [".".join(filter(None, (base, node.module)))]
            if names == ["hf_prune"]:
                names = [f"hf_prune.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "hf_prune":
                others.add(top)
            else:
                first = rest.partition(".")[0]
                ours.add(first if (PACKAGE / f"{first}.py").exists() else "__init__")
    return ours, others


def modules():
    return sorted(path.stem for path in PACKAGE.glob("*.py"))


def test_every_module_has_its_place_in_the_order():
    assert sorted(ORDER) == modules()
    assert [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"] == []


@pytest.mark.parametrize("module", modules())
def test_imports_run_one_way(module):
    ours, _ = imports_of(module)
    before = ORDER[: ORDER.index(module)]
    assert ours <= set(before), f"{module} imports {sorted(ours - set(before))}, which come after it"


@functools.cache
def declared_packages():
    """Import names of the dependencies that pyproject.toml declares."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.match(r"[\w.-]+", entry)[0].lower().replace("_", "-") for entry in project["dependencies"]}
    return {
        name
        for name, distributions in importlib.metadata.packages_distributions().items()
        if declared & {distribution.lower().replace("_", "-") for distribution in distributions}
    }


@pytest.mark.parametrize("module", modules())
def test_only_the_standard_library_and_declared_dependencies_are_imported(module):
    _, others = imports_of(module)
    # DeepSpeed has made the parameters what they are then; and a metric of one task is told to need its package.
    optional = {"engines": {"deepspeed"}, "teachers": {"deepspeed"}, "metrics": {"rouge_score"}}
    assert others - sys.stdlib_module_names - declared_packages() == optional.get(module, set())


@pytest.mark.parametrize("module", [name for name in ORDER if name != "distributed"])
def test_one_module_alone_knows_of_torch_distributed(module):
    assert "torch.distributed" not in (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


def test_schedules_need_no_torch():
    assert imports_of("schedules")[1] <= set(sys.stdlib_module_names)


def test_everything_that_is_exported_is_there():
    assert sorted(hf_prune.__all__) == list(hf_prune.__all__)
    assert all(hasattr(hf_prune, name) for name in hf_prune.__all__)
    assert hf_prune.__version__ == importlib.metadata.version("hf-prune")


def test_tests_have_no_network():
    with socket.socket() as client, pytest.raises(RuntimeError, match="tests have no network"):
        client.connect(("192.0.2.1", 80))
