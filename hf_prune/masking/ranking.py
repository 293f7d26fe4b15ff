"""Which weights are dropped when tensors are ranked together: criterion and pattern -> sort keys -> `selection`.

A member is one tensor of a pool: its units and their keys, and how its mask changes when units are dropped. Tensors
pruned weight by weight are ranked slice by slice; for other patterns each process ranks the units that lie wholly in
its shard, and one process ranks those that are split between several (`units`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch

from ..engines.processes import of_first_process, rank
from ..errors import PruningStateError
from ..methods import scopes
from ..methods.criteria import CRITERIA
from ..methods.keys import order_keys
from ..methods.patterns import PATTERNS
from ..methods.solvers import SOLVERS, Problem
from ..model.layouts import Target, as_matrices, from_matrices
from .groups import Group
from .local import LocalTensor
from .selection import AllReduce, KeyPool, KeySource, alone, lowest
from .units import SharedUnits, divide, share_units

# Up to this many weights (16 MiB of keys), keys are computed once and kept, not computed again for each pass.
_KEYS_HELD = 1 << 22

_Chunk = TypeVar("_Chunk")


@dataclass(frozen=True)
class Change:
    """What an update did to a tensor.

    `positions` are those of newly masked weights, if known; `values` the new values of all weights (flat), if any kept
    weight changed; `shift` is what is added to the bias of its layer.
    """

    target: Target
    positions: torch.Tensor | None = None
    values: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class WeightMember:
    """A tensor that is pruned weight by weight."""

    def __init__(self, group: Group, held: LocalTensor):
        self.group, self.held = group, held
        self.units = held.target.weights

    def dropped(self, counts_all: bool) -> int:
        """This process's share of the number of dropped units."""
        return self.held.masked if counts_all else 0

    def lost(self) -> int:
        """This process's share of the number of dropped units that cannot come back."""
        return int(self.held.candidates.logical_not().sum()) if self.held.counted else 0

    def sources(self, offset: int, keep_keys: bool) -> list[KeySource]:
        """The keys, computed once or for each pass; `offset` is the index of the tensor's first unit in the pool."""
        region = self.held.holding.region
        chunks = _cached(self._chunks) if keep_keys else self._chunks
        return [KeySource(chunks, lambda positions: region.indices(positions) + offset, self.held.counted)]

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        held = self.held
        for part in held.pieces():
            keys = order_keys(_scores(self.group, held, part))
            yield keys, held.candidates[part] if held.masked else None

    def drop(self, drops: Sequence[torch.Tensor]) -> Change:
        """Mask what `selection.lowest` chose."""
        [drop] = drops
        mask, regrowable = self.held.mask, self.held.regrowable
        if regrowable is not None:
            mask.copy_(regrowable)
        if drop.dtype == torch.bool:
            mask.logical_and_(drop.logical_not_())
        else:
            mask.index_fill_(0, drop, False)
        if regrowable is not None:
            return Change(self.held.target, values=self.held.weight)
        return Change(self.held.target, None if drop.dtype == torch.bool else drop)


