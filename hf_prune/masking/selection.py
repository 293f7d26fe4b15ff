"""The exact k lowest scores of one tensor or of many, without sorting and without a copy of the scores.

Scores become int32 keys of the same order. The k-th lowest key is found digit by digit: one pass counts the upper 16
bits, a second counts the lower 16 bits of the keys that share the winning upper ones. Keys come in chunks, so that what
is held at once does not grow with the model. Equal keys go in a fixed order, lower index first, so exactly k are taken.

Where several processes hold parts of the tensors, each counts its own keys and `all_reduce` adds the counts up: 256
numbers a pool for each of four digits, however many weights there are. Ties that must be split go by their index in the
pool, found in the same way, so that no sharding changes which are taken.

A gradual schedule drops a small share at a time. Then a sample of the keys bounds the few that can be among the lowest,
and only those are ranked: the choice is the same, in less time (benchmarks/README.md).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from ..methods.keys import LOWEST_KEY, demote

_DIGITS = 1 << 16

_HALF = 1 << 15

_BYTE = 1 << 8

# Keys of a pool that are sampled to bound the lowest, and the most that bounds may leave to be ranked (13 bytes each):
# so many for all pools together, or this part of a large one.
_SAMPLE = 1 << 14

_SHORTLIST = 1 << 21

_SHORTLIST_SHARE = 24

# Which of a source's keys there are, piece by piece: int32 keys and which are kept (bool), or None if all are.
Chunks = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]

# Adds up the int64 counts of all processes, the same result on each.
AllReduce = Callable[[torch.Tensor], torch.Tensor]


def alone(counts: torch.Tensor) -> torch.Tensor:
    """The total of one process: its own counts."""
    return counts


@dataclass(frozen=True)
class KeySource:
    """Units of a pool that this process holds: their keys, and their indices in the pool by their positions here.

    `chunks` is called several times and must yield the same each time. `counted` is False where another process holds
    the same units and counts them.
    """

    chunks: Chunks
    indices: Callable[[torch.Tensor], torch.Tensor]
    counted: bool = True

    def demoted(self) -> Iterator[torch.Tensor]:
        """The keys, those of units that are dropped already lowest."""
        for keys, kept in self.chunks():
            yield keys if kept is None else demote(keys, kept)


@dataclass(frozen=True)
class KeyPool:
    """What competes: of `units` on all processes together, `kept` are left, and the lowest `count` of those go."""

    sources: Sequence[KeySource]
    count: int
    kept: int
    units: int


@dataclass(frozen=True)
class Threshold:
    """Take every key below `key`, and the first `ties` of all processes' keys that are equal to it.

    `last` is the index in the pool of the last such tie, where it has been looked for; `all_ties` if they all go.
    """

    key: int
    ties: int
    all_ties: bool
    last: int | None = None


def lowest(pools: Sequence[KeyPool], all_reduce: AllReduce = alone) -> Iterator[torch.Tensor]:
    """For each source of each pool, which units go: their positions (int64), or a flag for each unit (bool).

    With flags, units that were dropped before are set, too. Every process must ask for the same pools in the same
    order, those of which it holds nothing included; all take the same number of turns in adding up.
    """
    listed = _shortlists(pools, all_reduce)
    pools_ranked: list[list[KeySource]] = []
    counts = []
    for pool, lists in zip(pools, listed, strict=True):
        pools_ranked.append([one.as_source() for one in lists] if lists is not None else list(pool.sources))
        counts.append(pool.count if lists is not None else pool.units - pool.kept + pool.count)
    thresholds = find_thresholds(pools_ranked, counts, all_reduce) if pools else []
    if all_reduce is not alone:
        thresholds = _find_last_ties(
            pools_ranked, thresholds, max((pool.units for pool in pools), default=0), all_reduce
        )
    for sources, lists, threshold in zip(pools_ranked, listed, thresholds, strict=True):
        flags = taken(sources, threshold)
        if lists is None:
            yield from flags
        else:
            for one, drop in zip(lists, flags, strict=True):
                yield one.positions[drop]


# ---- Thresholds ----


def find_thresholds(
    pools: Sequence[Sequence[KeySource]], ranks: Sequence[int], all_reduce: AllReduce = alone
) -> list[Threshold]:
    """For each pool the threshold that takes exactly so many of its keys; from 1 to all of them."""
    wanted = torch.tensor(ranks, dtype=torch.int64)
    upper, wanted, _ = _digits_of_ranks(pools, wanted, [_upper_digits] * len(pools), all_reduce)
    lower_digits = [partial(_lower_digits, upper=int(digit)) for digit in upper]
    lower, wanted, equal = _digits_of_ranks(pools, wanted, lower_digits, all_reduce)
    keys = ((upper - _HALF) << 16) | lower
    return [
        Threshold(key=int(key), ties=int(ties), all_ties=bool(ties == there))
        for key, ties, there in zip(keys, wanted, equal, strict=True)
    ]


def _digits_of_ranks(
    pools: Sequence[Sequence[KeySource]],
    ranks: torch.Tensor,
    digits_of: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    all_reduce: AllReduce,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each pool's key of a rank (from 1): its 16-bit digit, its rank among keys with that digit, and their number.

    Digits are counted by 16 bits and added up by 8: first all counts by the upper half, then those that share it.
    """
    counts = torch.stack([_count_digits(pool, digits) for pool, digits in zip(pools, digits_of, strict=True)])
    counts = counts.view(len(pools), _BYTE, _BYTE)
    high, ranks, _ = _pick(all_reduce(counts.sum(2)), ranks)
    low, ranks, equal = _pick(all_reduce(counts[torch.arange(len(pools)), high]), ranks)
    return high * _BYTE + low, ranks, equal


