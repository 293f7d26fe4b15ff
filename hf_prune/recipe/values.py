"""Checks of the values in a recipe: the types and ranges of the dataclass fields that they set."""

import dataclasses
import enum
import math
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from ..config.calibration import CalibrationConfig
from ..config.checks import expected_one_of
from ..config.distillation import DistillationConfig
from ..config.pruning import PruningConfig
from ..errors import HfPruneError, nearest

_OUR_ARGUMENTS = ("output_dir",)

_NOT_USED = ("resume_from_checkpoint",)


def check_values(key: tuple, values: dict, fields_of: type, may_not_train: bool = False) -> dict[tuple, str]:
    """Unknown names, wrong types and values out of range in a section; valid values are converted in place.

    With `may_not_train`, training arguments may have no steps and no epochs.
    """
    fields = {field.name: field for field in dataclasses.fields(fields_of) if field.init}
    types = typing.get_type_hints(fields_of)
    problems = {}
    for name, value in values.items():
        if name in _OUR_ARGUMENTS:
            problems[(*key, name)] = f"must be set at the top level of the recipe, as {name}"
        elif name in _NOT_USED:
            problems[(*key, name)] = f"must not be set: a recipe always trains from the beginning, got {value!r}"
        elif name not in fields:
            problems[(*key, name)] = f"unknown key{nearest(name, fields)}"
        else:
            message, values[name] = _converted(types[name], value, fields[name].metadata.get("choices") or ())
            expected = _out_of_range(name, values[name]) if issubclass(fields_of, TrainingArguments) else None
            if may_not_train and name in _TIMES and values[name] == 0:
                expected = None
            if message is None and expected is not None:
                message = f"expected {expected}, got {value!r}"
            if message is not None:
                problems[(*key, name)] = message
    return problems


# Ranges of valid values that TrainingArguments itself does not check.
_AT_LEAST_ONE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")

_NOT_NEGATIVE = (
    "dataloader_num_workers",
    "eval_steps",
    "label_smoothing_factor",
    "learning_rate",
    "logging_steps",
    "max_grad_norm",
    "save_steps",
    "warmup_steps",
    "weight_decay",
)

_TIMES = ("max_steps", "num_train_epochs")

_SEEDS = ("seed", "data_seed")  # of NumPy: 32 bits


def _out_of_range(name: str, value: Any) -> str | None:
    """What is expected of a value of TrainingArguments that is out of range, or None if it is not."""
    if name == "deepspeed" and isinstance(value, str) and not Path(value).is_file():
        return "a file with a DeepSpeed configuration"  # transformers would keep one half made
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not math.isfinite(value):
        return "a finite number"
    if name in _AT_LEAST_ONE and value < 1:
        return "1 or more"
    if name in _NOT_NEGATIVE and value < 0:
        return "0 or more"
    if name == "num_train_epochs" and value <= 0:
        return "more than 0"
    if name == "max_steps" and value < 1 and value != -1:
        return "1 or more, or -1 to use num_train_epochs"
    if name in _SEEDS and not 0 <= value < 2**32:
        return "0 to 4294967295"
    return None


def _converted(expected: Any, value: Any, choices: Sequence[str]) -> tuple[str | None, Any]:
    """The problem with a value for a field of this type, or None; and the value as converted for the field.

    `choices` are those of the field, if its type does not list them.
    """
    adapter = TypeAdapter(expected, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        # A string may be a number or a choice; a boolean is not a number.
        converted = adapter.validate_python(value, strict=not isinstance(value, str))
    except ValidationError as error:
        return f"{expectation(error.errors())}, got {value!r}", value
    choices = [*choices, *(str(option.value) for part in typing.get_args(expected) for option in _options(part))]
    if choices and isinstance(value, str) and value not in choices:
        return expected_one_of(value, choices), value
    return None, converted


def _options(part: Any) -> list[enum.Enum]:
    return list(part) if isinstance(part, type) and issubclass(part, enum.Enum) else []


def check_config(
    key: tuple, values: dict, config: type[PruningConfig] | type[DistillationConfig] | type[CalibrationConfig]
) -> dict[tuple, str]:
    """The problems of a section that holds the fields of a configuration, by key."""
    problems = check_values(key, values, config)
    if problems:
        return problems
    try:
        config.from_dict(values)
    except HfPruneError as error:
        return {(*key, name): message for name, message in error.problems}
    return {}


def expectation(entries: Sequence[Any]) -> str:
    """`expected a valid integer or null` of several pydantic errors."""
    wanted: dict[str, None] = {}
    for entry in entries:
        if entry["type"] == "literal_error":
            wanted[entry["ctx"]["expected"]] = None
            continue
        if entry["type"] == "too_short":
            wanted["a list of one or more entries"] = None
            continue
        words = entry["msg"].removeprefix("Input should be ").partition(",")[0]
        wanted[words.partition(" or instance of ")[0].replace("a valid dictionary", "a mapping")] = None
    return f"expected {' or '.join(wanted)}"
