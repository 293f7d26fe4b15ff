"""Reading recipes: YAML -> validated objects. Models and data are not loaded here."""

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ..config.calibration import CalibrationConfig, check_quality, highest_sparsity
from ..config.distillation import DistillationConfig
from ..config.pruning import PruningConfig
from ..errors import PruningConfigError, RecipeError, nearest, shown
from .schema import COMMAND_LINE, Places, Recipe, arguments_of, as_key, trains_not
from .values import check_config, check_values, expectation
from .yaml12 import parse, read_recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe.

    `overrides` are `KEY=VALUE` with a dotted key, such as `pruning.sparsity=0.7`; the value is read as YAML, that of
    `KEY=@FILE` from a file.
    Raises RecipeError with a line for each unknown key, wrong type and value out of range.
    """
    path = Path(path)
    content, lines, repeated = read_recipe(path)
    if repeated:
        raise Places(str(path), lines).error([(repeated[0], "is set more than once; keep one")])
    for section, otherwise in _OPTIONAL.items():
        replaced = any(override.startswith(section) for override in overrides)
        if section in content and content[section] is None and not replaced:
            problem = f"has no value; set {{}} for the defaults, or remove the line to {otherwise}"
            raise Places(str(path), lines).error([((section,), problem)])
    for override in overrides:
        first_set, key = _apply_override(content, override)
        lines = {known: line for known, line in lines.items() if known[: len(first_set)] != first_set}
        lines |= {key[:length]: None for length in range(len(first_set), len(key) + 1)}
    places = Places(str(path), lines)

    problems = _problems(content)
    if problems:
        raise places.error(problems)
    recipe = Recipe(**content)
    recipe._places = places
    _check_model(recipe)
    _check_arguments(recipe)
    return recipe


# Sections that a recipe may leave out, and what it does without them.
_OPTIONAL = {
    "distillation": "train without distillation",
    "calibration": "prune while the model is trained",
    "explain": "leave the model unexplained",
}


def parse_pruning(overrides: Sequence[str]) -> PruningConfig:
    """A pruning configuration from `KEY=VALUE` alone, such as `sparsity=0.7`; raises as `load_recipe` does.

    A key may be written as in a recipe, `pruning.sparsity=0.7`.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _apply_override(values, override.removeprefix("pruning."))
    problems = check_config((), values, PruningConfig)
    if problems:
        raise Places(COMMAND_LINE, {}).error(problems.items())
    return PruningConfig.from_dict(values)


def parse_configs(overrides: Sequence[str]) -> list[PruningConfig]:
    """One configuration as `parse_pruning` reads it, no key of which is set twice, or several as a list.

    The list is that of a recipe: `pruning=[{structure: neurons, sparsity: 0.5}, {structure: layers, sparsity: 0.5}]`.
    """
    names = [override.removeprefix("pruning.").partition("=")[0] for override in overrides]
    if "pruning" not in names:
        for name in names:
            if names.count(name) > 1:
                problem = "is set more than once; several configurations are pruning=[{...}, {...}]"
                raise RecipeError(name, problem, at=COMMAND_LINE)
        return [parse_pruning(overrides)]
    if len(names) > 1:
        raise RecipeError("pruning", "must be the only setting", at=COMMAND_LINE)
    content: dict[str, Any] = {}
    _apply_override(content, overrides[0])
    several = content["pruning"]
    if not isinstance(several, list) or not several or not all(isinstance(one, dict) for one in several):
        raise RecipeError("pruning", f"expected a list of mappings, got {several!r}", at=COMMAND_LINE)
    problems: dict[tuple, str] = {}
    for index, one in enumerate(several):
        problems |= check_config(("pruning", index), one, PruningConfig)
    if problems:
        raise Places(COMMAND_LINE, {}).error(problems.items())
    return [PruningConfig.from_dict(one) for one in several]


def parse_rows(overrides: Sequence[str]) -> dict[str, Any]:
    """The rows of a data set from `COLUMN=VALUE`; raises RecipeError for anything else."""
    values: dict[str, Any] = {}
    for override in overrides:
        _apply_override(values, override)
    return values


def _apply_override(content: dict, override: str) -> tuple[tuple, tuple]:
    """Set one `KEY=VALUE`, or `KEY=@FILE`, in the content.

    Returns the outermost key that was set (a parent, if new), and the key.
    """
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError(f"expected KEY=VALUE such as pruning.sparsity=0.7, got {override!r}", at=COMMAND_LINE)
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                name, f"expected @FILE, a file of a YAML or JSON value, got {text!r}", at=COMMAND_LINE
            ) from error
    try:
        value, _, repeated = parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(name, f"expected a YAML value, got {text!r}", at=COMMAND_LINE) from error
    if repeated:
        raise RecipeError(f"{name}.{'.'.join(map(str, repeated[0]))}", "is set more than once", at=COMMAND_LINE)
    key = first_set = as_key(name)
    target: Any = content
    for depth, part in enumerate(key[:-1], start=1):
        if isinstance(target, list) and isinstance(part, int) and part < len(target):
            target = target[part]
        elif isinstance(target, dict):
            if not isinstance(target.get(part), (dict, list)):
                target[part] = {}
                first_set = min(first_set, key[:depth], key=len)
            target = target[part]
        else:
            raise RecipeError(name, "the recipe has no such key", at=COMMAND_LINE)
    if isinstance(target, list) and not (isinstance(key[-1], int) and key[-1] < len(target)):
        raise RecipeError(name, f"expected a list index below {len(target)}, got {key[-1]!r}", at=COMMAND_LINE)
    target[key[-1]] = value
    return first_set, key


