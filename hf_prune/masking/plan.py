"""Plans, made without any weights: what a training will prune, and what is then left."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import chain, takewhile
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..methods.schedules import update_steps
from ..model.layouts import Target
from ..model.names import named_parameters, plain_model, shape_of
from ..quantise.forms import SharedValues
from ..structure.shrink import cut_of
from ..structure.units import CoupledUnits, Family
from .groups import Group, Window

# The names of the coupled units of a group, which several configurations may prune one after another.
_Units = tuple[str, ...]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a plan. `masked` is its number of masked weights now; `final_sparsity` is None if a ranking across
    several tensors will decide it, or what training shows until the update after `decided_at` completed steps.
    `counted` is whether sparsities count it: not where its weights only share values, for example."""

    name: str
    shape: tuple[int, ...]
    weights: int
    masked: int
    final_sparsity: float | None
    decided_at: int | None = None
    counted: bool = True


def plan_tensor(target: Target, masked: int, counted: bool) -> PlannedTensor:
    """A tensor before its final sparsity is planned."""
    return PlannedTensor(target.name, target.shape, target.weights, masked, None, counted=counted)


@dataclass(frozen=True)
class PlannedUpdate:
    """A mask update after `step` completed optimizer steps; `sparsity` is then the share of masked weights."""

    step: int
    sparsity: float


@dataclass(frozen=True)
class PlannedUnits:
    """How many of the units of a structure will be removed: of the neurons of one layer, or of all layers of one stack
    if they are ranked together, or of the layers of one stack."""

    structure: str
    path: str
    of: int
    removed: int

    @property
    def left(self) -> int:
        """How many will be left."""
        return self.of - self.removed


