"""Groups of tensors that a configuration prunes together, made without weights, and the counts to prune at a step."""

import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch

from ..config.pruning import PruningConfig
from ..errors import PruningConfigError, TargetError
from ..methods.allocation import counts_on_the_way
from ..methods.criteria import CRITERIA, Criterion
from ..methods.patterns import Pattern, count_of, rounded_count
from ..methods.schedules import sparsity_at
from ..methods.scopes import SCOPES, Pool, Prunable, Seen
from ..methods.table import needs_a_step, reads_of
from ..model.layouts import Target
from ..model.targets import check_expressions
from ..structure.units import CoupledUnits
from .selection import alone


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