def _problems(content: dict) -> list[tuple[tuple, str]]:
    """All problems of the content, as (key, message)."""
    problems: dict[tuple, str] = {}
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        problems.update(_explain(error, content))
    for section in ("training", "dense"):
        values = content.get(section)
        if isinstance(values, dict):
            may_not = section == "training" and content.get("calibration") is not None
            problems.update(check_values((section,), values, arguments_of(content.get("task")), may_not))
    pruning = content.get("pruning")
    sections = enumerate(pruning) if isinstance(pruning, list) else [(None, pruning)]
    for index, values in sections:
        if isinstance(values, dict):
            key = ("pruning",) if index is None else ("pruning", index)
            problems.update(check_config(key, values, PruningConfig))
    problems.update(_check_calibration(content))
    problems.update(_check_distillation(content))
    problems.update(_check_explain(content))
    problems.update(_check_metrics(content) or _check_best_model(content))
    inner = {key[:length] for key in problems for length in range(len(key))}
    return [(key, message) for key, message in problems.items() if key not in inner]


# The metrics that come with hf-prune, by task; others are loaded by their names.
_METRICS = {"text-classification": ("accuracy", "f1"), "text-generation": ("perplexity",), "summarization": ("rouge",)}


def _check_metrics(content: dict) -> dict[tuple, str]:
    """Problems with metrics: those of another task, and any but perplexity for text generation."""
    task, metrics = content.get("task"), content.get("metrics")
    if not isinstance(task, str) or task not in _METRICS or not isinstance(metrics, list):
        return {}
    others = {name for names in _METRICS.values() for name in names}.difference(_METRICS[task])
    foreign = [name for name in metrics if isinstance(name, str) and name in others]
    if not foreign and (task != "text-generation" or metrics == ["perplexity"]):
        return {}
    return {("metrics",): f"expected [{', '.join(_METRICS[task])}] for {task}, got {metrics}"}


# What evaluations have for each metric, beside the loss.
_NAMES = {"accuracy": ("accuracy",), "f1": ("f1",), "perplexity": (), "rouge": ("rouge1", "rouge2", "rougeL")}

_TIMES = ("runtime", "samples_per_second", "steps_per_second")


def _check_best_model(content: dict) -> dict[tuple, str]:
    """Problems with what chooses the best model, where it is known which values evaluations will have."""
    metrics = content.get("metrics")
    if not isinstance(metrics, list) or not all(isinstance(name, str) and name in _NAMES for name in metrics):
        return {}
    names = ["loss", *(name for metric in metrics for name in _NAMES[metric])]
    problems = {}
    for section in ("training", "dense"):
        values = content.get(section)
        chosen = values.get("metric_for_best_model") if isinstance(values, dict) else None
        if isinstance(chosen, str) and chosen.removeprefix("eval_") not in (*names, *_TIMES):
            expected = f"expected one of {', '.join(names)}" if len(names) > 1 else f"expected {names[0]}"
            problems[section, "metric_for_best_model"] = f"{expected}, which evaluations have, got {chosen!r}"
    return problems


def _check_calibration(content: dict) -> dict[tuple, str]:
    section, training, dense = (content.get(name) for name in ("calibration", "training", "dense"))
    if not isinstance(section, dict):
        return {}
    fields = {name: value for name, value in section.items() if name != "target_quality"}
    problems = check_config(("calibration",), fields, CalibrationConfig)
    if section.get("target_quality") is not None:
        problems |= _check_quality(section["target_quality"], content.get("pruning"))
    section.update(fields)  # in their converted form
    if isinstance(content.get("pruning"), list):
        problems["pruning",] = "expected one configuration, as the model is pruned at once (calibration), got a list"
    if content.get("task") != "text-generation" and "length" in section:
        came = section["length"]
        problems["calibration", "length"] = (
            f"must not be set for {content.get('task')}, whose samples are as long as in training "
            f"(dataset.max_length); got {came!r}"
        )
    if not isinstance(training, dict) or not trains_not(training):
        return problems
    own = dense if isinstance(dense, dict) else {}
    if "dense" not in content or (isinstance(dense, dict) and own.keys().isdisjoint(("max_steps", "num_train_epochs"))):
        problems["dense",] = (
            "expected null, or max_steps or num_train_epochs of its own, as the training arguments say that nothing "
            f"is trained after pruning; got {dense or {}}"
        )
    if content.get("distillation") is not None:
        problems["distillation",] = "must not be set, as nothing is trained after pruning"
    return problems


