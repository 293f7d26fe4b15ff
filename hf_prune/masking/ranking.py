"""Which weights of tensors that compete go: criterion and pattern -> keys -> `selection`, on what this process holds.

A member is one tensor of a pool: its units and their keys, and what becomes of its mask once some units go. Tensors
that are pruned weight by weight are ranked piece by piece; for other patterns the whole units of the part that is held
are ranked here, and units that several processes share by one of them (`unit_shards`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

import torch

from ..engines.holdings import Holding
from ..engines.processes import rank
from ..methods import scopes as allocation
from ..methods.criteria import CRITERIA, NEEDS, Piece
from ..methods.keys import order_keys
from ..methods.patterns import PATTERNS
from ..model.layouts import Target, input_features
from .plan import Group
from .selection import AllReduce, KeyPool, KeySource, alone, lowest
from .units import SharedUnits, divide, share_units

# Weights ranked at a time: small enough for a CPU's cache, large enough to keep an accelerator busy.
_CPU_PIECE = 1 << 18


_ACCELERATOR_PIECE = 1 << 24


# Up to this many weights (16 MiB of keys) keys are made once and held, not made again for each pass.
_KEYS_HELD = 1 << 22


_Chunk = TypeVar("_Chunk")


@dataclass(frozen=True)
class LocalTensor:
    """A tensor to prune as this process holds it: `weight` and `mask` are its part, flat; the mask is changed in place.

    `masked` is how many weights are masked on all processes; `counted` whether this process counts what it holds, which
    of several that hold the same one does. `statistic` is what was collected for criteria that read more than weights:
    the norm of each input feature, or the gradient of each weight.
    """

    target: Target
    holding: Holding
    weight: torch.Tensor
    mask: torch.Tensor
    masked: int
    counted: bool
    statistic: torch.Tensor | None = None

    def scores(self, group: Group, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The scores of the weights from a position to another."""
        weight = self.weight[start:stop]
        piece = Piece(self.target.name, start, group.config.pruning_seed, self.holding.region.indices)
        need = NEEDS.get(group.config.method)
        if need is not None:
            assert self.statistic is not None  # the pruner has seen to it
            if need == "gradients":
                statistic = self.statistic[start:stop]
            else:
                columns = input_features(piece.indices(len(weight), weight.device), self.target)
                statistic = self.statistic.to(weight.device)[columns]
            piece = replace(piece, statistic=statistic)
        return CRITERIA[group.config.method](weight, piece)


