"""Plans, made without any weights: configurations -> groups of tensors -> counts to prune at a step."""

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch

from ..config.pruning import PruningConfig
from ..errors import PruningConfigError, TargetError
from ..methods.criteria import CRITERIA, Criterion
from ..methods.patterns import Pattern
from ..methods.schedules import sparsity_at, update_steps
from ..methods.scopes import SCOPES, Pool, Prunable
from ..methods.table import needs_a_step, reads_of
from ..model.layouts import Target
from ..model.targets import check_expressions
from ..structure.coupled import CoupledUnits


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
    they are part of.
    """

    config_index: int
    config: PruningConfig
    pattern: Pattern
    members: tuple[Target, ...]
    scope: str
    final: float
    coupled: tuple[CoupledUnits, ...] = ()

    def units_of(self, target: Target) -> int:
        """The number of units that the pattern divides a tensor into."""
        return target.weights // self.pattern.unit_size

    @property
    def ranked_units(self) -> list[int]:
        """The numbers of units of what is ranked: the coupled units, or the members."""
        return [one.units for one in self.coupled] or [self.units_of(target) for target in self.members]

    def share_dropped(self, dropped: Sequence[int]) -> float:
        """The sparsity of the group, given the number of dropped units of each that is ranked."""
        return float(Fraction(sum(dropped), max(sum(self.ranked_units), 1)) * self.pattern.unit_sparsity)

    @property
    def criterion(self) -> Criterion | None:
        """The criterion that ranks the weights of the members; None where a solver prunes them, and for structures."""
        return None if self.coupled else CRITERIA.get(self.config.method)

    @property
    def reads(self) -> set[str]:
        """What method and scope read besides the weights: `inputs`, `gradients`, both or nothing."""
        return reads_of(self.config.method, self.scope, self.config.structure)

    @property
    def read_names(self) -> list[str]:
        """The names of the tensors for which it is read: all members, or those that read the coupled units."""
        if self.coupled:
            return list(dict.fromkeys(part.name for units in self.coupled for part in units.readers))
        return [target.name for target in self.members]

    @property
    def needs_a_step(self) -> bool:
        """Whether an update needs an optimizer step before it."""
        return needs_a_step(self.config.method, self.scope, self.config.structure)

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
    ) -> list[Pool]:
        """How many units are dropped after `step`, if the schedule starts at the sparsity `start`.

        `dropped` has the number of units of each member, or of each coupled units, that are dropped already, `inputs`
        the norms of a member's input features, for a scope that reads them. Without them, as in a plan, such a scope
        counts as `global`.
        """
        initial = max(start, min(self.config.initial_sparsity or 0.0, self.final))
        sparsity = sparsity_at(self.config.schedule, step, window.begin, window.end, initial, self.final)
        sides: list[tuple[int, ...]] = [(one.units,) for one in self.coupled]
        sides = sides or [target.sides for target in self.members]
        prunable = [
            Prunable(*one)
            for one in zip(self.ranked_units, dropped, sides, inputs or [None] * len(dropped), strict=True)
        ]
        scope = SCOPES["global" if SCOPES[self.scope].reads is not None and inputs is None else self.scope]
        return scope.pools(prunable, Fraction(str(sparsity)) / self.pattern.unit_sparsity)

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
    index: int, config: PruningConfig, members: Sequence[Target], coupled: Sequence[CoupledUnits]
) -> Group:
    """A group of units of a structure, and all tensors that they are part of; layers are ranked together."""
    assert config.sparsity is not None
    scope = "global" if config.structure == "layers" else config.scope
    return Group(index, config, config.parsed_pattern, tuple(members), scope, config.sparsity, tuple(coupled))


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
            if configs[later].structure is not None and configs[earlier].structure is not None:
                continue  # such as the neurons of layers, some of which are removed
            if shared and window.begin < before.end:
                raise PruningConfigError(
                    "begin",
                    f"expected configuration {later + 1} to begin at or after step {before.end}, where configuration "
                    f"{earlier + 1} ends, as both prune {shared[0]!r}, got step {window.begin}",
                )
    return windows


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a plan. `masked` is its number of masked weights now; `final_sparsity` is None if a ranking across
    several tensors will decide it."""

    name: str
    shape: tuple[int, ...]
    weights: int
    masked: int
    final_sparsity: float | None


@dataclass(frozen=True)
class PlannedUpdate:
    """A mask update after `step` completed optimizer steps; `sparsity` is then the share of masked weights."""

    step: int
    sparsity: float