def _check_quality(target: Any, pruning: Any) -> dict[tuple, str]:
    """Problems with a search for a sparsity: a target that is no share, or a pattern that has one sparsity."""
    problems: dict[tuple, str] = {}
    try:
        check_quality(target)
    except PruningConfigError as error:
        problems["calibration", "target_quality"] = error.problems[0][1]
    try:
        config = PruningConfig.from_dict(pruning) if isinstance(pruning, dict) else None
        if config is not None:
            highest_sparsity(config)
    except PruningConfigError as error:  # what is wrong with the section itself has been said
        problems["pruning", error.problems[0][0]] = error.problems[0][1]
    return problems


def _check_distillation(content: dict) -> dict[tuple, str]:
    section = content.get("distillation")
    if not isinstance(section, dict):
        return {}
    teacher = section.get("teacher")
    fields = {name: value for name, value in section.items() if name != "teacher"}
    problems = check_config(("distillation",), fields, DistillationConfig)
    section.update(fields)  # in their converted form
    if teacher is not None and (not isinstance(teacher, str) or not teacher):
        problems[("distillation", "teacher")] = f"expected a model name or folder, got {teacher!r}"
    if teacher is None and "dense" in content and content["dense"] is None and content.get("calibration") is None:
        problems[("distillation", "teacher")] = "must be set, as there is no dense run to distil from"
    return problems


def _check_explain(content: dict) -> dict[tuple, str]:
    section, task = content.get("explain"), content.get("task")
    if not isinstance(section, dict):
        return {}
    problems: dict[tuple, str] = {}
    if task == "summarization":
        problems["explain",] = "must not be set for summarization; expected text-classification or text-generation"
    expressions = section.get("expressions")
    for name, expression in expressions.items() if isinstance(expressions, dict) else ():
        why = why_no_slice(name, expression)
        if why is not None:
            problems["explain", "expressions", name] = why
    return problems


def why_no_slice(name: Any, expression: Any) -> str | None:
    """Why a name and a regular expression give no slice of texts, or None."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        return f"expected a name, got {name!r}"
    if not isinstance(expression, str):
        return f"expected a regular expression, got {expression!r}"
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        return f"{shown(expression)} is not a regular expression: {error}"
    return None


def _explain(error: ValidationError, content: Any) -> dict[tuple, str]:
    """pydantic's errors as our messages, one for each key."""
    entries: dict[tuple, list[Any]] = {}
    for entry in error.errors():
        entries.setdefault(_key_in(content, entry), []).append(entry)
    problems = {}
    for key, found in entries.items():
        if found[0]["type"] == "extra_forbidden":
            problems[key] = f"unknown key{nearest(str(key[-1]), _fields_at(key[:-1]))}"
        elif found[0]["type"] == "missing":
            problems[key] = "is required, but missing"
        else:
            problems[key] = f"{expectation(found)}, got {found[-1]['input']!r}"
    return problems


def _key_in(content: Any, entry: Any) -> tuple:
    """The key of an error, without the names that pydantic gives to the branches of a union."""
    key: list[Any] = []
    for part in entry["loc"]:
        if isinstance(content, dict) and (part in content or entry["type"] == "missing"):
            key.append(part)
            content = content.get(part)
        elif isinstance(content, list) and isinstance(part, int):
            key.append(part)
            content = content[part]
    return tuple(key)


def _fields_at(key: tuple) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in key:
        annotation = model.model_fields[part].annotation
        model = next(one for one in (annotation, *typing.get_args(annotation)) if hasattr(one, "model_fields"))
    return list(model.model_fields)


def _check_model(recipe: Recipe) -> None:
    """Raise RecipeError unless the model has either a name, or a configuration and a tokenizer."""
    model = recipe.model
    problems = []
    if (model.name is None) == (model.config is None):
        came = "neither" if model.name is None else "both"
        problems.append(("model.name", f"set name or config, but not both; got {came}"))
    elif model.config is not None and (model.tokenizer is None or "model_type" not in model.config):
        problems.append(("model.config", "must have a model_type, and model.tokenizer must be set, for a new model"))
    if model.config is not None and model.gguf_file is not None:
        problems.append(("model.gguf_file", f"must not be set with a config, got {model.gguf_file!r}"))
    if problems:
        raise recipe.place(RecipeError(problems=problems))


def _check_arguments(recipe: Recipe) -> None:
    """Raise RecipeError for what TrainingArguments itself refuses."""
    for dense in (False, True):
        try:
            recipe.training_arguments(dense)
        except (ValueError, ImportError, TypeError, OSError) as error:
            raise recipe.place(recipe.argument_error(dense, error)) from error
