"""What was cut out of a saved model, as the `pruning_structure.json` beside it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..config.pruning import STRUCTURES
from ..errors import PruningStateError
from ..structure.fields import value_in
from ..structure.record import STRUCTURE_NAME, read_structure
from ..structure.units import words_for


@dataclass(frozen=True)
class UnitsLeft:
    """How many units, such as the neurons of one layer, there were (`of`), and how many are left."""

    structure: str
    path: str
    of: int
    left: int


@dataclass(frozen=True)
class LayersLeft:
    """How many layers a stack had (`of`), and the indices of those that are left."""

    path: str
    of: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class Removed:
    """What was cut out of a model: numbers of parameters, and of weights in the tensors with units, before and after.

    `units` are those of the layers that are left.
    """

    parameters: tuple[int, int]
    weights: tuple[int, int]
    units: tuple[UnitsLeft, ...]
    layers: tuple[LayersLeft, ...]

    @property
    def structures(self) -> list[str]:
        """The kinds of units."""
        return list(dict.fromkeys([*(one.structure for one in self.units), *(["layers"] if self.layers else [])]))

    @property
    def words(self) -> str:
        """What was removed: `75% of the neurons of each layer and 3 of 6 layers`."""
        parts = []
        for structure in (name for name in self.structures if name != "layers"):
            of, left = self.totals(structure)
            if left == of:
                continue
            parts.append(f"{100 * (1 - left / of):.4g}% of the {words_for(structure)}{self.where(structure)}")
        for stack in (one for one in self.layers if len(one.kept) < one.of):
            which = f" of {stack.path}" if len(self.layers) > 1 else ""
            parts.append(f"{stack.of - len(stack.kept):,} of {stack.of:,} layers{which}")
        return listed(parts)

    def where(self, structure: str) -> str:
        """Which layers the numbers of `in_each`, or else of `totals`, are of; empty for those of the whole model."""
        if structure == "hidden":
            return ""
        if self.in_each(structure) is not None:
            return " of each layer"
        return (
            " of the layers that are left" if any(len(one.kept) < one.of for one in self.layers) else " of all layers"
        )

    def totals(self, structure: str) -> tuple[int, int]:
        """The numbers of units of a kind in all the layers that are left, before and after."""
        units = [one for one in self.units if one.structure == structure]
        return sum(one.of for one in units), sum(one.left for one in units)

    def in_each(self, structure: str) -> tuple[int, int] | None:
        """The numbers of units of a kind in each layer, before and after; None if they differ."""
        numbers = {(one.of, one.left) for one in self.units if one.structure == structure}
        return numbers.pop() if len(numbers) == 1 else None


def listed(parts: Sequence[str]) -> str:
    """A list in words: `neurons, heads and layers`."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def removed_from(folder: Path, config: PreTrainedConfig | None) -> Removed | None:
    """What was cut out of the model in a folder, which has this configuration if it is known; None if nothing was.

    Raises PruningStateError if the file is broken or is that of another model.
    """
    content = read_structure(folder)
    return removed_in(content, config, folder / STRUCTURE_NAME) if content is not None else None


def removed_in(content: Mapping[str, Any], config: PreTrainedConfig | None, path: Path) -> Removed | None:
    """What was cut out of a model, from what `pruning_structure.json` has of it, as `removed_from`; `path` is its."""
    try:
        removed = _parsed(content)
    except (LookupError, ValueError, TypeError) as error:
        raise PruningStateError(
            f"{path}: expected the units that were cut out, got a file that cannot be used ({error!r})"
        ) from error
    for name, (_, after) in content["fields"].items():
        now = value_in(config, tuple(name.split("."))) if config is not None else after
        if now != after:
            raise PruningStateError(
                f"{path}: expected the model that was left, whose {name!r} is {after!r}, got a config.json with "
                f"{now!r}; delete the file if the model was replaced by another one"
            )
    return removed if removed.parameters[0] > removed.parameters[1] else None


def _parsed(content: Mapping[str, Any]) -> Removed:
    units = []
    stacks: dict[str, dict[int, bool]] = {}  # path -> index of the layer -> whether it is kept
    for name, one in content["units"].items():
        structure, _, path = name.partition(" of ")
        if structure not in STRUCTURES or not path.isprintable() or type(one["of"]) is not int or one["of"] < 1:
            raise ValueError(f"units: {name!r}")
        if structure == "layers":
            stack, _, index = path.rpartition(".")
            stacks.setdefault(stack, {})[int(index)] = bool(one["kept"])
        else:
            units.append(UnitsLeft(structure, path, one["of"], len(one["kept"])))
    layers = [
        LayersLeft(stack, len(are_kept), tuple(index for index, is_kept in sorted(are_kept.items()) if is_kept))
        for stack, are_kept in stacks.items()
    ]
    if not units and not layers:
        raise ValueError("units: none")
    pairs = [_shrinking(content[name], name) for name in ("parameters", "weights")]
    return Removed(pairs[0], pairs[1], tuple(units), tuple(layers))


def _shrinking(pair: Sequence[int], name: str) -> tuple[int, int]:
    before, after = pair
    if not 0 <= after <= before:
        raise ValueError(f"{name}: {pair!r}")
    return before, after