@dataclass(frozen=True)
class Plan:
    """What would be pruned, how much and when. `weights` counts those of the targets that sparsities count,
    `all_weights` the model's.

    `left_out` maps the names of weights of layers that are not pruned by default to the reason. `units` are those of
    structures; `weights_left` is the number of parameters of the model without them, see `of_model`. `sparsity_left` is
    the share of masked weights of what is left once they are cut out, where single weights are masked too; sparsities
    are those of removed and masked weights together. `shared_values`
    maps the names of tensors to the number of values that their weights share, after the step `shared_from`; of each
    row, or other group, where the words of `shared_as` say so.
    """

    tensors: list[PlannedTensor]
    updates: list[PlannedUpdate]
    total_steps: int
    weights: int
    all_weights: int
    left_out: dict[str, str] = field(default_factory=dict)
    units: list[PlannedUnits] = field(default_factory=list)
    weights_left: int | None = None
    shared_values: dict[str, int] = field(default_factory=dict)
    sparsity_left: float | None = None
    shared_from: int | None = None
    shared_as: Sequence[str] = ()
    _groups: tuple[Group, ...] = field(default=(), repr=False, compare=False)
    _depends_on_layers: bool = field(default=False, repr=False, compare=False)

    def of_model(self, model: nn.Module) -> "Plan":
        """The same plan with `weights_left`, of the model that was planned for, and with layers that must stay counted.

        It stays None where no structure is pruned, and where it depends on which layers are removed: also where these
        may leave with more units than a ranking of all layers asks for.
        """
        if not self.units or self._depends_on_layers:
            return self
        plain = plain_model(model)
        removed = {f"{one.structure} of {one.path}": one.removed for one in self.units}
        families = list({_units_of(group): _whole_family(group, plain) for group in self._groups}.values())
        shapes = {name: torch.empty(shape_of(one), device="meta") for name, one in named_parameters(model)}
        counts = set()
        for last in (False, True):  # the layers that are removed are the first, or the last
            dropped: dict[str, torch.Tensor] = {}
            leaving: list[str] = []
            for group in sorted(self._groups, key=lambda group: group.config.structure != "layers"):
                flags = _some_dropped(group, removed, last, leaving)
                if group.config.structure == "layers":
                    leaving += [layer.path for layer in group.coupled if bool(flags[layer.name].all())]
                dropped |= flags
            counts.add(sum(tensor.numel() for tensor in cut_of(families, dropped).tensors(shapes).values()))
        depths = {family.stack: len(family.groups) for family in families if family.structure == "layers"}
        units = [replace(one, of=depths[one.path]) if one.structure == "layers" else one for one in self.units]
        return replace(self, units=units, weights_left=counts.pop() if len(counts) == 1 else None)

    @property
    def final_sparsity(self) -> float:
        """The share of masked weights of all targets after the last update.

        Training may mask more where `layers` are removed beside a ranking of all layers, see `of_model`.
        """
        if self.updates:
            return self.updates[-1].sparsity
        return sum(tensor.masked for tensor in self.tensors if tensor.counted) / max(self.weights, 1)

    def with_sharing(self, forms: Mapping[str, SharedValues], begin: int) -> "Plan":
        """The same plan with the values that weights of tensors share after `begin` completed steps."""
        return replace(
            self,
            shared_values={name: form.number for name, form in forms.items()},
            shared_from=begin if forms else None,
            shared_as=sorted({form.told for form in forms.values()}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        fields = asdict(replace(self, _groups=()))
        content = {name: value for name, value in fields.items() if not name.startswith("_")}
        return content | {"final_sparsity": self.final_sparsity}


def make_plan(
    groups: Sequence[Group],
    windows: Sequence[Window],
    tensors: Sequence[PlannedTensor],
    total_steps: int,
    all_weights: int,
    allotted: Mapping[int, Sequence[int]] = MappingProxyType({}),
) -> Plan:
    """Run the schedule on counts alone, from `tensors` with their current numbers of masked weights.

    `allotted` has the number of units that each member of a group loses in the end, where that is decided already.
    The counts are those of training, unless existing zeros lie unevenly in the units of a pattern.
    """
    masked = {tensor.name: Fraction(tensor.masked) for tensor in tensors}
    ranked: set[str] = set()
    decided_at: dict[str, int] = {}
    starts: dict[int, float] = {}
    updates = []
    counted = {tensor.name for tensor in tensors if tensor.counted}
    weights = sum(tensor.weights for tensor in tensors if tensor.counted)
    asked: dict[str, Fraction] = {}  # the share of masked weights that the last update of a tensor asks for
    dropped_of = {_units_of(group): _dropped_now(group, masked) for group in groups if group.coupled}
    planned_units: dict[_Units, list[PlannedUnits]] = {}
    gone: dict[str, dict[_Units, Fraction]] = {}  # the share of a tensor that goes with the units of each group
    weights_of = {tensor.name: tensor.weights for tensor in tensors}
    together = {_units_of(group) for group in groups if _are_ranked_together(group)}
    layers = {_units_of(group) for group in groups if group.config.structure == "layers"}
    depends_on_layers = False
    for step in _all_update_steps(groups, windows):
        for index, group in enumerate(groups):
            window = windows[group.config_index]
            if not window.due(step):
                continue
            if group.coupled:
                units = _units_of(group)
                start = starts.setdefault(index, group.share_dropped(dropped_of[units]))
                before = sum(dropped_of[units])
                planned_units[units], shares = _plan_units(group, window, step, start, dropped_of[units])
                if units in layers and sum(dropped_of[units]) > before:
                    leaving = sum(dropped_of[units]) - before
                    depends_on_layers |= any(
                        _may_lose_more(other, windows[other.config_index], dropped_of[_units_of(other)], leaving)
                        for other in groups
                        if _units_of(other) in together
                    )
                for name, share in shares.items():
                    by_group = gone.setdefault(name, {})
                    by_group[units] = share
                    masked[name] = max(masked[name], (1 - _kept(by_group, together, layers)) * weights_of[name])
                if len(planned_units[units]) < len(group.coupled):
                    ranked |= shares.keys()
                continue
            weights_a_unit = group.pattern.unit_size * group.pattern.unit_sparsity
            dropped = [int(masked[target.name] / weights_a_unit) for target in group.members]
            starts.setdefault(index, group.share_dropped(dropped))
            if group.allots and index not in allotted:
                decided_at |= {target.name: window.begin for target in group.members}
            if step >= window.end:
                asked |= _shares_asked_for(group, window, tensors, allotted.get(index))
            for pool in group.pools(window, step, starts[index], dropped, allotted=allotted.get(index)):
                members = [group.members[member] for member in pool.members]
                of = sum(group.units_of(target) for target in members)
                for target in members:
                    # The ranking will decide how many each loses; an even split keeps the total exact.
                    share = Fraction(group.units_of(target), max(of, 1)) * pool.count * weights_a_unit
                    masked[target.name] = share if len(members) > 1 else max(masked[target.name], share)
                if len(members) > 1:
                    ranked.update(target.name for target in members)
        all_masked = sum((masked[name] for name in counted), Fraction(0))
        updates.append(PlannedUpdate(step, float(all_masked / max(weights, 1))))
    planned = [
        replace(
            tensor,
            final_sparsity=None if tensor.name in ranked else float(masked[tensor.name] / max(tensor.weights, 1)),
            decided_at=decided_at.get(tensor.name) if tensor.name in ranked else None,
        )
        for tensor in tensors
    ]
    by_unit = tuple(group for group in groups if group.coupled)
    left = {name: weights_of[name] * _kept(gone.get(name, {}), together, layers) for name in asked.keys() & counted}
    masked_of_left = sum((asked[name] * of for name, of in left.items()), Fraction(0))
    return Plan(
        planned,
        updates,
        total_steps,
        weights,
        all_weights,
        units=list(chain(*planned_units.values())),
        sparsity_left=float(masked_of_left / sum(left.values())) if gone and left else None,
        _groups=by_unit,
        _depends_on_layers=depends_on_layers,
    )


def _kept(gone: Mapping[_Units, Fraction], together: Collection[_Units], layers: Collection[_Units]) -> Fraction:
    """The share of a tensor that is left when shares of it have gone with the units of several groups.

    Units of layers that leave count among those that a ranking of all layers removes.
    """
    in_ranking = [share for units, share in gone.items() if units in together]
    most = max(in_ranking, default=Fraction(0))
    others = []
    for units, share in gone.items():
        if in_ranking and units in layers:
            most = max(most, share)
        elif units not in together:
            others.append(share)
    return math.prod((1 - share for share in others), start=1 - most)


def _may_lose_more(group: Group, window: Window, dropped: Sequence[int], leaving: int) -> bool:
    """Whether more units may go than a ranking of all layers asks for in the end, as so many layers leave with theirs.

    How many these have left by then depends on which they are.
    """
    asked = sum(pool.count for pool in group.pools(window, window.end, 0.0, [0] * len(dropped)))
    return sum(dropped) + leaving * max(group.ranked_units) > asked


def _shares_asked_for(
    group: Group, window: Window, tensors: Sequence[PlannedTensor], allotted: Sequence[int] | None
) -> dict[str, Fraction]:
    """For each tensor of a group of weights the share that is masked in the end, if no units are removed from it."""
    masked = {tensor.name: tensor.masked for tensor in tensors}
    weights_a_unit = group.pattern.unit_size * group.pattern.unit_sparsity
    there = [int(masked[target.name] / weights_a_unit) for target in group.members]
    shares: dict[str, Fraction] = {}
    for pool in group.pools(window, window.end, group.share_dropped(there), there, allotted=allotted):
        members = [group.members[member] for member in pool.members]
        of = sum(group.units_of(target) for target in members)
        share = Fraction(pool.count, max(of, 1)) * group.pattern.unit_sparsity
        shares |= dict.fromkeys((target.name for target in members), share)
    return shares


def _units_of(group: Group) -> _Units:
    return tuple(units.name for units in group.coupled)


def _plan_units(
    group: Group, window: Window, step: int, start: float, dropped: list[int]
) -> tuple[list[PlannedUnits], dict[str, Fraction]]:
    """Update the numbers of dropped units for one update of a group of coupled units.

    Returns the units that are removed then, and the share of each tensor that is masked with them.
    """
    planned = []
    shares: dict[str, list[Fraction]] = {}
    for pool in group.pools(window, step, start, dropped):
        members = [group.coupled[member] for member in pool.members]
        of = sum(member.units for member in members)
        alone = len(members) == 1 and group.config.structure != "layers"
        path = members[0].path if alone else _stack_of(group)
        planned.append(PlannedUnits(members[0].structure, path, of, pool.count))
        left = pool.count
        for index, member in zip(pool.members, members, strict=True):
            dropped[index] = min(left, member.units)  # which ones is the ranking's choice
            left -= dropped[index]
            for name in member.names:
                shares.setdefault(name, []).append(Fraction(pool.count, of))
    return planned, {name: sum(some, Fraction(0)) / len(some) for name, some in shares.items()}


def _dropped_now(group: Group, masked: Mapping[str, Fraction]) -> list[int]:
    """How many of each coupled units are dropped already, from the numbers of masked weights of the tensors."""
    weights = {target.name: target.weights for target in group.members}
    shares = [min(masked[name] / weights[name] for name in units.names if weights[name]) for units in group.coupled]
    return [int(share * units.units) for share, units in zip(shares, group.coupled, strict=True)]


def _stack_of(group: Group) -> str:
    """The path of the stack whose layers a group has, or whose layers have its units, if those are ranked together."""
    if group.config.structure == "layers":
        return group.coupled[0].path.rpartition(".")[0]
    return _common_path([units.path for units in group.coupled]) if group.scope == "global" else ""


def _common_path(paths: Sequence[str]) -> str:
    split = [path.split(".") for path in paths]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
    return ".".join(parts[0] for parts in shared)


def _whole_family(group: Group, model: nn.Module) -> Family:
    """The family of a group, for what is left of a model; with the layers of the stack that cannot be removed."""
    stack, coupled = _stack_of(group), group.coupled
    if group.config.structure == "layers":
        known = {layer.path: layer for layer in coupled}
        paths = [f"{stack}.{name}" for name, _ in model.get_submodule(stack).named_children()]
        coupled = tuple(known.get(path, CoupledUnits("layers", path, 1, (), ())) for path in paths)
    return Family(coupled[0].structure, (), coupled, stack=stack, per_layer=_are_ranked_together(group))


def _are_ranked_together(group: Group) -> bool:
    return group.scope == "global" and group.config.structure != "layers" and len(group.coupled) > 1


def _some_dropped(
    group: Group, removed: Mapping[str, int], last: bool, leaving: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Flags (bool) of as many units of a group as will be removed, by the name of their coupled units.

    Of layers, and of units that are ranked together, they are those of the first layers, or of the last. `leaving` are
    the paths of the layers that leave, with all of their units.
    """
    if _are_ranked_together(group):
        left = removed[f"{group.config.structure} of {_stack_of(group)}"]
        found = {}
        for units in reversed(group.coupled) if last else group.coupled:
            leaves = any(f"{units.path}.".startswith(f"{path}.") for path in leaving)
            number = min(left, units.units - (0 if leaves else group.config.round_to or 1))
            left -= number
            found[units.name] = torch.arange(units.units) < number
        return found
    if group.config.structure == "layers":
        flags = torch.arange(len(group.coupled)) < removed[f"layers of {_stack_of(group)}"]
        parts = (flags.flip(0) if last else flags).split(1)
        return {layer.name: one for layer, one in zip(group.coupled, parts, strict=True)}
    return {units.name: torch.arange(units.units) < removed[units.name] for units in group.coupled}


def _all_update_steps(groups: Sequence[Group], windows: Sequence[Window]) -> list[int]:
    used = [windows[index] for index in {group.config_index for group in groups}]
    return sorted({step for window in used for step in update_steps(window.begin, window.end, window.frequency)})