class WeightMember:
    """A tensor that is pruned weight by weight."""

    def __init__(self, group: Group, held: LocalTensor):
        self.group, self.held = group, held
        self.units = held.target.weights

    def dropped(self, counts_all: bool) -> int:
        """What this process adds to the number of units that are dropped on all."""
        return self.held.masked if counts_all else 0

    def sources(self, offset: int, keep_keys: bool) -> list[KeySource]:
        """The keys, made once or for each pass; the first unit of the tensor has the index `offset` in the pool."""
        region = self.held.holding.region
        chunks = _cached(self._chunks) if keep_keys else self._chunks
        return [KeySource(chunks, lambda positions: region.indices(positions) + offset, self.held.counted)]

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        held = self.held
        size = _CPU_PIECE if held.weight.device.type == "cpu" else _ACCELERATOR_PIECE
        for start in range(0, max(held.weight.numel(), 1), size):
            keys = order_keys(held.scores(self.group, start, start + size))
            yield keys, held.mask[start : start + size] if held.masked else None

    def drop(self, drops: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Mask what `selection.lowest` chose; the positions of newly masked weights, where they are known."""
        [drop] = drops
        if drop.dtype == torch.bool:
            self.held.mask.logical_and_(drop.logical_not_())
            return None
        self.held.mask.index_fill_(0, drop, False)
        return drop


class UnitMember:
    """A tensor that is pruned in groups or blocks.

    Every process must make it, and drop units of it, in the same order; with `is_shared`, which says that some unit is
    held in parts by several processes, they exchange what they hold of it.
    """

    def __init__(self, group: Group, held: LocalTensor, is_shared: bool):
        self.group, self.held = group, held
        self.units = group.units_of(held.target)
        self._rules = PATTERNS[group.pattern.name]
        self._division = divide(held.target, group.pattern, held.holding.region)
        self._shared: SharedUnits | None = None
        if is_shared:
            self._shared = share_units(self._division, held.holding, held.scores(group), held.mask)

    def dropped(self, counts_all: bool) -> int:
        """What this process adds to the number of units that are dropped on all."""
        masks = [self._division.whole_units(self.held.mask)]
        if self._shared is not None:
            masks.append(self._shared.kept)
        dropped = [int(self._rules.dropped(mask, self.group.pattern).sum()) for mask in masks]
        return sum(dropped) if self.held.counted else 0

    def sources(self, offset: int, keep_keys: bool) -> list[KeySource]:
        """The keys of whole units and of shared ones, for a pool in which the first unit has the index `offset`."""
        sources = [self._source(*self._whole(), lambda units: self._division.unit_indices(units) + offset)]
        if self._shared is not None:
            ids = self._shared.indices
            sources.append(self._source(self._shared.scores, self._shared.kept, lambda units: ids[units] + offset))
        return sources

    def drop(self, drops: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Mask what `selection.lowest` chose in each source."""
        self._division.write(self.held.mask, self._kept(*self._whole(), drops[0]))
        if self._shared is not None:
            self._shared.give_back(self._kept(self._shared.scores, self._shared.kept, drops[1]), self.held.mask)
        return None

    def _whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores and the mask of the whole units here."""
        return self._division.whole_units(self.held.scores(self.group)), self._division.whole_units(self.held.mask)

    def _source(
        self, scores: torch.Tensor, mask: torch.Tensor, indices: Callable[[torch.Tensor], torch.Tensor]
    ) -> KeySource:
        pattern = self.group.pattern
        keys = order_keys(self._rules.scores(scores, mask, pattern, self.group.config.block_norm)).reshape(-1)
        kept = ~self._rules.dropped(mask, pattern).reshape(-1)
        return KeySource(lambda: [(keys, kept)], indices, self.held.counted)

    def _kept(self, scores: torch.Tensor, mask: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
        """A stack's mask once units go: those at positions (int64), or those with a flag (bool)."""
        units = self._rules.dropped(mask, self.group.pattern)
        if drop.dtype == torch.int64:
            drop = torch.zeros(units.numel(), dtype=torch.bool, device=mask.device).index_fill_(0, drop, True)
        return self._rules.drop(drop.reshape(units.shape), scores, mask, self.group.pattern)


AnyMember = WeightMember | UnitMember


@dataclass(frozen=True)
class _Contest:
    """Members that compete: the lowest `count` of their units go, where `dropped` have gone before."""

    members: Sequence[AnyMember]
    count: int
    dropped: int


def update_masks(
    groups: Sequence[Group],
    held: Mapping[str, LocalTensor],
    pools_of: Callable[[int, list[int]], Sequence[allocation.Pool]],
    all_reduce: AllReduce,
) -> Iterator[tuple[Target, torch.Tensor | None]]:
    """Mask what goes of the tensors of these groups, no tensor in two of them, on what this process holds.

    Every process must call it with the same groups.

    Args:
        groups: what is pruned together.
        held: the tensors by name.
        pools_of: from a group's place, and how many units of each member are dropped, to how many shall be.
        all_reduce: adds up the counts of all processes.

    Yields, once it is masked, each tensor that changed, and the positions of newly masked weights if they are known.
    """
    members = _make_members(groups, held, all_reduce)
    counts_all = all_reduce is alone or rank() == 0
    dropped = [member.dropped(counts_all) for group_members in members for member in group_members]
    all_dropped = iter(all_reduce(torch.tensor(dropped, dtype=torch.int64)).tolist())
    contests = []
    for place, group_members in enumerate(members):
        gone = list(islice(all_dropped, len(group_members)))
        for pool in pools_of(place, gone):
            before = sum(gone[member] for member in pool.members)
            if pool.count > before:
                contests.append(
                    _Contest([group_members[member] for member in pool.members], pool.count - before, before)
                )
    yield from _decide(contests, all_reduce)


def _make_members(
    groups: Sequence[Group], held: Mapping[str, LocalTensor], all_reduce: AllReduce
) -> list[list[AnyMember]]:
    """The members of each group."""
    tensors = [(group, held[target.name]) for group in groups for target in group.members]
    shared = [_shared_weights(group, one) for group, one in tensors]
    if any(group.pattern.name != "unstructured" for group in groups):
        shared = all_reduce(torch.tensor(shared, dtype=torch.int64)).tolist()
    members = iter(
        [
            WeightMember(group, one) if group.pattern.name == "unstructured" else UnitMember(group, one, number > 0)
            for (group, one), number in zip(tensors, shared, strict=True)
        ]
    )
    return [[next(members) for _ in group.members] for group in groups]


def _shared_weights(group: Group, held: LocalTensor) -> int:
    """How many weights here are of units that other processes hold parts of."""
    if group.pattern.name == "unstructured" or not held.holding.sharded:
        return 0
    return len(divide(held.target, group.pattern, held.holding.region).shared_positions())


def _decide(contests: Sequence[_Contest], all_reduce: AllReduce) -> Iterator[tuple[Target, torch.Tensor | None]]:
    """Mask what goes in each member of each contest; the positions of newly masked weights, where they are known."""
    members = [member for contest in contests for member in contest.members]
    keep_keys = sum(member.held.weight.numel() for member in members) <= _KEYS_HELD
    pools, sources_of = [], []
    for contest in contests:
        offset = 0
        sources: list[KeySource] = []
        for member in contest.members:
            sources_of.append(member.sources(offset, keep_keys))
            sources += sources_of[-1]
            offset += member.units
        pools.append(KeyPool(sources, count=contest.count, kept=offset - contest.dropped, units=offset))
    chosen = lowest(pools, all_reduce)
    for member, sources in zip(members, sources_of, strict=True):
        yield member.held.target, member.drop(list(islice(chosen, len(sources))))


def _cached(source: Callable[[], Iterable[_Chunk]]) -> Callable[[], Iterable[_Chunk]]:
    """The same chunks, made once."""
    chunks = list(source())
    return lambda: chunks
