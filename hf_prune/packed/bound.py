"""How small a file could be: the entropy of masks and values, computed from the dense tensors with plain NumPy."""

import math
from pathlib import Path

import numpy as np

from .block import DTYPES
from .files import PackedReader
from .values import LARGEST_CODEBOOK

# Of wider values, the 16 high bits are a histogram, and the others count as random.
_COUNTED_BITS = 16


def entropy_bytes(path: Path) -> int:
    """The entropy in bytes of the tensors of a packed file, rounded up.

    Of each floating-point tensor: of its mask, if weights are masked independently of each other, and of its other
    values, if they are drawn independently from their own histogram. Codes that know more, as of blocks or n:m, need
    less. Other tensors count with their bytes.
    """
    total = 0.0
    for entry, content in PackedReader(path).tensors():
        if entry.dtype in DTYPES and content.size:
            total += tensor_entropy(content.view(DTYPES[entry.dtype][1])) / 8
        else:
            total += content.size
    return math.ceil(total)


def tensor_entropy(patterns: np.ndarray) -> float:
    """The entropy in bits of a tensor's mask and of its values that are not zero, as patterns of bits."""
    bits = 8 * patterns.itemsize
    kept = patterns[patterns & patterns.dtype.type((1 << bits - 1) - 1) != 0]
    share = kept.size / patterns.size
    mask = -patterns.size * sum(part * math.log2(part) for part in (share, 1 - share) if part)
    random = max(bits - _COUNTED_BITS, 0)
    counts = np.bincount((kept >> patterns.dtype.type(random)).astype(np.int64))
    if random and np.unique(kept[: 1 << 16]).size <= LARGEST_CODEBOOK:
        _, exact = np.unique(kept, return_counts=True)
        random, counts = (0, exact) if exact.size <= LARGEST_CODEBOOK else (random, counts)
    counts = counts[counts > 0]
    return float(mask + kept.size * random - np.sum(counts * np.log2(counts / max(kept.size, 1))))
