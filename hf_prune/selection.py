"""The exact k lowest scores of one tensor or of many, without sorting and without a copy of the scores.

Scores become int32 keys of the same order. The k-th lowest key is found digit by digit: one pass counts the upper 16
bits, a second counts the lower 16 bits of the keys that share the winning upper ones. Keys come in chunks, so that what
is held at once does not grow with the model. Equal keys go in a fixed order, lower index first, so exactly k are taken.

A gradual schedule drops a small share at a time. Then a sample of the keys bounds the few that can be among the lowest,
and only those are ranked (`lowest_of_kept`): the choice is the same, in less time (benchmarks/README.md).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

# Below every key of a real score (only a NaN maps here): marks what is already dropped and so goes first.
LOWEST_KEY = -(2**31)

_DIGITS = 1 << 16
_HALF = 1 << 15

# Keys that are sampled to bound the lowest, and the most that a bound may leave to be ranked (13 bytes each).
_SAMPLE = 1 << 12
_SHORTLIST = 1 << 21

KeyChunks = Callable[[], Iterable[torch.Tensor]]

# The same with which of the keys' units are kept (bool), or None if all are.
KeptChunks = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]


@dataclass(frozen=True)
class Threshold:
    """Take every key below `key`, and the first `ties` of those equal to it; `all_ties` if that is all of them."""

    key: int
    ties: int
    all_ties: bool = False


def order_keys(scores: torch.Tensor) -> torch.Tensor:
    """int32 keys in the order of the scores (float32 or int32); -0.0 and 0.0 get the same key."""
    if scores.dtype == torch.int32:
        return scores
    bits = scores.float().contiguous().view(torch.int32)
    if not bits.numel() or int(bits.amin()) >= 0:
        return bits  # no sign bit is set: the bits of non-negative floats are in their order
    bits = (scores.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def demote(keys: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The keys, with `LOWEST_KEY` wherever `kept` (bool) is False. By bits: a select costs a CPU ten times as much."""
    ones = kept.to(torch.int32).neg_()
    demoted = keys & ones
    return demoted.bitwise_or_(ones.bitwise_not_().bitwise_left_shift_(31))


def find_threshold(sources: Sequence[KeyChunks], count: int) -> Threshold:
    """The threshold that takes exactly `count` of the keys that all `sources` give together.

    Each source is called twice and must yield the same int32 chunks both times. `count` is from 1 to all keys.
    """
    upper, count, _ = _digit_of_rank(sources, count, _upper_digits)
    lower, count, equal = _digit_of_rank(sources, count, lambda keys: _lower_digits(keys, upper))
    return Threshold(key=((upper - _HALF) << 16) | lower, ties=count, all_ties=count == equal)


def _digit_of_rank(
    sources: Sequence[KeyChunks], rank: int, digits_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[int, int, int]:
    """The digit of the `rank`-th lowest key (from 1), its rank among the keys with that digit, and their number."""
    counts = None
    for source in sources:
        for keys in source():
            chunk_counts = torch.bincount(digits_of(keys), minlength=_DIGITS)
            counts = chunk_counts if counts is None else counts.add_(chunk_counts.to(counts.device))
    assert counts is not None
    running = counts.cumsum(0).cpu()
    digit = int(torch.searchsorted(running, rank))
    below = int(running[digit - 1]) if digit > 0 else 0
    return digit, rank - below, int(running[digit]) - below


def _upper_digits(keys: torch.Tensor) -> torch.Tensor:
    return (keys >> 16).add_(_HALF)


def _lower_digits(keys: torch.Tensor, upper: int) -> torch.Tensor:
    lowest = (upper - _HALF) << 16
    matching = _where(_at_most(keys, lowest + _DIGITS - 1) & ~_at_most(keys, lowest - 1))
    return keys[matching] & (_DIGITS - 1)


def taken(chunks: Iterable[torch.Tensor], threshold: Threshold) -> tuple[torch.Tensor, int]:
    """Which keys of one source the threshold takes (bool, flat), and the ties left for the sources after it.

    With `all_ties` there is nothing to share out: the number is passed on as it came.
    """
    parts = [torch.zeros(0, dtype=torch.bool)]
    ties = threshold.ties
    for keys in chunks:
        at_most = _at_most(keys, threshold.key)
        if threshold.all_ties:
            parts.append(at_most)
            continue
        below = _at_most(keys, threshold.key - 1)
        equal = _where(at_most & ~below)[:ties]
        below[equal] = True
        ties -= len(equal)
        parts.append(below)
    return torch.cat(parts[1:] or parts), ties


def lowest_of_kept(sources: Sequence[KeptChunks], count: int, kept: int, units: int) -> list[torch.Tensor] | None:
    """The flat indices in each source of the `count` lowest among the `kept` keys that are kept, of `units` in all.

    Those at or below a bound from a sample are ranked, in the order and with the ties of `find_threshold`. None where
    that would not pay (more than a quarter of the keys, or too many to hold), or where the sample misled.
    """
    if count > min(kept // 4, _SHORTLIST):
        return None
    bound = _bound_from_sample(sources, count / kept, max(units // _SAMPLE, 1) | 1)
    if bound is None:
        return None
    keys_listed, indices_listed, total = [], [], 0
    for source in sources:
        keys_below, indices_below = _at_or_below(source(), bound)
        keys_listed.append(keys_below)
        indices_listed.append(indices_below)
        total += len(keys_below)
        if total > _SHORTLIST:
            return None
    if total < count:
        return None
    threshold = find_threshold([partial(iter, [keys]) for keys in keys_listed], count)
    lowest = []
    for keys, indices in zip(keys_listed, indices_listed, strict=True):
        drop, ties = taken([keys], threshold)
        threshold = replace(threshold, ties=ties)
        lowest.append(indices[drop])
    return lowest


def _bound_from_sample(sources: Sequence[KeptChunks], share: float, stride: int) -> int | None:
    """A key that `share` of all kept keys lie at or below, all but surely: four standard errors above the sample's."""
    sample = torch.cat(
        [
            (keys[::stride] if is_kept is None else keys[::stride][is_kept[::stride]]).cpu()
            for source in sources
            for keys, is_kept in source()
        ]
    )
    expected = share * len(sample)
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    return int(torch.kthvalue(sample, rank).values) if rank <= len(sample) else None


def _at_or_below(
    chunks: Iterable[tuple[torch.Tensor, torch.Tensor | None]], bound: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept keys at or below a bound, and their flat indices."""
    keys_below, indices_below, offset = [], [], 0
    for keys, is_kept in chunks:
        below = _at_most(keys, bound)
        if is_kept is not None:
            below &= is_kept
        indices = _where(below)
        keys_below.append(keys[indices])
        indices_below.append(indices.add_(offset))
        offset += len(keys)
    return torch.cat(keys_below), torch.cat(indices_below)


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
