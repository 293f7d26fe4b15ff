"""Recipes: YAML -> checked objects. Nothing is loaded, downloaded or written here."""

import importlib.metadata
import importlib.util
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidationError,
)
from transformers import Seq2SeqTrainingArguments, TrainingArguments

from .config import PruningConfig
from .distillation import DistillationConfig
from .launch import check_launch, check_processes, deepspeed_precision, launched_processes, needs_cpu
from .messages import ProblemsError, nearest, nearest_beside, one_line
from .recipe_values import check_config, check_values, expectation
from .yaml_loader import DuplicateKeyError, Loader, lines_of_keys

_PACKAGE_SCHEME = "package:"


# Tasks whose Trainer takes more arguments, and which of those differ from their defaults.
_ARGUMENTS: dict[str, type[TrainingArguments]] = {"summarization": Seq2SeqTrainingArguments}
_DEFAULTS: dict[str, dict[str, Any]] = {"summarization": {"predict_with_generate": True}}


class RecipeError(ProblemsError):
    """What is wrong with a recipe: a line for each problem, with where, what was expected, and what came."""


@dataclass(frozen=True)
class Places:
    """Where the keys of a recipe stand: its file, and their lines in it, or None for those of the command line."""

    path: str
    lines: dict[tuple, int | None]

    def problem(self, key: tuple, message: str) -> str:
        """The line for one problem: where, the key, and what is wrong."""
        return f"{self._place(key)}{'.'.join(map(str, key))}: {message}"

    def _place(self, key: tuple) -> str:
        for length in range(len(key), 0, -1):
            if key[:length] in self.lines:
                line = self.lines[key[:length]]
                return f"{self.path}:{line}: " if line is not None else "command line: "
        return f"{self.path}: "


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelSection(_Section):
    """Which model to start from.

    `name` is a name on the Hub, a folder, or `package:NAME/PATH` for a folder inside an installed Python package;
    `gguf_file` is a file there to take weights and tokenizer from. Without a name, a new model is made of `config`, the
    fields of a configuration with its `model_type`, for the tokenizer that `tokenizer` names in the same way.
    `freeze` lists regular expressions, matched whole, for parameters that are not trained. `base_model` is what the
    model of a folder or package is called on the Hub, for the card.
    """

    name: str | None = None
    gguf_file: str | None = None
    config: dict[str, Any] | None = None
    tokenizer: str | None = None
    base_model: str | None = None
    freeze: list[str] = []


class DatasetSection(_Section):
    """Which data to train and evaluate on.

    `name` is a name on the Hub, a folder or file (CSV, JSON, Parquet, or `save_to_disk`), or `package:NAME/PATH`;
    `config` is the configuration of a data set on the Hub. `where` keeps the rows whose columns have the given values.
    Parts come from the data set's own splits (`validation_split`, `test_split`), or are cut from the training split
    (`validation_size`, `test_size` rows, shuffled with `split_seed`, repeated texts dropped first, so that the parts
    are disjoint). `max_length` is in tokens: where longer texts are cut, or for `text-generation` the length of the
    blocks that texts are packed into. Labels are for `text-classification`, where `group_by` is a column by whose
    values the test part is measured apart, too; summaries and `max_summary_length` for `summarization`.
    """

    name: str
    config: str | None = None
    where: dict[str, str | int] = {}
    text_column: str = "text"
    label_column: str = "label"
    summary_column: str | None = None
    group_by: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = None
    validation_size: PositiveInt | None = None
    test_size: PositiveInt | None = None
    split_seed: NonNegativeInt = 0
    max_train_samples: PositiveInt | None = None
    max_length: PositiveInt = 128
    max_summary_length: PositiveInt = 64


class GenerationSection(_Section):
    """What the dense and the pruned model write for the card, and how; in evaluations of `summarization`, too.

    `prompts` are texts of your own, and `samples` is how many of the test part are summarised. The other fields are
    those of `transformers.GenerationConfig`, and are saved with the model.
    """

    prompts: list[str] = []
    samples: NonNegativeInt = 3
    max_new_tokens: PositiveInt = 48
    num_beams: PositiveInt = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def options(self) -> dict[str, Any]:
        """The fields of a `GenerationConfig`."""
        options = self.model_dump(exclude={"prompts", "samples"})
        return options if self.do_sample else {**options, "temperature": None, "top_p": None}


