"""Plans, made without any weights: configurations -> groups of tensors -> counts to prune at a step."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from itertools import chain, takewhile
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..config.pruning import PruningConfig
from ..errors import PruningConfigError, TargetError
from ..methods.allocation import counts_on_the_way
from ..methods.criteria import CRITERIA, Criterion
from ..methods.patterns import Pattern, count_of, rounded_count
from ..methods.schedules import sparsity_at, update_steps
from ..methods.scopes import SCOPES, Pool, Prunable, Seen
from ..methods.table import needs_a_step, reads_of
from ..model.layouts import Target
from ..model.names import named_parameters, plain_model, shape_of
from ..model.targets import check_expressions
from ..quantise.forms import SharedValues
from ..structure.shrink import cut_of
from ..structure.units import CoupledUnits, Family
from .selection import alone

# The names of the coupled units of a group, which several configurations may prune one after another.
_Units = tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """When a configuration updates masks, in completed optimizer steps."""

    begin: int
    end: int
    frequency: int

    def due(self, step: int) -> bool:
        """Whether masks are updated after `step` completed optimizer steps."""
        return step == self.end or (self.begin <= step <= self.end and (step - self.begin) % self.frequency == 0)


@dataclass(frozen=True)
class Group:
    """Tensors with one configuration, final sparsity and scope, for which counts are computed together.

    `coupled` are the units that are removed as a whole, if a structure is pruned; `members` are then all tensors that
    they are part of. One unit of each is always kept, and one layer, unless there are `fixed` layers beside them, which
    cannot be removed, but are counted.
    """

    config_index: int
    config: PruningConfig
    pattern: Pattern
    members: tuple[Target, ...]
    scope: str
    final: float
    coupled: tuple[CoupledUnits, ...] = ()
    fixed: int = 0

    def units_of(self, target: Target) -> int:
        """The number of units that the pattern divides a tensor into."""
        return target.weights // self.pattern.unit_size

    @property
    def ranked_units(self) -> list[int]:
        """The numbers of units of what is ranked: the coupled units, or the members."""
        return [one.units for one in self.coupled] or [self.units_of(target) for target in self.members]

    def share_dropped(self, dropped: Sequence[int]) -> float:
        """The sparsity of the group, given the number of dropped units of each that is ranked."""
        units = sum(self.ranked_units) + self.fixed
        return float(Fraction(sum(dropped), max(units, 1)) * self.pattern.unit_sparsity)

    @property
    def criterion(self) -> Criterion | None:
        """The criterion that ranks the weights of the members; None where a solver prunes them, and for structures."""
        return None if self.coupled else CRITERIA.get(self.config.method)

    @property
    def allots(self) -> bool:
        """Whether the scope decides at the first update how many units each member loses in the end."""
        return SCOPES[self.scope].sees_matrices

    @property
    def reads(self) -> set[str]:
        """What is read for every update besides the weights, see `methods.table.reads_of`."""
        config, scope = self.config, "layer" if self.allots else self.scope
        return reads_of(config.method, scope, config.structure, config.reconstruction if self.coupled else None)

    @property
    def reads_to_allot(self) -> set[str]:
        """What is read for the first update, to decide how many units each member loses; see `Scope.reads`."""
        reads = SCOPES[self.scope].reads
        return {reads} if self.allots and reads is not None else set()

    @property
    def read_names(self) -> list[str]:
        """For what it is read: the names of all members, of those that read the coupled units, or of whole layers."""
        if "similarity" in self.reads:
            return [units.path for units in self.coupled]
        if self.coupled:
            return list(dict.fromkeys(part.name for units in self.coupled for part in units.readers))
        return [target.name for target in self.members]

    @property
    def needs_a_step(self) -> bool:
        """Whether an update needs an optimizer step before it."""
        config = self.config
        return needs_a_step(config.method, self.scope, config.structure, config.reconstruction)

    @property
    def remembers(self) -> bool:
        """Whether the criterion remembers something from step to step."""
        return self.criterion is not None and bool(self.criterion.memory)

    @property
    def regrows(self) -> bool:
        """Whether weights that the criterion masked may come back."""
        return self.criterion is not None and self.criterion.regrows

    def pools(
        self,
        window: Window,
        step: int,
        start: float,
        dropped: Sequence[int],
        inputs: Sequence[torch.Tensor | None] | None = None,
        allotted: Sequence[int] | None = None,
    ) -> list[Pool]:
        """How many units are dropped after `step`, if the schedule starts at the sparsity `start`.

        `dropped` has the number of units of each member, or of each coupled units, that are dropped already, `inputs`
        the norms of a member's input features, for a scope that reads them, and `allotted` the number of units that
        each member loses in the end, for a scope that decides that. Without them, as in a plan, such a scope counts as
        `global`.
        """
        initial = max(start, min(self.config.initial_sparsity or 0.0, self.final))
        sparsity = sparsity_at(self.config.schedule, step, window.begin, window.end, initial, self.final)
        share = Fraction(str(sparsity)) / self.pattern.unit_sparsity
        if allotted is not None:
            total = min(max(count_of(share, sum(self.ranked_units)), sum(dropped)), sum(allotted))
            counts = counts_on_the_way(allotted, dropped, total)
            return [Pool((member,), count) for member, count in enumerate(counts)]
        sides: list[tuple[int, ...]] = [(one.units,) for one in self.coupled]
        sides = sides or [target.sides for target in self.members]
        prunable = [
            Prunable(*one)
            for one in zip(self.ranked_units, dropped, sides, inputs or [None] * len(dropped), strict=True)
        ]
        undecided = self.allots or (SCOPES[self.scope].reads is not None and inputs is None)
        scope = SCOPES["global" if undecided else self.scope]
        pools = scope.pools(prunable, share)
        if not self.coupled:
            return pools
        units = [sum(self.coupled[member].units for member in pool.members) for pool in pools]
        round_to = self.config.round_to
        least = [1 if self.config.structure == "layers" else (round_to or 1) * len(pool.members) for pool in pools]
        if self.fixed:  # layers, in one pool
            least = [0]
            pools = [replace(pools[0], count=max(count_of(share, units[0] + self.fixed), sum(dropped)))]
        if round_to is not None:
            gone = [[dropped[member] for member in pool.members] for pool in pools]
            counts = [rounded_count(pool.count, round_to, there) for pool, there in zip(pools, gone, strict=True)]
            pools = [replace(pool, count=count) for pool, count in zip(pools, counts, strict=True)]
        most = [number - kept for number, kept in zip(units, least, strict=True)]
        return [replace(pool, count=min(pool.count, number)) for pool, number in zip(pools, most, strict=True)]

    def final_counts(
        self,
        dropped: Sequence[int],
        matrices: Sequence[Iterable[Seen]],
        blocks: Sequence[str],
        inputs: Sequence[torch.Tensor | None] | None = None,
        add_up: Callable[[torch.Tensor], torch.Tensor] = alone,
    ) -> list[int]:
        """How many units of each member are dropped in the end, of a group that is not ranked together.

        All sequences are in the order of the members; see `Prunable` for what they have.
        """
        inputs = inputs if inputs is not None else [None] * len(self.members)
        prunable = [
            Prunable(units, gone, target.sides, norms, seen, self.pattern, block, add_up)
            for target, units, gone, norms, seen, block in zip(
                self.members, self.ranked_units, dropped, inputs, matrices, blocks, strict=True
            )
        ]
        pools = SCOPES[self.scope].pools(prunable, Fraction(str(self.final)) / self.pattern.unit_sparsity)
        counts = {pool.members: pool.count for pool in pools}
        return [counts[member,] for member in range(len(self.members))]

    def penalty_weight(self, window: Window, step: int, start: float) -> float:
        """The factor of the penalty on the members after `step` completed steps; see `PruningConfig`."""
        if self.config.penalty_weight is None or not window.begin <= step < window.end or self.final <= start:
            return 0.0
        sparsity = sparsity_at(self.config.schedule, step, window.begin, window.end, start, self.final)
        return self.config.penalty_weight * (sparsity - start) / (self.final - start)


def make_groups(index: int, config: PruningConfig, targets: Sequence[Target]) -> list[Group]:
    """The groups of one configuration; each tensor of an override, or of the scope `layer`, is a group of its own.

    Raises TargetError if an override matches none of the targets, or if the pattern does not fit a tensor.
    """
    if config.method == "keep" or not targets:
        return []
    pattern = config.parsed_pattern
    for target in targets:
        _check_shape(config, pattern, target)
    overrides = config.overrides if isinstance(config.overrides, dict) else {}
    names = [name for target in targets for name in (target.name, *target.aliases)]
    check_expressions("overrides", list(overrides), names)

    assert config.sparsity is not None
    alone = []
    together = []
    for target in targets:
        sparsity = next((value for key, value in overrides.items() if target.matches(key)), None)
        if sparsity is not None or config.scope == "layer":
            final = config.sparsity if sparsity is None else sparsity
            alone.append(Group(index, config, pattern, (target,), "layer", final))
        else:
            together.append(target)
    if together:
        alone.append(Group(index, config, pattern, tuple(together), config.scope, config.sparsity))
    return alone


def make_unit_group(
    index: int,
    config: PruningConfig,
    members: Sequence[Target],
    coupled: Sequence[CoupledUnits],
    fixed: int = 0,
    own_sparsity: float | None = None,
) -> Group:
    """A group of units of a structure, and all tensors that they are part of; layers are ranked together.

    Those with an `own_sparsity`, that of an override, are ranked in each layer by themselves.
    """
    assert config.sparsity is not None
    scope = "global" if config.structure == "layers" else config.scope if own_sparsity is None else "layer"
    final = config.sparsity if own_sparsity is None else own_sparsity
    return Group(index, config, config.parsed_pattern, tuple(members), scope, final, tuple(coupled), fixed)


def _check_shape(config: PruningConfig, pattern: Pattern, target: Target) -> None:
    if pattern.name == "unstructured":
        return
    why = "its input dimension is not known" if target.layout == "flat" else pattern.misfit(target.matrices)
    if why is not None:
        raise TargetError(
            f"{target.name}: the pattern {config.pattern!r} does not fit the shape {target.shape}: {why}; "
            "exclude the tensor or choose another pattern"
        )


def as_steps(total_steps: Any) -> int:
    """A number of optimizer steps. Raises PruningConfigError for what is none."""
    if not isinstance(total_steps, numbers.Integral) or isinstance(total_steps, bool) or total_steps < 1:
        raise PruningConfigError(
            "total_steps", f"expected the number of optimizer steps of the training, 1 or more, got {total_steps!r}"
        )
    return int(total_steps)


def make_windows(configs: Sequence[PruningConfig], groups: Sequence[Group], total_steps: int) -> list[Window]:
    """When each configuration updates masks in a training of `total_steps`.

    Raises PruningConfigError if one does not fit into training, or two prune a tensor at the same time.
    """
    windows = [Window(*config.window(total_steps)) for config in configs]
    names: list[dict[str, None]] = [{} for _ in configs]
    for group in groups:
        names[group.config_index].update(dict.fromkeys(target.name for target in group.members))
    for later, window in enumerate(windows):
        for earlier, before in enumerate(windows[:later]):
            shared = [name for name in names[later] if name in names[earlier]]
            structures = configs[later].structure, configs[earlier].structure
            if None not in structures and structures[0] != structures[1]:
                continue  # such as the neurons of layers, some of which are removed
            if shared and window.begin < before.end:
                raise PruningConfigError(
                    "begin",
                    f"expected configuration {later + 1} to begin at or after step {before.end}, where configuration "
                    f"{earlier + 1} ends, as both prune {shared[0]!r}, got step {window.begin}",
                )
    return windows


def sharing_window(groups: Sequence[Group], windows: Sequence[Window], total_steps: int) -> tuple[int, int]:
    """The steps from which on weights share values, and from which on they share as few as they were asked to."""
    begin = max((windows[group.config_index].end for group in groups if windows), default=0)  # none before the start
    return begin, (begin + total_steps) // 2


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

    def of_model(self, model: nn.Module) -> "Plan":
        """The same plan with `weights_left`, of the model that was planned for, and with layers that must stay counted.

        It stays None where no structure is pruned, and where it depends on which layers are removed.
        """
        if not self.units:
            return self
        plain = plain_model(model)
        removed = {f"{one.structure} of {one.path}": one.removed for one in self.units}
        families = list({_units_of(group): _whole_family(group, plain) for group in self._groups}.values())
        shapes = {name: torch.empty(shape_of(one), device="meta") for name, one in named_parameters(model)}
        counts = set()
        for last in (False, True):  # the layers that are removed are the first, or the last
            dropped: dict[str, torch.Tensor] = {}
            for group in self._groups:
                dropped |= _some_dropped(group, removed, last)
            counts.add(sum(tensor.numel() for tensor in cut_of(families, dropped).tensors(shapes).values()))
        depths = {family.stack: len(family.groups) for family in families if family.structure == "layers"}
        units = [replace(one, of=depths[one.path]) if one.structure == "layers" else one for one in self.units]
        return replace(self, units=units, weights_left=counts.pop() if len(counts) == 1 else None)

    @property
    def final_sparsity(self) -> float:
        """The share of masked weights of all targets after the last update."""
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
    for step in _all_update_steps(groups, windows):
        for index, group in enumerate(groups):
            window = windows[group.config_index]
            if not window.due(step):
                continue
            if group.coupled:
                units = _units_of(group)
                start = starts.setdefault(index, group.share_dropped(dropped_of[units]))
                planned_units[units], shares = _plan_units(group, window, step, start, dropped_of[units])
                for name, share in shares.items():
                    by_group = gone.setdefault(name, {})
                    by_group[units] = share
                    kept = math.prod((1 - one for one in by_group.values()), start=Fraction(1))
                    masked[name] = max(masked[name], (1 - kept) * weights_of[name])
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
    left = {
        name: weights_of[name] * math.prod((1 - one for one in gone.get(name, {}).values()), start=Fraction(1))
        for name in asked.keys() & counted
    }
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
    )


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


def _some_dropped(group: Group, removed: Mapping[str, int], last: bool) -> dict[str, torch.Tensor]:
    """Flags (bool) of as many units of a group as will be removed, by the name of their coupled units.

    Of layers, and of units that are ranked together, they are those of the first layers, or of the last.
    """
    if _are_ranked_together(group):
        left = removed[f"{group.config.structure} of {_stack_of(group)}"]
        found = {}
        for units in reversed(group.coupled) if last else group.coupled:
            number = min(left, units.units - 1)
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
