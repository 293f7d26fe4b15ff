"""Checks of single values that all configurations share, and their messages."""

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ..errors import ArgumentError, nearest

Problem = tuple[str, str]  # the field, and the message

_LONGEST = 10_000  # characters of a regular expression: making a matcher of one may take a millisecond for three


def why_no_expression(expression: Any) -> str | None:
    """Why a value is not a regular expression, or None if it is one."""
    if not isinstance(expression, str):
        return f"it is of type {type(expression).__name__}, not str"
    if len(expression) > _LONGEST:
        return f"it has more than {_LONGEST:,} characters"
    try:
        re.compile(expression)
    except (re.error, OverflowError) as error:
        return str(error)
    except RecursionError:
        return "it has too many levels of groups"
    return None


def is_one_of(value: Any, names: Collection[str]) -> bool:
    """Whether a value is one of these names."""
    return isinstance(value, str) and value in names


def expected_one_of(value: Any, names: Collection[str], or_none: bool = False) -> str:
    """The message for a value that is not one of these names, with the nearest name as a hint."""
    none = " or None" if or_none else ""
    return f"expected one of {', '.join(names)}{none}, got {value!r}{nearest(value, names)}"


def is_real(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, NaN and infinity included; a boolean is not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, finite and small enough for a float."""
    try:
        return is_real(value) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def numbers_as_floats(config: Any, *names: str) -> None:
    """Convert the numbers in these fields of a frozen dataclass to floats."""
    for name in names:
        if is_number(getattr(config, name)):
            object.__setattr__(config, name, float(getattr(config, name)))


def problems_of_fields(values: Any, config: type) -> list[Problem]:
    """Why these values are no mapping of fields of a dataclass: a problem for each other name, with the nearest one."""
    if not isinstance(values, Mapping):
        return [("", f"expected a mapping of fields, got {values!r}")]
    allowed = [field.name for field in dataclasses.fields(config)]
    return [(str(name), f"unknown field{nearest(name, allowed)}") for name in values if name not in allowed]


def as_path(directory: Any) -> Path:
    """A directory as a path. Raises ArgumentError for what is none."""
    if not isinstance(directory, (str, os.PathLike)):
        raise ArgumentError("directory", f"expected a path, got {directory!r}")
    return Path(directory)
