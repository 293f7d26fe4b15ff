"""Error messages: their words, and errors that list several problems."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ProblemsError(ValueError):
    """All that is wrong with a configuration; `problems` has a line each: the field, what is allowed, what came."""

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def nearest(value: Any, allowed: Sequence[str] | Mapping[str, Any]) -> str:
    """`; did you mean 'x'?` for the allowed name nearest to a wrong one, or nothing if none is near."""
    near = difflib.get_close_matches(str(value), list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def nearest_beside(path: Path) -> str:
    """A hint at the file with the nearest name in the folder of a path that is not there."""
    return nearest(path.name, [file.name for file in path.parent.iterdir()]) if path.parent.is_dir() else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its class where it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, or its class where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
