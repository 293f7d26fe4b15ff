"""`SharedValues`: which values the weights of a tensor may share, and in which groups of weights."""

import re
from dataclasses import dataclass
from typing import Any

from .codebooks import FEWEST_VALUES, MOST_VALUES

# Whole numbers -levels to levels times a scale.
LEVELS = {"int8": 127, "int4": 7}

# What a user may write.
VALUES = f"a whole number from {FEWEST_VALUES} to {MOST_VALUES}, {', '.join(LEVELS)}"
GRANULARITIES = "tensor, row, rows:R or group:G"

_GROUPED = re.compile(r"(rows|group):([1-9]\d{0,8})")


@dataclass(frozen=True)
class SharedValues:
    """Which values the weights share that are kept.

    Attributes:
        number: how many values other than zero a group of weights has, at most.
        levels: the largest whole number, where the values are whole numbers times a scale; None where they are found by
            k-means.
        rows: how many rows (outputs) of a matrix form a group; None for all of a tensor, of however many matrices.
        columns: how many neighbouring weights of a row form a group; None for all.
        first: how many values there are at first; None for `number`.
    """

    number: int
    levels: int | None = None
    rows: int | None = None
    columns: int | None = None
    first: int | None = None

    @property
    def is_one_codebook(self) -> bool:
        """Whether all weights of a tensor share one codebook."""
        return self.levels is None and self.rows is None

    @property
    def words(self) -> str:
        """Which weights are a group, such as `row`."""
        if self.rows is None:
            return "tensor"
        if self.columns is not None:
            return f"group of {self.columns} weights of a row"
        return "row" if self.rows == 1 else f"group of {self.rows} rows"

    @property
    def told(self) -> str:
        """The values in words, such as `at most 16 values in each row`."""
        if self.levels is not None:
            return f"whole numbers up to {self.levels}, times a scale for each {self.words}"
        fewer = f"at most {self.number} values in each {self.words}"
        return fewer if self.first is None else f"{fewer}, {self.first} at first"

    def number_at(self, step: int, begin: int, end: int) -> int:
        """How many values there are after `step` completed steps, where they become fewer from `begin` to `end`.

        The first number is halved at equal intervals until it is the last one, which it is from `end` on.
        """
        if self.first is None or step >= end:
            return self.number
        halvings = 0
        while self.number << halvings < self.first:
            halvings += 1
        done = halvings * max(step - begin, 0) // max(end - begin, 1)
        return max(self.first >> done, self.number)


def parse_values(value: Any) -> int | str | None:
    """A number of values, or one of `LEVELS`, also from the command line; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 5:
        value = int(value)
    if type(value) is int:
        return value if FEWEST_VALUES <= value <= MOST_VALUES else None
    return value if isinstance(value, str) and value in LEVELS else None


def parse_granularity(granularity: Any) -> tuple[int | None, int | None] | None:
    """Rows and columns of a group, as in `SharedValues`; None for what is no granularity."""
    if granularity in ("tensor", "row"):
        return (None, None) if granularity == "tensor" else (1, None)
    match = _GROUPED.fullmatch(granularity) if isinstance(granularity, str) else None
    if match is None:
        return None
    return (int(match[2]), None) if match[1] == "rows" else (1, int(match[2]))


def shared_values_of(values: int | str, granularity: str | None, first: int | None = None) -> SharedValues:
    """The values of a configuration. Whole numbers have a scale for each row unless it says otherwise."""
    levels = LEVELS.get(values) if isinstance(values, str) else None
    rows, columns = parse_granularity(granularity or ("tensor" if levels is None else "row")) or (None, None)
    number = 2 * levels if levels is not None else int(values)
    return SharedValues(number, levels, rows, columns, first)
