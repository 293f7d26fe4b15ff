"""The settings of a sweep, from `KEY=VALUE` of the command line: values of a grid, ranges for trials, fixed ones."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import RecipeError
from ..recipe.schema import COMMAND_LINE

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"

_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")

# Keys that a sweep sets itself.
_OWN = ("output_dir", "training.run_name", "training.output_dir")


@dataclass(frozen=True)
class Values:
    """The values of a key, each as it is written in YAML."""

    key: str
    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.key}={','.join(self.texts)}"


@dataclass(frozen=True)
class Range:
    """A range of a key, bounds included: of whole numbers if both bounds are; with `log`, drawn in its logarithm."""

    key: str
    low: float
    high: float
    is_whole: bool
    log: bool

    def __str__(self) -> str:
        return f"{self.key}={self.low:g}..{self.high:g}{':log' if self.log else ''}"


Swept = Values | Range


def parse_settings(overrides: Sequence[str]) -> tuple[list[str], list[Swept]]:
    """The overrides with one value, as they are, and what is swept, in the order given.

    `KEY=A,B` are two values; a comma within brackets or quotes separates none. `KEY=LOW..HIGH` is a range, and
    `KEY=LOW..HIGH:log` one that is drawn in its logarithm. Raises RecipeError for anything else.
    """
    fixed: list[str] = []
    swept: list[Swept] = []
    seen: set[str] = set()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise RecipeError(
                f"expected KEY=VALUE, or KEY=VALUE,VALUE such as pruning.sparsity=0.5,0.7, got {override!r}",
                at=COMMAND_LINE,
            )
        if key in seen:
            raise RecipeError(key, "is set more than once; write KEY=VALUE,VALUE for several values", at=COMMAND_LINE)
        seen.add(key)
        found = _parse(key, text)
        if isinstance(found, Range) or len(found.texts) > 1:
            if key in _OWN:
                raise RecipeError(
                    key, "must not be swept: each point has its own, named by its settings", at=COMMAND_LINE
                )
            swept.append(found)
        else:
            fixed.append(override)
    return fixed, swept


def _parse(key: str, text: str) -> Swept:
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        texts = split_values(text)
        if len(texts) > 1 and not all(texts):
            raise RecipeError(key, f"expected a value before and after each comma, got {text!r}", at=COMMAND_LINE)
        return Values(key, tuple(texts))
    low, high = float(found[1]), float(found[2])
    if not low < high:
        raise RecipeError(key, f"expected LOW..HIGH with LOW below HIGH, got {text!r}", at=COMMAND_LINE)
    if found[3] and low <= 0:
        raise RecipeError(key, f"expected bounds above 0 for :log, got {text!r}", at=COMMAND_LINE)
    is_whole = re.fullmatch(r"[-+]?\d+", found[1]) is not None and re.fullmatch(r"[-+]?\d+", found[2]) is not None
    return Range(key, low, high, is_whole, bool(found[3]))


def split_values(text: str) -> list[str]:
    """The parts of a text between commas that are outside brackets and quotes, without spaces around them."""
    parts, depth, quote, escaped = [""], 0, "", False
    for char in text:
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and quote == '"' and not escaped
        elif char in "'\"" and (depth or not parts[-1].strip()):
            quote = char
        elif char in "[{":
            depth += 1
        elif char in "]}":
            depth -= 1
        elif char == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += char
    return [part.strip() for part in parts]
