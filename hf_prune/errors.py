"""Every error that a user can meet, and the words they are told in."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def nearest(value: Any, allowed: Iterable[str]) -> str:
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


class HfPruneError(Exception):
    """Base of every error that a user can meet, with all that is wrong at once.

    `HfPruneError(message)` and `HfPruneError(key, message)` tell of one problem, `problems=` of several. Its text has a
    line for each: `place: key: message`, without what is empty.

    Args:
        problem: the message, or the key and the message. A key is what is to be changed: an argument, the field of a
            configuration, or the dotted key of a recipe.
        problems: (key, message) of each of several problems; the key is empty where there is none.
        at: where they stand, such as a file and a line, or `command line`: for all of them, or for each.

    Attributes:
        problems: a list of (key, message).
        places: a list with the place of each, empty where it is not known.
    """

    def __init__(self, *problem: str, problems: Iterable[tuple[str, str]] = (), at: str | Sequence[str] = ""):
        super().__init__(*problem)
        if problem:
            key, message = problem if len(problem) == 2 else ("", *problem)
            problems = [(key, message)]
        self.problems = list(problems)
        self.places = [at] * len(self.problems) if isinstance(at, str) else list(at)

    def __str__(self) -> str:
        lines = zip(self.places, self.problems, strict=True)
        return "\n".join(": ".join(filter(None, (place, *problem))) for place, problem in lines)

    def problems_under(self, section: str) -> list[tuple[str, str]]:
        """The problems with their keys as those of a section, such as a recipe's `pruning`."""
        return [(f"{section}.{key}" if key else section, message) for key, message in self.problems]


class MergeError(HfPruneError, ValueError):
    """Adapters that cannot be merged without filling zeros of the weights under them."""


class CardError(HfPruneError, ValueError):
    """A card that cannot be made, or cannot be made anew without losing something."""


class PruningConfigError(HfPruneError, ValueError):
    """What is wrong with a `PruningConfig`, or with it for this model, training or engine."""


class DistillationConfigError(HfPruneError, ValueError):
    """What is wrong with a `DistillationConfig`, or with it for the layers that model and teacher have."""


class ArgumentError(HfPruneError, TypeError):
    """An argument of another type than was expected."""


class CheckpointError(HfPruneError, ValueError):
    """A checkpoint that this training cannot go on from."""


class PlacementError(HfPruneError, ValueError):
    """A tensor is spread over processes in a way that cannot be pruned."""


class StaleRecordError(HfPruneError, ValueError):
    """Measurements that belong to other weights than those that are there."""


class PushError(HfPruneError, RuntimeError):
    """A push that did not come to its end: why, what is and is not on the Hub, and what to do."""


class LaunchError(HfPruneError, RuntimeError):
    """Processes that were not launched as the run needs them, or that do not find each other."""


class PruningStateError(HfPruneError, RuntimeError):
    """Weights that cannot be ranked, or saved masks that cannot be used."""


class RecipeError(HfPruneError, ValueError):
    """What is wrong with a recipe; `places` says in which line, where that is known."""


class RecordError(HfPruneError, ValueError):
    """A `run_record.json` that cannot be used."""


class ReportError(HfPruneError, ValueError):
    """A folder or file that no report can be made from."""


class TargetError(HfPruneError, ValueError):
    """Expressions or tensors that a configuration names and the model cannot serve."""


class TeacherError(HfPruneError, ValueError):
    """A teacher that a model cannot be distilled from."""


class IncompatibleVersionError(HfPruneError, RuntimeError):
    """A version of another library that lacks what this package needs of it, or has it in another form."""
