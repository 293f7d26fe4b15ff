"""Checks of single values that all configurations share, and the words for what is wrong with them."""

import dataclasses
import math
import numbers
import re
from collections.abc import Collection, Iterable
from typing import Any, TypeGuard

from ..errors import nearest

Problem = tuple[str, str]  # the field, and what was expected and what came


def why_no_expression(expression: Any) -> str | None:
    """Why a value is not a regular expression, or None if it is one."""
    if not isinstance(expression, str):
        return f"it is {type(expression).__name__}, not text"
    try:
        re.compile(expression)
    except re.error as error:
        return str(error)
    return None


def is_one_of(value: Any, names: Collection[str]) -> bool:
    """Whether a value is one of these names."""
    return isinstance(value, str) and value in names


def expected_one_of(value: Any, names: Collection[str], or_none: bool = False) -> str:
    """The message for a value that is none of these names, with the nearest of them."""
    none = " or None" if or_none else ""
    return f"expected one of {', '.join(names)}{none}, got {value!r}{nearest(value, names)}"


def is_real(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, NaN and infinite ones too; a boolean is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, finite and small enough for a float."""
    try:
        return is_real(value) and math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def numbers_as_floats(config: Any, *names: str) -> None:
    """Have these fields of a frozen dataclass, where they are numbers, hold floats."""
    for name in names:
        if is_number(getattr(config, name)):
            object.__setattr__(config, name, float(getattr(config, name)))


def unknown_fields(names: Iterable[str], config: type) -> list[Problem]:
    """A problem for each name that is no field of a dataclass, with the nearest that is."""
    allowed = [field.name for field in dataclasses.fields(config)]
    return [(name, f"unknown field{nearest(name, allowed)}") for name in names if name not in allowed]
