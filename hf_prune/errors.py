"""Every error that a user can meet, and the words they are told in."""

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


class MergeError(ValueError):
    """Adapters that cannot be merged without filling zeros of the weights under them."""


class CardError(ValueError):
    """A card that cannot be made, or cannot be made anew without losing something."""


class PruningConfigError(ProblemsError):
    """All that is wrong with a `PruningConfig`; `problems` has a line each: the field, what is allowed, what came."""


class DistillationConfigError(ProblemsError):
    """All that is wrong with a `DistillationConfig`; `problems` has a line each: the field, what is allowed, what came.

    It is raised in training, too, for layers that model and teacher do not have.
    """


class PlacementError(ValueError):
    """A tensor is spread over processes in a way that cannot be pruned."""


class StaleRecordError(ValueError):
    """Measurements that belong to other weights than those that are there."""


class PushError(RuntimeError):
    """A push that did not come to its end: why, what is and is not on the Hub, and what to do."""


class LaunchError(RuntimeError):
    """Processes that were not launched as the run needs them, or that do not find each other."""


class PruningStateError(RuntimeError):
    """Weights that cannot be ranked, or saved masks that cannot be used."""


class RecipeError(ProblemsError):
    """What is wrong with a recipe: a line for each problem, with where, what was expected, and what came."""


class RecordError(ValueError):
    """A `run_record.json` that cannot be used."""


class ReportError(ValueError):
    """A folder or file that no report can be made from."""


class TargetError(ValueError):
    """Expressions or tensors that a configuration names and the model cannot serve."""


class TeacherError(ValueError):
    """A teacher that a model cannot be distilled from."""


class IncompatibleVersionError(RuntimeError):
    """A version of another library that lacks what this package needs of it, or has it in another form."""
