"""`pruning_search.json`: the structure that was chosen for a target, what it was chosen from, and what it reached."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.checks import is_number
from ..config.pruning import STRUCTURES, PruningConfig
from ..config.safe_json import read_versioned, write_or_remove
from ..errors import HfPruneError, PruningStateError, one_line, shown
from ..methods.patterns import count_of
from .search import Candidate, Target

SEARCH_NAME = "pruning_search.json"

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class Chosen:
    """The structure that was chosen for a target.

    Attributes:
        config: the configuration with the target.
        candidate: what was chosen, with what was predicted of it; `seconds` were measured of the untrained structure.
        dense: the dense model; `seconds` were measured in turns with those of the candidate.
        frontier: the structures than which no other is as fast and changes less, from the slowest to the fastest.
        units: structure -> the number of its units in each layer, or of layers in the deepest stack.
        conditions: the machine, its threads, the precision and the shapes of the inputs.
        reached: after training, the seconds of the dense model and of the small one, in turns; None before.
    """

    config: PruningConfig
    candidate: Candidate
    dense: Candidate
    frontier: tuple[Candidate, ...]
    units: dict[str, int]
    conditions: dict[str, Any]
    reached: tuple[float, float] | None = None

    @property
    def target(self) -> Target:
        """What was asked for."""
        target = target_of(self.config)
        assert target is not None
        return target

    @property
    def configs(self) -> list[PruningConfig]:
        """The configurations that prune the chosen structure."""
        return [self.config.for_structure(name, share) for name, share in self.candidate.sparsities.items()]

    def left(self, candidate: Candidate) -> dict[str, int]:
        """structure -> how many of its units a candidate keeps in each layer, or of layers."""
        return {
            name: max(number - count_of(candidate.sparsities.get(name, 0.0), number), 1)
            for name, number in self.units.items()
        }

    def words_of(self, candidate: Candidate) -> str:
        """What a candidate keeps, such as `384 of 1,536 neurons and 3 of 6 layers`."""
        parts = [f"{left:,} of {self.units[name]:,} {name}" for name, left in self.left(candidate).items()]
        return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]

    @property
    def inputs_words(self) -> str:
        """The shape of the main input, such as `1×64`."""
        shapes = self.conditions["inputs"]
        return "×".join(map(str, shapes.get("input_ids") or next(iter(shapes.values()), [])))

    @property
    def speedup(self) -> float:
        """How many times faster than the dense model the structure was, before training."""
        return self.dense.seconds / self.candidate.seconds

    @property
    def reached_speedup(self) -> float | None:
        """How many times faster than the dense model the trained model is; None if it was not measured."""
        return self.reached[0] / self.reached[1] if self.reached is not None else None

    @property
    def off_by(self) -> float | None:
        """By which share of what was asked for the trained model misses it (negative: too slow or too large).

        None if it was not measured.
        """
        if self.target.name == "target_parameters":
            return self.target.number_of_parameters(self.dense.parameters) / self.candidate.parameters - 1
        if self.reached is None:
            return None
        dense, small = self.reached
        return self.target.seconds(dense) / small - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": self.config.to_dict(),
            "candidate": self.candidate.to_dict(),
            "dense": self.dense.to_dict(),
            "frontier": [one.to_dict() for one in self.frontier],
            "units": self.units,
            "conditions": self.conditions,
            "reached": list(self.reached) if self.reached is not None else None,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Chosen":
        """From what `to_dict` gives; anything else raises ValueError, LookupError, TypeError or PruningConfigError."""
        config = PruningConfig.from_dict(content["config"])
        if target_of(config) is None:
            raise ValueError("config: no target")
        units = {str(name): _positive(number) for name, number in content["units"].items()}
        if not units or not units.keys() <= set(STRUCTURES):
            raise ValueError(f"units: {shown(str(units))}")
        reached = content["reached"]
        return cls(
            config=config,
            candidate=_candidate(content["candidate"], units),
            dense=_candidate(content["dense"], units),
            frontier=tuple(_candidate(one, units) for one in content["frontier"]),
            units=units,
            conditions=_conditions(content["conditions"]),
            reached=(_seconds(reached[0]), _seconds(reached[1])) if reached is not None else None,
        )


def target_of(config: PruningConfig) -> Target | None:
    """What a configuration asks for; None if it says itself what is pruned."""
    for name in ("target_speedup", "target_parameters", "target_latency"):
        value = getattr(config, name)
        if value is not None:
            return Target(name, value)
    return None


def _candidate(content: Mapping[str, Any], units: Mapping[str, int]) -> Candidate:
    sparsities = {str(name): float(share) for name, share in content["sparsities"].items()}
    if not sparsities.keys() <= units.keys() or not all(0 <= share < 1 for share in sparsities.values()):
        raise ValueError(f"sparsities: {shown(str(sparsities))}")
    change = float(content["change"])
    if not math.isfinite(change):
        raise ValueError(f"change: {change}")
    return Candidate(sparsities, _seconds(content["seconds"]), _positive(content["parameters"]), change)


def _seconds(value: Any) -> float:
    if not is_number(value) or not 0 < value < 1e6:
        raise ValueError(f"seconds: {shown(value)}")
    return float(value)


def _positive(value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 60:
        raise ValueError(f"expected a number of units or parameters, got {shown(value)}")
    return value


def _conditions(content: Mapping[str, Any]) -> dict[str, Any]:
    """The conditions, of which cards show some."""
    for name in ("processor", "accelerator", "dtype"):
        if not isinstance(content[name], str) or not content[name].isprintable():
            raise ValueError(f"{name}: {shown(content[name])}")
    shapes = content["inputs"].values()
    if not all(type(size) is int for shape in shapes for size in shape) or type(content["threads"]) is not int:
        raise ValueError("inputs or threads: expected whole numbers")
    return dict(content)


def write_chosen(directory: Path, chosen: Chosen | None) -> None:
    """Write `pruning_search.json` into a directory; where nothing was chosen, remove that of another model."""
    content = {"format_version": _FORMAT_VERSION, **chosen.to_dict()} if chosen is not None else None
    write_or_remove(directory / SEARCH_NAME, content)


def read_chosen(directory: Path) -> Chosen | None:
    """What was chosen for the model in a folder; None if nothing was. Raises PruningStateError for a broken file."""
    path = directory / SEARCH_NAME
    try:
        content = read_versioned(path, _FORMAT_VERSION)
        return Chosen.from_dict(content) if content is not None else None
    except (HfPruneError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PruningStateError(
            f"{path}: expected the structure that was chosen, got a file that cannot be used ({one_line(error)})"
        ) from error