@dataclass(frozen=True)
class Plan:
    """What would be pruned, how much and when. `weights` counts those of the targets, `all_weights` the model's.

    `left_out` maps the names of weights of layers that are not pruned by default to the reason.
    """

    tensors: list[PlannedTensor]
    updates: list[PlannedUpdate]
    total_steps: int
    weights: int
    all_weights: int
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def final_sparsity(self) -> float:
        """The share of masked weights of all targets after the last update."""
        if self.updates:
            return self.updates[-1].sparsity
        return sum(tensor.masked for tensor in self.tensors) / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"final_sparsity": self.final_sparsity}


def make_plan(
    groups: Sequence[Group],
    windows: Sequence[Window],
    tensors: Sequence[PlannedTensor],
    total_steps: int,
    all_weights: int,
) -> Plan:
    """Run the schedule on counts alone, from `tensors` with their current numbers of masked weights.

    The counts are those of training, unless existing zeros lie unevenly in the units of a pattern.
    """
    masked = {tensor.name: Fraction(tensor.masked) for tensor in tensors}
    there = dict(masked)
    unit_shares: dict[int, dict[str, Fraction]] = {}
    ranked: set[str] = set()
    starts: dict[int, float] = {}
    updates = []
    for step in _all_update_steps(groups, windows):
        for index, group in enumerate(groups):
            window = windows[group.config_index]
            if not window.due(step):
                continue
            if group.coupled:
                dropped = _dropped_units(group, there)
                start = starts.setdefault(index, group.share_dropped(dropped))
                unit_shares[index], of_units = _plan_units(group, window, step, start, dropped)
                ranked |= of_units
                for target in group.members:  # units of several kinds, such as neurons of layers that are removed
                    kept = [1 - shares[target.name] for shares in unit_shares.values() if target.name in shares]
                    masked[target.name] = max(
                        masked[target.name], (1 - math.prod(kept, start=Fraction(1))) * target.weights
                    )
                continue
            weights_a_unit = group.pattern.unit_size * group.pattern.unit_sparsity
            dropped = [int(masked[target.name] / weights_a_unit) for target in group.members]
            starts.setdefault(index, group.share_dropped(dropped))
            for pool in group.pools(window, step, starts[index], dropped):
                members = [group.members[member] for member in pool.members]
                units = sum(group.units_of(target) for target in members)
                for target in members:
                    # The ranking will decide how many each loses; an even split keeps the total exact.
                    share = Fraction(group.units_of(target), max(units, 1)) * pool.count * weights_a_unit
                    masked[target.name] = share if len(members) > 1 else max(masked[target.name], share)
                if len(members) > 1:
                    ranked.update(target.name for target in members)
        weights = sum(tensor.weights for tensor in tensors)
        updates.append(PlannedUpdate(step, float(sum(masked.values(), Fraction(0)) / max(weights, 1))))
    planned = [
        replace(
            tensor,
            final_sparsity=None if tensor.name in ranked else float(masked[tensor.name] / max(tensor.weights, 1)),
        )
        for tensor in tensors
    ]
    return Plan(planned, updates, total_steps, sum(tensor.weights for tensor in tensors), all_weights)


def _plan_units(
    group: Group, window: Window, step: int, start: float, dropped: Sequence[int]
) -> tuple[dict[str, Fraction], set[str]]:
    """The share of each tensor's weights that a group of coupled units has masked after an update.

    Also returned are the names of the tensors for which a ranking across several will decide; all have the mean.
    """
    of_tensor: dict[str, list[Fraction]] = {}
    ranked: set[str] = set()
    for pool in group.pools(window, step, start, dropped):
        members = [group.coupled[member] for member in pool.members]
        share = Fraction(pool.count, sum(member.units for member in members))
        for member in members:
            for name in member.names:
                of_tensor.setdefault(name, []).append(share)
            ranked.update(member.names if len(members) > 1 else ())
    return {name: sum(some, Fraction(0)) / len(some) for name, some in of_tensor.items()}, ranked


def _dropped_units(group: Group, masked: Mapping[str, Fraction]) -> list[int]:
    """The number of units of each coupled units that are dropped already, given the masked weights of each tensor."""
    weights = {target.name: target.weights for target in group.members}
    shares = [min(masked[name] / weights[name] for name in units.names) for units in group.coupled]
    return [int(share * units.units) for share, units in zip(shares, group.coupled, strict=True)]


def _all_update_steps(groups: Sequence[Group], windows: Sequence[Window]) -> list[int]:
    used = [windows[index] for index in {group.config_index for group in groups}]
    return sorted({step for window in used for step in update_steps(window.begin, window.end, window.frequency)})
