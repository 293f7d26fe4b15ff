"""Which weights are stored: one bit a weight, or the gaps between them as bytes; both are entropy-coded afterwards.

A gap is the number of weights that are not stored before one that is. In a byte, 255 means 255 such weights and that
the gap goes on. With Huffman codes, this is the optimal prefix code of each gap, whatever the distribution is: 1.01 of
the entropy of random masks, where Rice codes (powers of two) take 1.02 to 1.03.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from ..errors import PackedError

ALL, BITS, GAPS = 0, 1, 2

_FULL = 255  # a byte that a gap does not end with

# Weights or gaps that are decoded at a time. A multiple of 8.
_AT_A_TIME = 1 << 18


def nonzero(patterns: np.ndarray, magnitude: np.unsignedinteger) -> np.ndarray:
    """A bool for each weight: whether any bit but its sign is set."""
    found = np.empty(patterns.size, np.bool_)
    for start in range(0, patterns.size, _AT_A_TIME):  # in parts that stay in the cache
        part = slice(start, start + _AT_A_TIME)
        np.not_equal(patterns[part] & magnitude, 0, out=found[part])
    return found


def gaps_encode(positions: np.ndarray) -> np.ndarray:
    """The gaps before each of these ascending positions, as uint8."""
    gaps = np.diff(positions, prepend=-1) - 1
    if not gaps.size or int(gaps.max()) < _FULL:
        return gaps.astype(np.uint8)
    content = np.full(positions.size + int((gaps // _FULL).sum()), _FULL, np.uint8)
    content[np.cumsum(gaps // _FULL + 1) - 1] = gaps % _FULL
    return content


# A part of a tensor: [begin, end) of its weights, where the stored ones are in it (positions from `begin`, or a bool
# for each weight), and how many they are.
Part = tuple[int, int, np.ndarray, int]


def gaps_parts(content: np.ndarray, stored: int, weights: int) -> Iterator[Part]:
    """The parts of a tensor whose mask is in gaps. Raises PackedError for other than `stored`, or beyond `weights`."""
    begin = found = reached = 0
    for start in range(0, content.size, _AT_A_TIME):
        gaps = content[start : start + _AT_A_TIME]
        sums = np.cumsum(gaps, dtype=np.int64) + reached
        reached = int(sums[-1])
        positions = sums[gaps != _FULL]
        if not positions.size:
            continue
        positions += np.arange(found, found + positions.size)
        found += positions.size
        end = int(positions[-1]) + 1
        if found > stored or end > weights:
            raise PackedError(f"expected {stored} positions below {weights}, got more, or {end - 1}")
        yield begin, end, positions - begin, positions.size
        begin = end
    if found != stored:
        raise PackedError(f"expected {stored} gaps between weights, got {found}")
    yield begin, weights, np.empty(0, np.int64), 0


def bits_parts(bits: np.ndarray, stored: int, weights: int) -> Iterator[Part]:
    """The parts of a tensor whose mask is in bits. Raises PackedError if other than `stored` are set."""
    found = 0
    for begin in range(0, weights, _AT_A_TIME):
        end = min(begin + _AT_A_TIME, weights)
        mask = np.unpackbits(bits[begin // 8 : -(-end // 8)], count=end - begin).view(np.bool_)
        number = int(np.count_nonzero(mask))
        found += number
        if found > stored:
            break
        yield begin, end, mask, number
    if found != stored:
        raise PackedError(f"expected {stored} weights in the mask, got {found if found < stored else 'more'}")


def spread(patterns: np.ndarray, stored: int, parts: Iterable[Part]) -> None:
    """Move the stored values, the last of `patterns`, to their places in it, and set all others to zero, in place.

    From the front: a value never moves to a place that a later one is still read from.
    """
    at = patterns.size - stored
    for begin, end, where, number in parts:
        kept = patterns[at : at + number].copy()
        at += number
        part = patterns[begin:end]
        part[:] = 0
        part[where] = kept
