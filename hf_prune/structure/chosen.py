"""`pruning_search.json`: the structure that was chosen for a target, what it was chosen from, and what it reached."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
        dense: the dense model that the target refers to; `seconds` were measured in turns with those of the candidate.
        frontier: the structures than which no other is as fast and changes less, from the slowest to the fastest.
        units: structure -> the number of its units in each layer, or of layers in the deepest stack; where layers may
            differ, of those of all layers, and of layers in all stacks.
        conditions: the machine, its threads, the precision and the shapes of the inputs.
        reached: after training, the seconds of the dense model and of the small one, in turns; None before.
        layers: where layers may differ, the path of each -> structure -> the number of its units there, `layers` among
            them; else empty.
        dense_fields: the fields of the configuration in which the dense model differs from the one that units are
            removed from, and their values there, such as the number of tokens before unused ones were removed.
    """

    config: PruningConfig
    candidate: Candidate
    dense: Candidate
    frontier: tuple[Candidate, ...]
    units: dict[str, int]
    conditions: dict[str, Any]
    reached: tuple[float, float] | None = None
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    dense_fields: dict[str, int] = field(default_factory=dict)

    @property
    def target(self) -> Target:
        """What was asked for."""
        target = target_of(self.config)
        assert target is not None
        return target

    @property
    def configs(self) -> list[PruningConfig]:
        """The configurations that prune the chosen structure."""
        if not self.layers:
            return [self.config.for_structure(name, share) for name, share in self.candidate.sparsities.items()]
        of_units = [self._config_with_overrides(name) for name in self.units if name != "layers"]
        stacks = dict.fromkeys(path.rpartition(".")[0] for path in self.layers)
        return [one for one in (*of_units, *map(self._config_of_stack, stacks)) if one is not None]

    def _config_with_overrides(self, structure: str) -> PruningConfig | None:
        """The configuration for units whose number is chosen for each layer; None if none is removed."""
        of = {path: units[structure] for path, units in self.layers.items() if structure in units}
        shares = {path: (self.candidate.layers.get(path) or {}).get(structure, 0.0) for path in of}
        gone = sum(count_of(share, of[path]) for path, share in shares.items())
        if not gone:
            return None
        overrides = {_all_of(path): share for path, share in shares.items()}
        return self.config.for_structure(structure, round(gone / sum(of.values()), 6), overrides=overrides)

    def _config_of_stack(self, stack: str) -> PruningConfig | None:
        """The configuration for the layers of a stack that are removed; None if none is."""
        paths = [path for path in self.layers if path.rpartition(".")[0] == stack]
        gone = [path for path in paths if self.candidate.layers.get(path, {}) is None]
        if not gone:
            return None
        share = round(len(gone) / len(paths), 6)
        return self.config.for_structure("layers", share, targets=[_all_of(path) for path in gone])

    def left(self, candidate: Candidate) -> dict[str, int]:
        """structure -> how many of its units a candidate keeps in each layer, or of layers."""
        return {
            name: max(number - count_of(candidate.sparsities.get(name, 0.0), number), 1)
            for name, number in self.units.items()
        }

    @property
    def left_of_layers(self) -> dict[str, dict[str, int] | None]:
        """Where layers may differ: the path of each -> structure -> how many of its units are left; None without it."""
        found: dict[str, dict[str, int] | None] = {}
        for path, units in self.layers.items():
            shares = self.candidate.layers.get(path, {})
            found[path] = (
                {name: of - count_of(shares.get(name, 0.0), of) for name, of in units.items() if name != "layers"}
                if shares is not None
                else None
            )
        return found

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
    def reached_words(self) -> str:
        """What the trained model reached, first of what was asked for, such as `2.95 times the speed`."""
        assert self.reached is not None
        speed = f"{self.reached_speedup:.2f} times the speed"
        if self.target.name == "target_parameters":
            return f"{self._parameters_words} and {speed}"
        return f"{1000 * self.reached[1]:.3g} ms and {speed}" if self.target.name == "target_latency" else speed

    @property
    def _parameters_words(self) -> str:
        left, every = self.candidate.parameters, self.dense.parameters
        return f"{left:,} of {every:,} parameters ({left / every:.1%})"

    def told(self, escape: Callable[[str], str] = str) -> str:
        """What was asked for, what was chosen, and what it reached, in sentences; names of the machine are escaped."""
        conditions = self.conditions
        where = escape(conditions["processor"] if conditions["accelerator"] == "cpu" else conditions["accelerator"])
        dense, small = self.reached if self.reached is not None else (self.dense.seconds, self.candidate.seconds)
        threads = f"{conditions['threads']} thread{'' if conditions['threads'] == 1 else 's'}"
        when = "after training" if self.reached is not None else "before training"
        of_parameters = f", with {self._parameters_words}," if self.target.name == "target_parameters" else ""
        return (
            f"Asked for {self.target.words}; of the structures that should reach it, {self.words_of(self.candidate)}"
            f"{of_parameters} were predicted to change the outputs least. Measured {when}: {dense / small:.2f} times "
            f"as fast, {1000 * small:.2f} ms where the dense model needs {1000 * dense:.2f} ms (least of several "
            f"passes in turns, inputs of {self.inputs_words}, {where}, {threads}, {escape(conditions['dtype'])})."
        )

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
            "layers": self.layers,
            "dense_fields": self.dense_fields,
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
        layers = {
            _printable(path): {str(name): _positive(number) for name, number in of.items()}
            for path, of in content.get("layers", {}).items()
        }
        if not all(of.keys() <= units.keys() for of in layers.values()):
            raise ValueError(f"layers: {shown(str(layers))}")
        reached = content["reached"]
        dense_fields = content.get("dense_fields", {})
        return cls(
            config=config,
            candidate=_candidate(content["candidate"], units),
            dense=_candidate(content["dense"], units),
            frontier=tuple(_candidate(one, units) for one in content["frontier"]),
            units=units,
            conditions=_conditions(content["conditions"]),
            reached=(_seconds(reached[0]), _seconds(reached[1])) if reached is not None else None,
            layers=layers,
            dense_fields={_printable(name): _positive(value) for name, value in dense_fields.items()},
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
    layers: dict[str, dict[str, float] | None] = {
        _printable(path): {str(name): float(share) for name, share in of.items()} if of is not None else None
        for path, of in content.get("layers", {}).items()
    }
    for of in layers.values():
        if of is not None and not (of.keys() <= units.keys() and all(0 <= share < 1 for share in of.values())):
            raise ValueError(f"layers: {shown(str(of))}")
    return Candidate(sparsities, _seconds(content["seconds"]), _positive(content["parameters"]), change, layers)


def _all_of(path: str) -> str:
    """An expression for the names of all parameters of a module."""
    return rf"{re.escape(path)}\..*"


def _printable(path: Any) -> str:
    if not isinstance(path, str) or not path.isprintable():
        raise ValueError(f"expected the path of a layer or a field, got {shown(path)}")
    return path


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
