"""Wings are imported in one order, without circles inside a wing, and each library only where it belongs."""

import ast
import functools
import graphlib
import importlib
import importlib.metadata
import re
import socket
import sys
import tomllib
from pathlib import Path

import pytest

import hf_prune

PACKAGE = Path(hf_prune.__file__).parent

# From the ground up: a wing may import from those before it, as its own docstring says more closely.
WINGS = [
    "errors",
    "foreign",
    "methods",
    "quantise",
    "model",
    "config",
    "engines",
    "distillation",
    "structure",
    "packed",
    "saved",
    "masking",
    "oneshot",
    "publish",
    "explain",
    "space",
    "compare",
    "trainer",
    "recipe",
    "sweep",
    "runtimes",
    "cli",
]

# Imported inside functions: what is there only when it was asked for.
OPTIONAL = {
    "engines.deepspeed": {"deepspeed"},  # it has made the parameters what they are then
    "engines.placing": {"deepspeed"},
    "runtimes.exporters": {"onnxruntime"},  # `find_format` says what is missing
    "runtimes.gguf": {"gguf"},
    "runtimes.litert": {"ai_edge_litert", "litert_torch"},
    "space.app": {"gradio"},  # the page itself, which runs elsewhere
    "sweep.study": {"optuna"},  # it says what to install
    "explain.complexity": {"codecarbon"},  # energy is left out without it
    "recipe.metrics": {"rouge_score"},  # the metric of one task says that it needs its package
}


@functools.cache
def modules():
    """Every module of the package by its dotted name, `__init__` for a package's own file."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = path
    return found


def wing_of(module):
    return module.partition(".")[0]


@functools.cache
def imports_of(module):
    """What a module imports anywhere in its source, functions included: (our modules, top-level names of others)."""
    ours, others = set(), set()
    package = ["hf_prune", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(modules()[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            names = [source]
            if source == "hf_prune" or source.removeprefix("hf_prune.") in WINGS[1:]:
                names = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "hf_prune":
                others.add(top)
            else:
                ours.add(rest if rest in modules() else "__init__")
    return ours, others


def may_import(wing):
    """The wings that a wing's docstring says it may import; `errors` has none."""
    if wing == "errors":
        return set()
    docstring = ast.get_docstring(ast.parse(modules()[f"{wing}.__init__"].read_text(encoding="utf-8")))
    said = re.search(r"^May import: (.*)\.$", docstring, flags=re.MULTILINE)[1]
    if said.startswith("every wing"):
        excluded = set(re.findall(r"\w+", said.partition(" but ")[2])) - {"and"}
        return set(WINGS[: WINGS.index(wing)]) - excluded
    return set(said.split(", "))


def test_every_module_lies_in_a_wing():
    at_the_top = {"__init__", "__main__", "errors"}
    assert {wing_of(module) for module in modules()} == {*WINGS, *at_the_top}
    assert all(module.count(".") == 1 for module in modules() if module not in at_the_top)


@pytest.mark.parametrize("wing", WINGS[1:])
def test_a_wing_says_what_it_answers_and_what_it_may_import(wing):
    docstring = ast.get_docstring(ast.parse(modules()[f"{wing}.__init__"].read_text(encoding="utf-8")))
    assert len(docstring.splitlines()) <= 5
    assert may_import(wing) <= set(WINGS[: WINGS.index(wing)]), f"{wing} may not import what comes after it"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_one_way(module):
    ours, _ = imports_of(module)
    if module in ("__init__", "__main__"):
        return
    wings = {wing_of(name) for name in ours} - {wing_of(module)}
    allowed = may_import(wing_of(module)) | ({"__init__"} if wing_of(module) == "cli" else set())
    assert wings <= allowed, f"{module} imports {sorted(wings - allowed)}"


@pytest.mark.parametrize("wing", WINGS[1:])
def test_there_is_no_circle_inside_a_wing(wing):
    inside = {name: imports_of(name)[0] for name in modules() if wing_of(name) == wing}
    graphlib.TopologicalSorter({name: ours & inside.keys() for name, ours in inside.items()}).prepare()


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


@pytest.mark.parametrize("module", sorted(modules()))
def test_only_the_standard_library_and_declared_dependencies_are_imported(module):
    _, others = imports_of(module)
    assert others - sys.stdlib_module_names - declared_packages() == OPTIONAL.get(module, set())


@pytest.mark.parametrize("module", [name for name in sorted(modules()) if wing_of(name) != "engines"])
def test_engines_alone_know_of_torch_distributed_and_deepspeed(module):
    assert "torch.distributed" not in modules()[module].read_text(encoding="utf-8").replace("The only wing that", "")
    assert "deepspeed" not in imports_of(module)[1]


def test_schedules_need_no_torch():
    assert imports_of("methods.schedules")[1] <= set(sys.stdlib_module_names)


def test_everything_that_is_exported_is_there():
    assert sorted(hf_prune.__all__) == list(hf_prune.__all__)
    assert all(hasattr(hf_prune, name) for name in hf_prune.__all__)
    assert hf_prune.__version__ == importlib.metadata.version("hf-prune")


def test_names_that_are_imported_late_are_those_that_type_checkers_see():
    tree = ast.parse(modules()["__init__"].read_text(encoding="utf-8"))
    seen = {
        alias.name: f".{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    late = {name: module for name, module in seen.items() if module in hf_prune._MODULES.values()}
    assert late == hf_prune._MODULES
    assert set(hf_prune.__all__) <= set(dir(hf_prune))
    with pytest.raises(AttributeError, match="has no attribute 'PruningTraner'"):
        hf_prune.PruningTraner  # noqa: B018


def test_tests_have_no_network():
    with socket.socket() as client, pytest.raises(RuntimeError, match="tests have no network"):
        client.connect(("192.0.2.1", 80))


SCRIPTS = sorted((PACKAGE.parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.stem for path in SCRIPTS])
def test_what_a_benchmark_imports_is_there(script):
    """From hf_prune, and from the other scripts, which are not imported, as some need packages of their own."""
    beside = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in SCRIPTS}
    for node in ast.walk(beside[script.stem]):
        if not isinstance(node, ast.ImportFrom):
            continue
        names = {alias.name for alias in node.names}
        if node.module in beside:
            assert names <= defined_in(beside[node.module]), node.module
        elif node.module.partition(".")[0] == "hf_prune":
            source = importlib.import_module(node.module)
            assert [name for name in sorted(names) if not hasattr(source, name)] == [], node.module


def defined_in(tree):
    """The names at the top of a module: functions, classes, values and what it imports."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name) for alias in node.names}
    return found
