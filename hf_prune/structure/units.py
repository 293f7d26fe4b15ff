"""Units of a model that can be removed, and the tensors that hang together in each: neurons of a feed-forward network,
heads of attention, experts, and layers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from transformers import PreTrainedConfig

from .fields import Path, value_in


@dataclass(frozen=True)
class Part:
    """Where the units of a group lie in one tensor.

    Unit u has the indices `start + u * width` to `start + (u + 1) * width - 1` of dimension `dim`, for each (start,
    width) of the `runs`. `expert` is the index in the first dimension of a tensor of fused experts that the group is
    limited to.
    """

    name: str
    dim: int
    runs: tuple[tuple[int, int], ...]
    expert: int | None = None

    def indices(self, units: torch.Tensor) -> torch.Tensor:
        """The sorted indices (int64) of these units (int64) in the dimension."""
        found = [(start + units[:, None] * width + torch.arange(width)).reshape(-1) for start, width in self.runs]
        return torch.cat(found).sort().values


@dataclass(frozen=True)
class CoupledUnits:
    """Units of one layer that are alike, such as the neurons of its feed-forward network.

    `path` is that of the module that has them; `readers` are the parts through which the rest of the model reads
    them: the input side of a linear layer. A whole layer is a single unit. `buffers` are parts of saved buffers,
    which are cut, but not masked.
    """

    structure: str
    path: str
    units: int
    parts: tuple[Part, ...]
    readers: tuple[Part, ...]
    buffers: tuple[Part, ...] = ()

    @property
    def name(self) -> str:
        """A name that no other units of the model have, such as `neurons of encoder.layer.0`."""
        return f"{self.structure} of {self.path}"

    @property
    def all_parts(self) -> tuple[Part, ...]:
        """The parts that compute the units, and those that read them."""
        return (*self.parts, *self.readers)

    @property
    def names(self) -> list[str]:
        """The names of all tensors that the units are part of."""
        return list(dict.fromkeys(part.name for part in self.all_parts))


@dataclass(frozen=True)
class Field:
    """A field of a configuration that counts units: its value is `per_unit` times the number of units."""

    path: Path
    per_unit: float

    def value(self, units: int, old: Any) -> Any:
        """The value for so many units; a whole number where the old one and the new one are whole."""
        value = self.per_unit * units
        return value if isinstance(old, float) or value != int(value) else int(value)


@dataclass(frozen=True)
class Family:
    """Groups whose number of units the same fields of the configuration set.

    All have as many, or if `per_layer`, each layer its own number, in the configuration's `per_layer_config`; some have
    no other way (`needs_per_layer`). `stack` is the path of the module that has the layers; without one, all layers
    must have as many. `fixed` are fields that must be set beside them, such as the size of a head. If layers are the
    units, each is a group of its own; `lists` are fields with an entry for each layer, and `fixed_layers` the indices
    of those that cannot be removed. `at_least` units of each group are always kept. `tied` are families of
    which the same share must be removed, such as the heads of a model whose width is theirs.
    """

    structure: str
    fields: tuple[Field, ...]
    groups: tuple[CoupledUnits, ...]
    fixed: Mapping[Path, Any] = field(default_factory=dict)
    stack: str = ""
    lists: tuple[Path, ...] = ()
    fixed_layers: tuple[int, ...] = ()
    at_least: int = 1
    tied: tuple["Family", ...] = ()
    per_layer: bool = False
    needs_per_layer: bool = False

    @property
    def with_tied(self) -> tuple["Family", ...]:
        """The family, and those that are tied to it."""
        return (self, *self.tied)

    @property
    def removable(self) -> tuple[CoupledUnits, ...]:
        """The groups whose units can be removed."""
        return tuple(group for index, group in enumerate(self.groups) if index not in self.fixed_layers)

    @property
    def names(self) -> list[str]:
        """The names of all tensors that removable units are part of."""
        return list(dict.fromkeys(name for group in self.removable for name in group.names))

    @property
    def dims(self) -> set[tuple[str, int]]:
        """The names of tensors, and those of their dimensions, that the units lie in."""
        return {(part.name, part.dim) for group in self.groups for part in group.all_parts}

    def layer_of(self, path: str) -> int:
        """The index of the layer of the stack that a module of this path is in."""
        return int(path.removeprefix(f"{self.stack}.").partition(".")[0])

    def config(self, config: PreTrainedConfig, units: int, kept: Sequence[int] = ()) -> dict[Path, Any]:
        """The values of the fields for so many units in each group, or for the kept layers."""
        values = {one.path: one.value(units, value_in(config, one.path)) for one in self.fields}
        lists = {path: [value_in(config, path)[index] for index in kept] for path in self.lists}
        return {**self.fixed, **values, **lists}


def nearest_readers(name: str, readers: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
    """The readers that a tensor shares the longest path with: one, or several that are equally near."""
    shared = {reader: len(common_path(name, reader[0])) for reader in readers}
    return tuple(reader for reader in readers if shared[reader] == max(shared.values()))


def group_parts(
    structure: str,
    parts: Mapping[tuple[str, int], Part],
    readers: Sequence[tuple[str, int]],
    units: Mapping[tuple[str, int], int],
) -> list[CoupledUnits]:
    """Parts by the reader that they share the longest path with; readers that are equally near are one group.

    `units` are the numbers of units in the layer of each part.
    """
    members: dict[tuple[tuple[str, int], ...], list[Part]] = {}
    for key, part in parts.items():
        if key not in readers:
            members.setdefault(nearest_readers(part.name, readers), []).append(part)
    groups = []
    for nearest, some in members.items():
        reading = tuple(parts[reader] for reader in nearest)
        paths = [part.name for part in (*some, *reading)]
        groups.append(CoupledUnits(structure, common_path(*paths), units[nearest[0]], tuple(some), reading))
    return groups


def common_path(*names: str) -> str:
    """The path of the innermost module that has all of these parameters."""
    split = [name.split(".")[:-1] for name in names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join(parts[0] for parts in shared)


def words_for(structure: str) -> str:
    """What the units of a structure are called in a sentence."""
    return "hidden dimensions" if structure == "hidden" else structure