def _count_digits(sources: Sequence[KeySource], digits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    counts = None
    for source in sources:
        for keys in source.demoted() if source.counted else ():
            chunk_counts = torch.bincount(digits_of(keys), minlength=_DIGITS)
            counts = chunk_counts if counts is None else counts.add_(chunk_counts.to(counts.device))
    return torch.zeros(_DIGITS, dtype=torch.int64) if counts is None else counts.cpu()


def _pick(counts: torch.Tensor, ranks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In each row of counts, where the rank (from 1) falls; its rank there; and the count there."""
    running = counts.cumsum(1)
    picked = torch.searchsorted(running, ranks[:, None])
    there = counts.gather(1, picked)
    before = running.gather(1, picked) - there
    return picked.squeeze(1), ranks - before.squeeze(1), there.squeeze(1)


def _upper_digits(keys: torch.Tensor) -> torch.Tensor:
    return (keys >> 16).add_(_HALF)


def _lower_digits(keys: torch.Tensor, upper: int) -> torch.Tensor:
    lowest_key = (upper - _HALF) << 16
    matching = _where(_at_most(keys, lowest_key + _DIGITS - 1) & ~_at_most(keys, lowest_key - 1))
    return keys[matching] & (_DIGITS - 1)


def _find_last_ties(
    pools: Sequence[Sequence[KeySource]], thresholds: list[Threshold], units: int, all_reduce: AllReduce
) -> list[Threshold]:
    """The thresholds with `last` where only some ties go: the index of the last that does, found by bytes of indices.

    `units` is the most units of any pool.
    """
    split = [index for index, threshold in enumerate(thresholds) if not threshold.all_ties]
    if not split:
        return thresholds
    indices = [_counted_ties(pools[index], thresholds[index].key) for index in split]
    ranks = torch.tensor([thresholds[index].ties for index in split], dtype=torch.int64)
    low = torch.zeros(len(split), dtype=torch.int64)
    width = 1
    while width < units:
        width *= _BYTE
    while width > 1:
        width //= _BYTE
        edges = low[:, None] + width * torch.arange(_BYTE + 1)
        below = torch.stack([torch.searchsorted(one, edge) for one, edge in zip(indices, edges, strict=True)])
        picked, ranks, _ = _pick(all_reduce(below.diff(dim=1)), ranks)
        low += width * picked
    found = dict(zip(split, low.tolist(), strict=True))
    return [
        Threshold(threshold.key, threshold.ties, threshold.all_ties, found.get(index))
        for index, threshold in enumerate(thresholds)
    ]


def _counted_ties(sources: Sequence[KeySource], key: int) -> torch.Tensor:
    """The pool's indices of all keys equal to one that this process counts, in order."""
    ties = [torch.zeros(0, dtype=torch.int64)]
    for source in sources:
        offset = 0
        for keys in source.demoted() if source.counted else ():
            positions = _where(_at_most(keys, key) & ~_at_most(keys, key - 1))
            if len(positions):  # many tiny tensors would keep a CPU's heap from shrinking
                ties.append(source.indices(positions + offset).cpu())
            offset += len(keys)
    return torch.cat(ties).sort().values


def taken(sources: Sequence[KeySource], threshold: Threshold) -> Iterator[torch.Tensor]:
    """Which keys of each source the threshold takes (bool, flat); ties in order, or up to the last that goes."""
    ties = threshold.ties
    for source in sources:
        parts = [torch.zeros(0, dtype=torch.bool)]
        offset = 0
        for keys in source.demoted():
            at_most = _at_most(keys, threshold.key)
            if not threshold.all_ties:
                below = _at_most(keys, threshold.key - 1)
                equal = _where(at_most & ~below)
                if threshold.last is None:
                    equal = equal[:ties]
                    ties -= len(equal)
                else:
                    equal = equal[source.indices(equal + offset) <= threshold.last]
                below[equal] = True
                at_most = below
            parts.append(at_most)
            offset += len(keys)
        yield _joined(parts)


# ---- The few that can be among the lowest ----


@dataclass(frozen=True)
class _Shortlist:
    """Keys of a source, their positions in it, and the source."""

    keys: torch.Tensor
    positions: torch.Tensor
    source: KeySource

    def as_source(self) -> KeySource:
        return _key_source_of(
            self.keys, lambda listed: self.source.indices(self.positions[listed]), self.source.counted
        )


def _shortlists(pools: Sequence[KeyPool], all_reduce: AllReduce) -> list[list[_Shortlist] | None]:
    """For each pool those of its kept keys that can be among the lowest, by source, or None where that would not pay.

    It would not where more than a quarter of the keys go, or too many would have to be held, or the sample misled.
    """
    limits = [max(_SHORTLIST // len(pools), pool.units // _SHORTLIST_SHARE) for pool in pools]
    few = [
        index
        for index, (pool, limit) in enumerate(zip(pools, limits, strict=True))
        if pool.count <= pool.kept // 4 and (pool.count <= limit or all_reduce is not alone)
    ]
    bounds = _bounds_from_samples([pools[index] for index in few], all_reduce) if few else {}
    found = {few[place]: _below_bound(pools[few[place]], bound, limits[few[place]]) for place, bound in bounds.items()}
    listed: list[list[_Shortlist] | None] = [None] * len(pools)
    if not found:
        return listed
    numbers = [
        (sum(len(one.keys) for one in lists or [] if one.source.counted), int(lists is None))
        for lists in found.values()
    ]
    sums = all_reduce(torch.tensor(numbers, dtype=torch.int64)).tolist()
    for (index, lists), (there, too_many) in zip(found.items(), sums, strict=True):
        if there >= pools[index].count and not too_many:
            listed[index] = lists
    return listed


def _bounds_from_samples(pools: Sequence[KeyPool], all_reduce: AllReduce) -> dict[int, int]:
    """A key that a pool's lowest lie at or below, all but surely: four standard errors above the sample's.

    By the pools' numbers; none where the sample is too small to tell.
    """
    samples = [_sample(pool) for pool in pools]
    sizes = [sum(len(keys) for source in sources for keys in source.demoted() if source.counted) for sources in samples]
    sums = all_reduce(torch.tensor(sizes, dtype=torch.int64)).tolist()
    ranks = {}
    for index, (pool, size) in enumerate(zip(pools, sums, strict=True)):
        expected = pool.count / pool.kept * size
        rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
        if rank <= size:
            ranks[index] = rank
    if not ranks:
        return {}
    thresholds = find_thresholds([samples[index] for index in ranks], list(ranks.values()), all_reduce)
    return {index: threshold.key for index, threshold in zip(ranks, thresholds, strict=True)}


def _sample(pool: KeyPool) -> list[KeySource]:
    """Every so-manieth of the kept keys, the same share on every process."""
    stride = max(pool.units // _SAMPLE, 1) | 1
    samples = []
    for source in pool.sources:
        keys = [
            (keys[::stride] if kept is None else keys[::stride][kept[::stride]]).cpu()
            for keys, kept in (source.chunks() if source.counted else ())
        ]
        sample = torch.cat([torch.zeros(0, dtype=torch.int32), *keys])
        samples.append(_key_source_of(sample, source.indices, source.counted))
    return samples


def _key_source_of(keys: torch.Tensor, indices: Callable[[torch.Tensor], torch.Tensor], counted: bool) -> KeySource:
    """A source of keys that are all kept and held."""
    return KeySource(lambda: [(keys, None)], indices, counted)


def _below_bound(pool: KeyPool, bound: int, limit: int) -> list[_Shortlist] | None:
    """The kept keys of each source at or below a bound; None if they are more than the limit."""
    lists = []
    found = 0
    for source in pool.sources:
        keys_below = [torch.zeros(0, dtype=torch.int32)]
        positions_below = [torch.zeros(0, dtype=torch.int64)]
        offset = 0
        for keys, kept in source.chunks():
            below = _at_most(keys, bound)
            if kept is not None:
                below &= kept
            positions = _where(below)
            keys_below.append(keys[positions])
            positions_below.append(positions.add_(offset))
            offset += len(keys)
            found += len(positions)
            if found > limit:
                return None
        lists.append(_Shortlist(_joined(keys_below), _joined(positions_below), source))
    return lists


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """All parts together; the first is there for when it is the only one."""
    return torch.cat(parts[1:] or parts)


# On a CPU numpy takes half the time that torch takes for the next two, and they are where the time goes.


def _at_most(keys: torch.Tensor, bound: int) -> torch.Tensor:
    """`keys <= bound`, also for a bound below every int32."""
    if bound < LOWEST_KEY:
        return torch.zeros_like(keys, dtype=torch.bool)
    return torch.from_numpy(keys.numpy() <= bound) if keys.device.type == "cpu" else keys <= bound


def _where(flags: torch.Tensor) -> torch.Tensor:
    """The indices of the flags that are set."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(flags.numpy()))
    return flags.nonzero().squeeze(1)