class Recipe(_Section):
    """A whole run: fine-tune dense, then prune from there.

    `training` holds `TrainingArguments` of both runs; `dense` those that differ for the dense one, or null to prune
    from the start without a dense baseline. `pruning` is one `PruningConfig` or a list. `distillation`, if it is there,
    holds the fields of a `DistillationConfig`, and as `teacher` the model to distil from, named as `model.name` is:
    without one it is the model of the dense run. The first of `metrics` is the one that recovery is measured by.
    """

    task: Literal["text-classification", "text-generation", "summarization"]
    output_dir: str
    model: ModelSection
    dataset: DatasetSection
    generation: GenerationSection = GenerationSection()
    metrics: list[str] = Field(min_length=1)
    training: dict[str, Any]
    dense: dict[str, Any] | None = {}
    pruning: dict[str, Any] | Annotated[list[dict[str, Any]], Field(min_length=1)]
    distillation: dict[str, Any] | None = None
    _places: Places | None = PrivateAttr(default=None)

    def place(self, error: "RecipeError") -> "RecipeError":
        """The same error, each problem with the line of the file that its key stands in."""
        if self._places is None:
            return error
        split = [problem.partition(": ") for problem in error.problems]
        return RecipeError([self._places.problem(_as_key(key), message) for key, _, message in split])

    @property
    def pruning_configs(self) -> list[PruningConfig]:
        """The pruning configurations as objects."""
        sections = self.pruning if isinstance(self.pruning, list) else [self.pruning]
        return [PruningConfig.from_dict(section) for section in sections]

    @property
    def distillation_config(self) -> DistillationConfig | None:
        """How to distil, or None."""
        if self.distillation is None:
            return None
        return DistillationConfig.from_dict(
            {name: value for name, value in self.distillation.items() if name != "teacher"}
        )

    @property
    def teacher(self) -> str | None:
        """The model to distil from, by its name on the Hub or its path; None for that of the dense run."""
        name = (self.distillation or {}).get("teacher")
        return resolve_name("distillation.teacher", name) if name is not None else None

    def training_arguments(self, dense: bool = False, **changes: Any) -> TrainingArguments:
        """The arguments of the pruned run, or of the dense one, whose checkpoints and logs go into `dense/`.

        Where several processes were launched, each sample counts as it would for one process that takes their batches
        together, unless the recipe says otherwise. Raises LaunchError where they do not train together as was asked.
        """
        check_launch()
        own = {"output_dir": str(Path(self.output_dir, "dense"))} | (self.dense or {}) if dense else {}
        if dense:
            own |= {"push_to_hub": False, "hub_token": None}  # one repository holds one model, the pruned one
        first: dict[str, Any] = {"output_dir": self.output_dir}
        if launched_processes() > 1:
            # With True, the Trainer multiplies the loss by the number of processes, as if the model had divided it by
            # the items of all of them; models that classify sequences take that number and ignore it.
            first["average_tokens_across_devices"] = False
        first |= _DEFAULTS.get(self.task, {})
        precision = deepspeed_precision()
        if precision is not None and not {"bf16", "fp16"} & {*self.training, *own}:
            first[precision] = True
        values = first | self.training | own | changes
        if needs_cpu() or (values.get("bf16") and not torch.accelerator.is_available()):
            values["use_cpu"] = True  # without an accelerator, TrainingArguments takes bf16 only with it
        args = _arguments_of(self.task)(**values)
        check_processes(args)
        return args

    def argument_error(self, dense: bool, error: Exception) -> "RecipeError":
        """What TrainingArguments or a Trainer objected to, of the argument that it names."""
        section = "dense" if dense else "training"
        message = one_line(error)
        values = self.training | (self.dense or {} if dense else {})
        named = [name for name in values if name in message]
        name = max(named, key=len) if named else None
        if dense and name not in (self.dense or {}):
            section = "training"
        return RecipeError([f"{section}.{name}: {message}" if name else f"{section}: {message}"])


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and check it whole.

    `overrides` are `KEY=VALUE` with a dotted key, such as `pruning.sparsity=0.7`; the value is read as YAML.
    Raises RecipeError with a line for each unknown key, wrong type and value out of range.
    """
    path = Path(path)
    text = _read(path)
    try:
        content = yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(
            [f"{_line_of(path, error)}: expected YAML, got a file that does not parse: {error.problem}"]
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError([f"{path}: expected YAML, got a file that does not parse: {one_line(error)}"]) from error
    except DuplicateKeyError as error:
        raise RecipeError([f"{path}:{error.line}: {error.key}: expected once, got twice"]) from error
    if not isinstance(content, dict):
        raise RecipeError([f"{path}: expected a mapping of settings, got {type(content).__name__}"])
    lines = lines_of_keys(yaml.compose(text, Loader))
    replaced = any(override.startswith("distillation") for override in overrides)
    if "distillation" in content and content["distillation"] is None and not replaced:
        problem = Places(str(path), lines).problem(
            ("distillation",), "expected its settings, {} for the defaults, or no such line to train without, got none"
        )
        raise RecipeError([problem])
    for override in overrides:
        first_set, key = _apply_override(content, override)
        lines = {known: line for known, line in lines.items() if known[: len(first_set)] != first_set}
        lines |= {key[:length]: None for length in range(len(first_set), len(key) + 1)}
    places = Places(str(path), lines)

    problems = [places.problem(key, message) for key, message in _problems(content)]
    if problems:
        raise RecipeError(problems)
    recipe = Recipe(**content)
    recipe._places = places
    _check_model(recipe)
    _check_arguments(recipe)
    return recipe


def _line_of(path: Path, error: yaml.MarkedYAMLError) -> str:
    return f"{path}:{error.problem_mark.line + 1}" if error.problem_mark else str(path)


def parse_pruning(overrides: Sequence[str]) -> PruningConfig:
    """A pruning configuration from `KEY=VALUE` alone, such as `sparsity=0.7`; raises as `load_recipe` does.

    A key may be written as in a recipe, `pruning.sparsity=0.7`.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _apply_override(values, override.removeprefix("pruning."))
    places = Places("command line", {})
    problems = [places.problem(key, message) for key, message in check_config((), values, PruningConfig).items()]
    if problems:
        raise RecipeError(problems)
    return PruningConfig.from_dict(values)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        siblings = [str(file) for file in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        found = "a folder" if path.is_dir() else "nothing" if _is_missing(error) else f"an error: {error.strerror}"
        raise RecipeError([f"{path}: expected a recipe, found {found}{nearest(str(path), siblings)}"]) from error
    except UnicodeDecodeError as error:
        raise RecipeError([f"{path}: expected YAML in UTF-8, got other bytes ({error})"]) from error


def _is_missing(error: OSError) -> bool:
    return isinstance(error, (FileNotFoundError, NotADirectoryError))


def _as_key(name: str) -> tuple:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _apply_override(content: dict, override: str) -> tuple[tuple, tuple]:
    """Set one `KEY=VALUE` in the content: the outermost key that was set (a parent, where it made one), and the key."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise RecipeError([f"command line: expected KEY=VALUE such as pruning.sparsity=0.7, got {override!r}"])
    try:
        value = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError([f"command line: {name}: expected a YAML value, got {text!r}"]) from error
    key = first_set = _as_key(name)
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
            raise RecipeError([f"command line: {name}: expected a key of the recipe, got one that leads nowhere"])
    if isinstance(target, list) and not (isinstance(key[-1], int) and key[-1] < len(target)):
        raise RecipeError([f"command line: {name}: expected an index below {len(target)}, got {key[-1]!r}"])
    target[key[-1]] = value
    return first_set, key


def _problems(content: dict) -> list[tuple[tuple, str]]:
    """All that is wrong with the content, as (key, message)."""
    problems: dict[tuple, str] = {}
    try:
        Recipe.model_validate(content)
    except ValidationError as error:
        problems.update(_explain(error, content))
    for section in ("training", "dense"):
        values = content.get(section)
        if isinstance(values, dict):
            problems.update(check_values((section,), values, _arguments_of(content.get("task"))))
    pruning = content.get("pruning")
    sections = enumerate(pruning) if isinstance(pruning, list) else [(None, pruning)]
    for index, values in sections:
        if isinstance(values, dict):
            key = ("pruning",) if index is None else ("pruning", index)
            problems.update(check_config(key, values, PruningConfig))
    problems.update(_check_distillation(content))
    problems.update(_check_metrics(content))
    inner = {key[:length] for key in problems for length in range(len(key))}
    return [(key, message) for key, message in problems.items() if key not in inner]


# The metrics that come with hf-prune, by the task whose answers they compare; others are loaded by their names.
_METRICS = {"text-classification": ("accuracy", "f1"), "text-generation": ("perplexity",), "summarization": ("rouge",)}


def _check_metrics(content: dict) -> dict[tuple, str]:
    """Metrics of another task, and any but perplexity for text generation."""
    task, metrics = content.get("task"), content.get("metrics")
    if not isinstance(task, str) or task not in _METRICS or not isinstance(metrics, list):
        return {}
    others = {name for names in _METRICS.values() for name in names}.difference(_METRICS[task])
    foreign = [name for name in metrics if isinstance(name, str) and name in others]
    if not foreign and (task != "text-generation" or metrics == ["perplexity"]):
        return {}
    return {("metrics",): f"expected [{', '.join(_METRICS[task])}] for {task}, got {metrics}"}


def _check_distillation(content: dict) -> dict[tuple, str]:
    section = content.get("distillation")
    if not isinstance(section, dict):
        return {}
    teacher = section.get("teacher")
    fields = {name: value for name, value in section.items() if name != "teacher"}
    problems = check_config(("distillation",), fields, DistillationConfig)
    section.update(fields)  # in their converted form
    if teacher is not None and (not isinstance(teacher, str) or not teacher):
        problems[("distillation", "teacher")] = f"expected the name of a model or its folder, got {teacher!r}"
    if teacher is None and "dense" in content and content["dense"] is None:
        problems[("distillation", "teacher")] = "expected a model to distil from where there is no dense run, got none"
    return problems


def _arguments_of(task: Any) -> type[TrainingArguments]:
    """The class of a task's training arguments."""
    return _ARGUMENTS.get(task, TrainingArguments) if isinstance(task, str) else TrainingArguments


def _explain(error: ValidationError, content: Any) -> dict[tuple, str]:
    """pydantic's errors in our words, those of one key put together."""
    entries: dict[tuple, list[Any]] = {}
    for entry in error.errors():
        entries.setdefault(_key_in(content, entry), []).append(entry)
    problems = {}
    for key, found in entries.items():
        if found[0]["type"] == "extra_forbidden":
            problems[key] = f"unknown key{nearest(str(key[-1]), _fields_at(key[:-1]))}"
        elif found[0]["type"] == "missing":
            problems[key] = "expected a value, got none"
        else:
            problems[key] = f"{expectation(found)}, got {found[-1]['input']!r}"
    return problems


def _key_in(content: Any, entry: Any) -> tuple:
    """Where an error is, without the names that pydantic gives to the branches of a union."""
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
        model = typing.cast(type[BaseModel], model.model_fields[part].annotation)
    return list(model.model_fields)


def _check_model(recipe: Recipe) -> None:
    """A model is named, or made of a configuration for a tokenizer."""
    model = recipe.model
    problems = []
    if (model.name is None) == (model.config is None):
        came = "neither" if model.name is None else "both"
        problems.append(f"model.name: expected either a name or a config, got {came}")
    elif model.config is not None and (model.tokenizer is None or "model_type" not in model.config):
        problems.append("model.config: expected its model_type, and a tokenizer beside it, to make a new model")
    if model.config is not None and model.gguf_file is not None:
        problems.append(f"model.gguf_file: expected none beside a config, got {model.gguf_file!r}")
    if problems:
        raise recipe.place(RecipeError(problems))


def _check_arguments(recipe: Recipe) -> None:
    """Let TrainingArguments itself object to values of the right type."""
    for dense in (False, True):
        try:
            recipe.training_arguments(dense)
        except (ValueError, ImportError, TypeError, OSError) as error:
            raise recipe.place(recipe.argument_error(dense, error)) from error


def resolve_name(key: str, name: str) -> str:
    """A name as recipes give it -> a Hub name or an existing path; `package:NAME/PATH` lies in an installed package.

    Raises RecipeError, naming `key`, for a package that is not installed or a path that is not there.
    """
    if name.startswith(_PACKAGE_SCHEME):
        return str(_path_in_package(key, name))
    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(path.suffix in _DATA_FILES)
    if looks_like_path and not path.exists():
        raise RecipeError([f"{key}: expected a file or folder, found nothing at {name!r}{nearest_beside(path)}"])
    return str(path) if path.exists() else name


def _path_in_package(key: str, name: str) -> Path:
    package, _, inside = name.removeprefix(_PACKAGE_SCHEME).partition("/")
    if not all(part.isidentifier() for part in package.split(".")):
        raise RecipeError([f"{key}: expected package:NAME/PATH with the name of a Python package, got {name!r}"])
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that this one is part of
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.partition(".")[0].replace("_", "-")
        raise RecipeError(
            [f"{key}: expected the Python package {package!r} ({name}), found none installed; pip install {pip_name}"]
        )
    path = Path(spec.submodule_search_locations[0], inside)
    if not path.exists():
        hint = nearest_beside(path)
        raise RecipeError([f"{key}: expected {inside!r} in the package {package!r}, found nothing{hint}"])
    return path


def package_version(package: str) -> str | None:
    """The version of the distribution that an importable package came with, or None if that is not known."""
    names = importlib.metadata.packages_distributions().get(package.partition(".")[0], [])
    return importlib.metadata.version(names[0]) if names else None


_DATA_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def data_format(path: str) -> str | None:
    """The `datasets` builder for a file, by its ending; None if it is none of the known ones."""
    return _DATA_FILES.get(Path(path).suffix)