class UnitMember:
    """A tensor that is pruned in groups or blocks.

    Every process must create it, and drop units of it, in the same order; if `is_shared`, some units are split between
    processes, which exchange what they hold of them.
    """

    def __init__(self, group: Group, held: LocalTensor, is_shared: bool):
        self.group, self.held = group, held
        self.units = group.units_of(held.target)
        self._rules = PATTERNS[group.pattern.name]
        self._division = divide(held.target, group.pattern, held.holding.region)
        self._shared: SharedUnits | None = None
        self._shared_mask: SharedUnits | None = None
        if is_shared:
            scores = _scores(group, held)
            self._shared = share_units(self._division, held.holding, scores, held.candidates)
            if held.regrowable is not None:
                self._shared_mask = share_units(self._division, held.holding, scores, held.mask)

    def dropped(self, counts_all: bool) -> int:
        """This process's share of the number of dropped units."""
        if self.held.regrowable is None:
            return self.lost()
        return self._count_dropped(self.held.mask, self._shared_mask)

    def lost(self) -> int:
        """This process's share of the number of dropped units that cannot come back."""
        return self._count_dropped(self.held.candidates, self._shared)

    def _count_dropped(self, mask: torch.Tensor, shared: SharedUnits | None) -> int:
        masks = [self._division.whole_units(mask), *([shared.kept] if shared is not None else [])]
        dropped = [int(self._rules.dropped(one, self.group.pattern).sum()) for one in masks]
        return sum(dropped) if self.held.counted else 0

    def sources(self, offset: int, keep_keys: bool) -> list[KeySource]:
        """The keys of whole units and of shared ones; `offset` is the index of the tensor's first unit in the pool."""
        sources = [self._source(*self._whole(), lambda units: self._division.unit_indices(units) + offset)]
        if self._shared is not None:
            ids = self._shared.indices
            sources.append(self._source(self._shared.scores, self._shared.kept, lambda units: ids[units] + offset))
        return sources

    def drop(self, drops: Sequence[torch.Tensor]) -> Change:
        """Mask what `selection.lowest` chose in each source."""
        self._division.write(self.held.mask, self._kept(*self._whole(), drops[0]))
        if self._shared is not None:
            self._shared.give_back(self._kept(self._shared.scores, self._shared.kept, drops[1]), self.held.mask)
        return Change(self.held.target, values=None if self.held.regrowable is None else self.held.weight)

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores and masks of the units that lie wholly in this shard."""
        scores = _scores(self.group, self.held)
        return self._division.whole_units(scores), self._division.whole_units(self.held.candidates)

    def _source(
        self, scores: torch.Tensor, mask: torch.Tensor, indices: Callable[[torch.Tensor], torch.Tensor]
    ) -> KeySource:
        pattern, config = self.group.pattern, self.group.config
        norm = "sum" if CRITERIA[config.method].signed else config.block_norm
        keys = order_keys(self._rules.scores(scores, mask, pattern, norm)).reshape(-1)
        kept = ~self._rules.dropped(mask, pattern).reshape(-1)
        return KeySource(lambda: [(keys, kept)], indices, self.held.counted)

    def _kept(self, scores: torch.Tensor, mask: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        """The mask of a stack after units are dropped, given by positions (int64) or flags (bool)."""
        units = self._rules.dropped(mask, self.group.pattern)
        if drop.dtype == torch.int64:
            drop = torch.zeros(units.numel(), dtype=torch.bool, device=mask.device).index_fill_(0, drop, True)
        return self._rules.drop(drop.reshape(units.shape), scores, mask, self.group.pattern)


class SolvedMember:
    """A tensor that a solver prunes; it must not be sharded."""

    def __init__(self, group: Group, held: LocalTensor):
        self.group, self.held = group, held
        self.units = group.units_of(held.target)
        self._rules = PATTERNS[group.pattern.name]

    def dropped(self, counts_all: bool) -> int:
        """The number of dropped units."""
        return int(self._rules.dropped(self._matrices(self.held.mask), self.group.pattern).sum())

    def lost(self) -> int:
        """The same: what a solver has masked cannot come back."""
        return self.dropped(True)

    def solve(self, drop: int) -> Change:
        """Let the solver drop this many more units. Raises PruningStateError if it does not."""
        config, target, pattern = self.group.config, self.held.target, self.group.pattern
        solver, before = SOLVERS[config.method], self._matrices(self.held.mask)
        statistic, moments = self.held.statistic(solver.reads), self.held.moments
        kept, values = solver.solve(
            Problem(
                name=target.name,
                weight=self._matrices(self.held.weight).float(),
                kept=before.clone(),
                pattern=pattern,
                drop=drop,
                statistic=self._matrices(statistic) if statistic is not None else None,
                seed=config.pruning_seed,
                gram=moments.gram.to(before.device) if moments is not None else None,
            )
        )
        if kept.dtype != torch.bool or not kept.shape == before.shape == values.shape:
            raise PruningStateError(
                f"{target.name}: the solver {config.method!r} must return a bool mask and values of the shape "
                f"{tuple(before.shape)}, got {kept.dtype} of {tuple(kept.shape)} and values of {tuple(values.shape)}"
            )
        if solver.reads == "products":  # where processors round differently, they could even choose other masks
            kept_as_numbers, values = of_first_process(kept.to(torch.uint8), values)
            kept = kept_as_numbers.bool()
        dropped = int(self._rules.dropped(kept, pattern).sum()) - self.dropped(True)
        if dropped != drop or bool((kept & ~before).any()) or not bool(values[kept].isfinite().all()):
            raise PruningStateError(
                f"{target.name}: the solver {config.method!r} must drop {drop} more units, leave masked weights "
                f"masked and return finite values, got {dropped} units; the tensor was left unchanged"
            )
        self.held.mask.copy_(from_matrices(kept, target.layout, target.shape).reshape(-1))
        return Change(target, values=from_matrices(values, target.layout, target.shape).reshape(-1))

    def _matrices(self, part: torch.Tensor) -> torch.Tensor:
        return as_matrices(part.view(self.held.target.shape), self.held.target.layout)


AnyMember = WeightMember | UnitMember | SolvedMember


@dataclass(frozen=True)
class _Contest:
    """Members ranked together: the lowest `count` of their units are dropped, in addition to the `lost` ones."""

    members: Sequence[AnyMember]
    count: int
    lost: int


def update_masks(
    groups: Sequence[Group],
    held: Mapping[str, LocalTensor],
    pools_of: Callable[[int, list[int]], Sequence[scopes.Pool]],
    all_reduce: AllReduce,
) -> Iterator[Change]:
    """Update the masks of the tensors of these groups, for this process's shards; no tensor is in two groups.

    Every process must call it with the same groups.

    Args:
        groups: what is pruned together.
        held: the tensors by name.
        pools_of: (place of a group, dropped units of each member) -> pools, with the units to drop in each.
        all_reduce: adds up the counts of all processes.

    Yields what changed in each tensor, once its mask is updated.
    """
    members = _make_members(groups, held, all_reduce)
    counts_all = all_reduce is alone or rank() == 0
    everyone = [member for group_members in members for member in group_members]
    regrowing = [member for member in everyone if member.held.regrowable is not None]
    counts = [*(member.dropped(counts_all) for member in everyone), *(member.lost() for member in regrowing)]
    summed = all_reduce(torch.tensor(counts, dtype=torch.int64)).tolist()
    dropped = iter(summed[: len(everyone)])
    lost_of = dict(zip(map(id, regrowing), summed[len(everyone) :], strict=True))
    contests = []
    for place, group_members in enumerate(members):
        gone = list(islice(dropped, len(group_members)))
        for pool in pools_of(place, gone):
            competing = [group_members[member] for member in pool.members]
            before = [lost_of.get(id(group_members[member]), gone[member]) for member in pool.members]
            if pool.count > sum(before):
                contests.append(_Contest(competing, pool.count - sum(before), sum(before)))
    yield from _decide(contests, all_reduce)


def _make_members(
    groups: Sequence[Group], held: Mapping[str, LocalTensor], all_reduce: AllReduce
) -> list[list[AnyMember]]:
    """The members of each group."""
    tensors = [(group, held[target.name]) for group in groups for target in group.members]
    shared = [_shared_weights(group, one) for group, one in tensors]
    if any(group.pattern.name != "unstructured" for group in groups):
        shared = all_reduce(torch.tensor(shared, dtype=torch.int64)).tolist()
    members = iter([_make_member(group, one, number > 0) for (group, one), number in zip(tensors, shared, strict=True)])
    return [[next(members) for _ in group.members] for group in groups]


def _make_member(group: Group, held: LocalTensor, is_shared: bool) -> AnyMember:
    if group.config.method in SOLVERS:
        return SolvedMember(group, held)
    return WeightMember(group, held) if group.pattern.name == "unstructured" else UnitMember(group, held, is_shared)


def _shared_weights(group: Group, held: LocalTensor) -> int:
    """The number of weights here whose units are split between processes."""
    if group.pattern.name == "unstructured" or not held.holding.sharded:
        return 0
    return len(divide(held.target, group.pattern, held.holding.region).shared_positions())


def _decide(contests: Sequence[_Contest], all_reduce: AllReduce) -> Iterator[Change]:
    """Drop the lowest units of each contest."""
    ranked = [contest for contest in contests if not isinstance(contest.members[0], SolvedMember)]
    members = [member for contest in ranked for member in contest.members if not isinstance(member, SolvedMember)]
    keep_keys = sum(member.held.weight.numel() for member in members) <= _KEYS_HELD
    pools, sources_of = [], []
    for contest in ranked:
        offset = 0
        sources: list[KeySource] = []
        for member in contest.members:
            assert not isinstance(member, SolvedMember)
            sources_of.append(member.sources(offset, keep_keys))
            sources += sources_of[-1]
            offset += member.units
        pools.append(KeyPool(sources, count=contest.count, kept=offset - contest.lost, units=offset))
    chosen = lowest(pools, all_reduce)
    for member, sources in zip(members, sources_of, strict=True):
        yield member.drop(list(islice(chosen, len(sources))))
    for contest in contests:
        for member in contest.members:
            if isinstance(member, SolvedMember):
                yield member.solve(contest.count)


def _scores(group: Group, held: LocalTensor, part: slice = slice(None)) -> torch.Tensor:
    """The scores of the weights of a slice."""
    criterion = CRITERIA[group.config.method]
    return criterion.score(held.weight[part], held.piece(criterion, group.config.pruning_seed, part))


def _cached(source: Callable[[], Iterable[_Chunk]]) -> Callable[[], Iterable[_Chunk]]:
    """The same chunks, computed once."""
    chunks = list(source())
    return lambda: chunks
