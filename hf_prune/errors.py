"""All errors that a user can meet, and helpers for their messages."""

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
    """The first line of an error's text, with the next where it ends in a colon; its class where it has no text."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def shown(value: Any) -> str:
    """A value as Python writes it; of a long text, the beginning."""
    return repr(f"{value[:100]}…" if isinstance(value, str) and len(value) > 100 else value)


def one_line(error: BaseException) -> str:
    """An error's text without line breaks, or its class where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__


class HfPruneError(Exception):
    """Base class of all errors of hf-prune. One error can report several problems.

    `HfPruneError(message)` and `HfPruneError(key, message)` report one problem, `problems=` reports several. The text
    of the error has one line per problem, `place: key: message`; empty parts are left out.

    Args:
        problem: the message, or the key and the message. The key names what to change: an argument, the field of a
            configuration, or the dotted key of a recipe.
        problems: (key, message) of several problems; the key is empty where there is none.
        at: the place of the problems, such as a file and a line, or `command line`: one for all, or one for each.

    Attributes:
        problems: a list of (key, message).
        places: a list with the place of each problem, empty where it is unknown.
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
    """Adapters cannot be merged into the base weights without overwriting zeros."""


class CardError(HfPruneError, ValueError):
    """A model card cannot be generated, or not without losing what a person wrote into it."""


class PruningConfigError(HfPruneError, ValueError):
    """A `PruningConfig` is invalid, or does not fit the model, the training or the distributed engine."""


class DistillationConfigError(HfPruneError, ValueError):
    """A `DistillationConfig` is invalid, or does not fit the layers of model and teacher."""


class CalibrationConfigError(HfPruneError, ValueError):
    """A `CalibrationConfig` is invalid."""


class CalibrationError(HfPruneError, ValueError):
    """Calibration data cannot be used, or do not reach the layers that are to be pruned."""


class ArgumentError(HfPruneError, TypeError):
    """An argument has the wrong type."""


class CheckpointError(HfPruneError, ValueError):
    """Training cannot be resumed from this checkpoint."""


class CompareError(HfPruneError, ValueError):
    """Saved models cannot be compared with each other, or a limit for the best of them is invalid."""


class PackedError(HfPruneError, ValueError):
    """Weights cannot be packed, or a packed file cannot be used."""


class PlacementError(HfPruneError, ValueError):
    """A tensor is distributed over processes in a way that cannot be pruned."""


class StaleRecordError(HfPruneError, ValueError):
    """The recorded measurements belong to other weights than the saved ones."""


class PushError(HfPruneError, RuntimeError):
    """A push failed. The message says why, what is on the Hub now, and what to do."""


class LaunchError(HfPruneError, RuntimeError):
    """The processes were not launched as the run requires, or cannot reach each other."""


class OtherProcessError(HfPruneError, RuntimeError):
    """Another process of this training failed. The message says which one, and with what."""


class PruningStateError(HfPruneError, RuntimeError):
    """Weights cannot be ranked, or saved masks cannot be used."""


class ExplainError(HfPruneError, ValueError):
    """A model cannot be explained, or not on these samples."""


class RecipeError(HfPruneError, ValueError):
    """A recipe is invalid. `places` has the line of each problem, where it is known."""


class RecordError(HfPruneError, ValueError):
    """A `run_record.json` cannot be used."""


class ReportError(HfPruneError, ValueError):
    """The zeros of a folder or file cannot be counted."""


class SpaceError(HfPruneError, ValueError):
    """A page cannot be made for this model, or would replace one that hf-prune did not make."""


class StructureError(HfPruneError, ValueError):
    """Units such as neurons or layers cannot be removed from a model such that from_pretrained opens the rest."""


class TargetError(HfPruneError, ValueError):
    """A configuration names expressions or tensors that the model does not have or that cannot be pruned."""


class TeacherError(HfPruneError, ValueError):
    """A model cannot be distilled from this teacher."""


class ExportError(HfPruneError, RuntimeError):
    """A model cannot be exported, or what was exported does not open or answers otherwise."""


class HardwareError(HfPruneError, RuntimeError):
    """This machine lacks hardware that was asked for. The message says what is needed."""


class IncompatibleVersionError(HfPruneError, RuntimeError):
    """The installed version of another library lacks something that hf-prune needs, or has changed it."""
