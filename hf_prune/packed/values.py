"""The values of the weights that are stored: a codebook where they are few, else what is common and what is random.

Values are patterns of bits, as unsigned integers: nothing is rounded, and NaN and -0.0 are values like others. The
pattern of a float without its sign grows with the number. The distance from the smallest is cut in two: up to 8 high
bits, a histogram with at most 256 bins whose entropy coding pays, and below them bits that are as good as random.
"""

import numpy as np

from ..errors import PackedError

HISTOGRAM, CODEBOOK = 0, 1

LARGEST_CODEBOOK = 256

_BINS = 256

_SAMPLE = 1 << 12

# Values that are compared with a codebook, or put together, at a time: they stay in the cache. A multiple of 8.
_AT_A_TIME = 1 << 18


def find_codebook(values: np.ndarray) -> np.ndarray | None:
    """The distinct values in ascending order, if there are at most 256, and at most half as many as values."""
    codebook = np.unique(values[:_SAMPLE])
    start = _SAMPLE
    while codebook.size <= LARGEST_CODEBOOK and start < values.size:
        part = values[start : start + _AT_A_TIME]
        at = np.minimum(np.searchsorted(codebook, part), codebook.size - 1)
        codebook = np.union1d(codebook, part[codebook[at] != part])
        start += _AT_A_TIME
    return codebook if 0 < codebook.size <= min(LARGEST_CODEBOOK, values.size // 2) else None


def to_codes(values: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The index of each value in the codebook, as uint8; none if the codebook has one value alone."""
    if codebook.size == 1:
        return np.empty(0, np.uint8)
    return np.searchsorted(codebook, values).astype(np.uint8)


def from_codes(codes: np.ndarray, codebook: np.ndarray, number: int) -> np.ndarray:
    """The values of the codes. Raises PackedError for a code beyond the codebook."""
    if codebook.size == 1:
        return np.full(number, codebook[0])
    if codes.size and int(codes.max()) >= codebook.size:
        raise PackedError(f"expected codes below {codebook.size}, got {int(codes.max())}")
    return codebook[codes]


def to_histogram(values: np.ndarray) -> tuple[int, int, list[np.ndarray]]:
    """The smallest magnitude, the number of low bits, and streams of uint8: bins, signs, bytes and bits below the bins.

    `from_histogram` has the sizes of the streams.
    """
    if not values.size:
        return 0, 0, [np.empty(0, np.uint8)] * 3
    dtype, sign = values.dtype, 8 * values.itemsize - 1
    magnitude = dtype.type((1 << sign) - 1)
    parts = [slice(start, start + _AT_A_TIME) for start in range(0, values.size, _AT_A_TIME)]
    base = min(int((values[part] & magnitude).min()) for part in parts)
    largest = max(int((values[part] & magnitude).max()) for part in parts)
    low = max((largest - base).bit_length() - 8, 0)
    whole = range(low // 8)
    bins, *planes = (np.empty(values.size, np.uint8) for _ in range(1 + len(whole)))
    signs, *bits = np.empty((1 + low % 8, -(-values.size // 8)), np.uint8)
    for part in parts:
        in_bits = slice(part.start // 8, part.stop // 8)
        distance = (values[part] & magnitude) - dtype.type(base)
        bins[part] = distance >> dtype.type(low)
        for plane, content in zip(whole, planes, strict=True):
            content[part] = (distance >> dtype.type(8 * plane)).astype(np.uint8)
        for bit, content in enumerate(bits, 8 * len(whole)):
            content[in_bits] = np.packbits((distance >> dtype.type(bit)).astype(np.uint8) & 1)
        signs[in_bits] = np.packbits(values[part] >> dtype.type(sign) != 0)
    return base, low, [bins, signs, *planes, np.concatenate([np.empty(0, np.uint8), *bits])]


def sizes_of_histogram(number: int, low: int) -> list[int]:
    """The sizes in bytes of the streams of so many values with so many low bits."""
    of_bits = -(-number // 8)
    return [number, of_bits, *[number] * (low // 8), low % 8 * of_bits]


def from_histogram(base: int, low: int, streams: list[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The values of the streams: of each value a bin, a sign, whole bytes of its low bits, and the bits above those."""
    bins, signs, *planes, bits = streams
    of_bits = np.split(bits, low % 8) if low % 8 else []
    values = np.empty(bins.size, dtype)
    for start in range(0, bins.size, _AT_A_TIME):
        part, in_bits = slice(start, start + _AT_A_TIME), slice(start // 8, (start + _AT_A_TIME) // 8)
        found = _shifted(bins[part], low, dtype)
        for plane, content in enumerate(planes):
            found |= _shifted(content[part], 8 * plane, dtype)
        for bit, content in enumerate(of_bits):
            found |= _shifted(np.unpackbits(content[in_bits], count=found.size), low // 8 * 8 + bit, dtype)
        found += dtype.type(base)
        found |= _shifted(np.unpackbits(signs[in_bits], count=found.size), 8 * dtype.itemsize - 1, dtype)
        values[part] = found
    return values


def _shifted(content: np.ndarray, places: int, dtype: np.dtype) -> np.ndarray:
    shifted = content.astype(dtype)
    shifted <<= dtype.type(places)
    return shifted
