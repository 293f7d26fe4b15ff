"""One family of errors: which there are, what they carry, and how the commands tell them."""

import ast
import inspect
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import typer
from models import bert

import hf_prune
from hf_prune import (
    DistillationConfig,
    Pruner,
    PruningCallback,
    PruningConfig,
    errors,
    load_masks,
    merge,
)
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
    ("packed.files", "ValueError"),  # the same file, with its path
    ("saved.masks", "ValueError"),  # the same file, with its path
    ("saved.pruning_state", "ValueError"),
    ("saved.removed", "ValueError"),  # the same file, with its path
    ("structure.chosen", "ValueError"),
    ("structure.record", "ValueError"),
    ("structure.skipping", "ValueError"),  # whoever tries a model without some layers
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
        and any(re.search("(Error|(?<!Base)Exception)$", ast.unparse(base)) for base in node.bases)
    }  # a BaseException, which ends a thread, is none
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
    with pytest.raises(typer.Exit) as ended, commands.errors_as_lines():
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


def wrong_arguments(folder):
    """Calls with arguments of a wrong kind, and the one line that each ends in."""
    config, model = PruningConfig(sparsity=0.5), bert()
    model_words = "model: expected a model (torch.nn.Module), got"
    configs_words = "config: expected a PruningConfig or a list of them, got"
    steps_words = "total_steps: expected the number of optimizer steps of the training, 1 or more, got"
    path_words = "directory: expected a path, got None"
    yield lambda: Pruner("x", config), f"{model_words} str"
    yield lambda: Pruner(None, config, 10), f"{model_words} NoneType"
    yield lambda: Pruner(model, config).start(10, {}), f"{model_words} dict"
    yield lambda: load_masks("x", folder), f"{model_words} str"
    yield lambda: load_masks(model, None), path_words
    for wrong in (None, 5, "0.5", [], {"sparsity": 0.5}, [config, None]):
        yield lambda wrong=wrong: Pruner(model, wrong), f"{configs_words} {wrong!r}"
        yield lambda wrong=wrong: PruningCallback(wrong), f"{configs_words} {wrong!r}"
    for wrong in ("10", 2.5, 0, -1, True):
        yield lambda wrong=wrong: Pruner(model, config, wrong), f"{steps_words} {wrong!r}"
        yield lambda wrong=wrong: Pruner(model, config).plan(wrong), f"{steps_words} {wrong!r}"
        yield lambda wrong=wrong: Pruner(model, config).resume(wrong, folder), f"{steps_words} {wrong!r}"
    yield lambda: Pruner(model, config).start(None), f"{steps_words} None"
    yield lambda: Pruner(model, config).plan(), f"{steps_words} None"
    yield lambda: Pruner(model, config, 10).save(None), path_words
    yield lambda: Pruner(model, config, 10).load(None), path_words
    yield lambda: PruningConfig.from_pretrained(None), path_words
    yield lambda: config.save_pretrained(None), path_words
    for read in (PruningConfig.from_dict, DistillationConfig.from_dict):
        for wrong in (None, [1], "abc", 3):
            yield lambda read=read, wrong=wrong: read(wrong), f"expected a mapping of fields, got {wrong!r}"
        yield lambda read=read: read({1: 2}), "1: unknown field"
    yield (
        lambda: merge("x"),
        "expected a model with PEFT adapters that change weights, such as LoRA, got str; adapters of other kinds "
        "cannot be merged",
    )


def test_arguments_of_a_wrong_kind_are_one_line_of_the_family(tmp_path):
    cases = list(wrong_arguments(tmp_path))
    assert len(cases) > 30
    for call, line in cases:
        with pytest.raises(HfPruneError) as caught:
            call()
        assert str(caught.value) == line


def test_a_number_of_steps_of_numpy_is_a_number_of_steps():
    pruner = Pruner(bert(), PruningConfig(sparsity=0.5), np.int64(10))
    assert type(pruner.total_steps) is int


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("one\ntwo", "one"),
        ("Class validation error for 'check':\n    the width 18 is no multiple of 4\nmore", None),
        ("ends in a colon:", "ends in a colon:"),
        ("", "ValueError"),
    ],
)
def test_the_first_line_of_an_error_has_the_reason(text, told):
    expected = told or "Class validation error for 'check': the width 18 is no multiple of 4"
    assert errors.first_line(ValueError(text)) == expected
