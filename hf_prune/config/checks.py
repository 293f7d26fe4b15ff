"""Checks of single values that all configurations share."""

import math
import numbers
import re
from collections.abc import Collection
from typing import Any, TypeGuard


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


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a real number, finite and small enough for a float."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False
