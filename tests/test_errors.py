"""One family of errors: which there are, what they carry, and how the commands tell them."""

import ast
import inspect
import pickle
from pathlib import Path

import pytest
import typer

import hf_prune
from hf_prune import errors
from hf_prune.cli import commands
from hf_prune.errors import HfPruneError, PruningConfigError, PushError, RecipeError

PACKAGE = Path(hf_prune.__file__).parent
CLASSES = [found for _, found in inspect.getmembers(errors, inspect.isclass) if issubclass(found, BaseException)]

# Raised for the caller in the package, which catches them: nobody else meets them.
CAUGHT = {
    ("config.safe_json", "ValueError"),  # whoever reads the file, with its path
    ("methods.patterns", "ValueError"),  # PruningConfig says so of its field
    ("publish.record", "ValueError"),  # pydantic, and load_record
    ("recipe.data", "ValueError"),  # load_data
    ("model.limits", "ValueError"),  # build_skeleton says so in a note
    ("saved.masks", "ValueError"),  # the same file, with its path
    ("saved.pruning_state", "ValueError"),
    ("trainer.claims", "FileNotFoundError"),  # the same file, which tries again
    ("recipe.metrics", "ImportError"),  # the task that wants the metric
}


def sources():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))


def test_every_error_is_of_the_family():
    assert len(CLASSES) > 10
    assert all(issubclass(found, HfPruneError) for found in CLASSES)
    assert all(found.__mro__[2] in (ValueError, RuntimeError, TypeError) for found in CLASSES if found != HfPruneError)


def test_every_error_is_in_one_file():
    elsewhere = {
        f"{module}.{node.name}"
        for module, tree in sources()
        if module != "errors"
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and any(ast.unparse(base).endswith(("Error", "Exception")) for base in node.bases)
    }
    assert not elsewhere


def test_what_is_raised_is_of_the_family():
    names = {found.__name__ for found in CLASSES}
    raised = {
        (module, node.exc.func.id)
        for module, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name)
    }
    others = {(module, name) for module, name in raised if name not in names and name.endswith("Error")}
    ours = {(module, name) for module, name in others if name in ("AssertionError", "AttributeError")}  # of programs
    assert others - ours == CAUGHT


def test_no_class_of_the_family_is_never_raised():
    everything = "\n".join(ast.unparse(tree) for module, tree in sources() if module != "errors")
    assert [found.__name__ for found in CLASSES if f"{found.__name__}(" not in everything] == ["HfPruneError"]


@pytest.mark.parametrize("family", CLASSES)
def test_an_error_carries_keys_and_messages_and_is_a_line_a_problem(family):
    alone, keyed = family("it is broken"), family("sparsity", "expected 0 <= s < 1, got 2")
    several = family(problems=[("begin", "too late"), ("", "nothing fits")], at=["a.yaml:3", ""])
    assert (alone.problems, str(alone)) == ([("", "it is broken")], "it is broken")
    assert (keyed.problems, str(keyed)) == (
        [("sparsity", "expected 0 <= s < 1, got 2")],
        "sparsity: expected 0 <= s < 1, got 2",
    )
    assert str(several) == "a.yaml:3: begin: too late\nnothing fits"
    assert several.problems_under("pruning") == [("pruning.begin", "too late"), ("pruning", "nothing fits")]
    assert str(family("name", "unknown", at="command line")) == "command line: name: unknown"
    for error in (alone, keyed, several):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.problems, again.places, str(again)) == (
            family,
            error.problems,
            error.places,
            str(error),
        )


def test_an_error_has_a_key_and_a_message_or_a_message():
    with pytest.raises(ValueError, match="unpack"):
        HfPruneError("one", "two", "three")


@pytest.mark.parametrize("family", CLASSES)
def test_the_commands_tell_every_error_in_lines_and_end_with_its_code(family, capsys):
    with pytest.raises(typer.Exit) as ended, commands._errors_as_lines():
        raise family(problems=[("begin", "too late"), ("", "nothing fits")])
    assert ended.value.exit_code == (1 if issubclass(family, PushError) else 2)
    assert capsys.readouterr().err == "hf-prune: begin: too late\nhf-prune: nothing fits\n"


def test_a_recipe_error_is_one_of_values_and_of_the_family():
    for kind in (ValueError, HfPruneError, RecipeError):
        with pytest.raises(kind):
            raise RecipeError("task", "expected one of two, got a third")


def test_what_is_wrong_with_a_saved_configuration_keeps_its_fields(tmp_path):
    path = tmp_path / "pruning_config.json"
    path.write_text('{"format_version": 1, "configs": [{"sparsity": 2, "method": "magnitud"}]}', encoding="utf-8")
    with pytest.raises(PruningConfigError) as caught:
        hf_prune.load_configs(tmp_path)
    assert [field for field, _ in caught.value.problems] == ["method", "sparsity"]
    assert caught.value.places == [str(path)] * 2
