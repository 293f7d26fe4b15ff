"""Which weights are stored: one bit a weight, or the gaps between them as bytes; both are entropy-coded afterwards.

A gap is the number of weights that are not stored before one that is. In a byte, 255 means 255 such weights and that
the gap goes on. With Huffman codes, this is the optimal prefix code of each gap, whatever the distribution is: 1.01 of
the entropy of random masks, where Rice codes (powers of two) take 1.02 to 1.03.
"""

import numpy as np

from ..errors import PackedError

ALL, BITS, GAPS = 0, 1, 2

_FULL = 255  # a byte that a gap does not end with


def gaps_encode(positions: np.ndarray) -> np.ndarray:
    """The gaps before each of these ascending positions, as uint8."""
    gaps = np.diff(positions, prepend=-1) - 1
    if not gaps.size or int(gaps.max()) < _FULL:
        return gaps.astype(np.uint8)
    content = np.full(positions.size + int((gaps // _FULL).sum()), _FULL, np.uint8)
    content[np.cumsum(gaps // _FULL + 1) - 1] = gaps % _FULL
    return content


def gaps_decode(content: np.ndarray, stored: int, weights: int) -> np.ndarray:
    """The positions of the `stored` weights. Raises PackedError for another number, or one beyond `weights`."""
    positions = np.cumsum(content, dtype=np.int64)
    if content.size > stored:
        positions = positions[content != _FULL]
    if positions.size != stored:
        raise PackedError(f"expected {stored} gaps between weights, got {positions.size}")
    positions += np.arange(stored)
    if stored and positions[-1] >= weights:
        raise PackedError(f"expected positions below {weights}, got {positions[-1]}")
    return positions


def bits_encode(positions: np.ndarray, weights: int) -> np.ndarray:
    """One bit a weight, the first in the highest bit of the first byte: 1 where the weight is stored."""
    bits = np.zeros(weights, np.uint8)
    bits[positions] = 1
    return np.packbits(bits)


def bits_decode(bits: np.ndarray, stored: int, weights: int) -> np.ndarray:
    """A bool for each weight; raises PackedError if other than `stored` are true."""
    mask = np.unpackbits(bits, count=weights).view(np.bool_)
    found = int(np.count_nonzero(mask))
    if found != stored:
        raise PackedError(f"expected {stored} weights in the mask, got {found}")
    return mask
