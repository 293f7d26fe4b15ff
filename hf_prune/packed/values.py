"""The values of the weights that are stored: a codebook where they are few, else what is common and what is random.

Values are patterns of bits, as unsigned integers: nothing is rounded, and NaN and -0.0 are values like others. The
pattern of a float without its sign grows with the number. The distance from the smallest is cut in two: up to 8 high
bits, a histogram with at most 256 bins whose entropy coding pays, and below them bits that are as good as random.
"""

import numpy as np

from ..errors import PackedError
from .streams import Stream

HISTOGRAM, CODEBOOK, ROWS = 0, 1, 2

# The largest whole number of a row of a rounded matrix, by what it is rounded to.
ROUNDED_TO = {"int8": 127, "int4": 7}

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


def from_codes(codes: Stream, codebook: np.ndarray, values: np.ndarray) -> None:
    """Fill in the values of the codes. Raises PackedError for a code beyond the codebook."""
    if codebook.size == 1:
        values[:] = codebook[0]
    for start in range(0, values.size if codebook.size > 1 else 0, _AT_A_TIME):
        part = values[start : start + _AT_A_TIME]
        found = codes.take(part.size)
        if int(found.max()) >= codebook.size:
            raise PackedError(f"expected codes below {codebook.size}, got {int(found.max())}")
        part[:] = codebook[found]
    codes.end()


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


def from_histogram(base: int, low: int, streams: list[Stream], values: np.ndarray) -> None:
    """Fill in the values of the streams: of each a bin, a sign, whole bytes of low bits, and the bits above those."""
    dtype = values.dtype
    bins, signs, *planes, bits = streams
    of_bits = np.split(bits.take_all(), low % 8) if low % 8 else []
    for start in range(0, values.size, _AT_A_TIME):
        part = values[start : start + _AT_A_TIME]
        in_bits = slice(start // 8, -(-(start + part.size) // 8))
        found = _shifted(bins.take(part.size), low, dtype)
        for place, plane in enumerate(planes):
            found |= _shifted(plane.take(part.size), 8 * place, dtype)
        for place, plane_of_bits in enumerate(of_bits, low // 8 * 8):
            found |= _shifted(np.unpackbits(plane_of_bits[in_bits], count=part.size), place, dtype)
        found += dtype.type(base)
        negative = np.unpackbits(signs.take(in_bits.stop - in_bits.start), count=part.size)
        found |= _shifted(negative, 8 * dtype.itemsize - 1, dtype)
        part[:] = found
    for stream in (bins, signs, *planes):
        stream.end()


def _shifted(content: np.ndarray, places: int, dtype: np.dtype) -> np.ndarray:
    shifted = content.astype(dtype)
    shifted <<= dtype.type(places)
    return shifted


# ---- Rows of whole numbers with a scale each ----


def to_rows(weights: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale of each row of a float32 matrix (float32), and its weights as whole numbers up to `largest` (int8).

    A row's scale is its largest magnitude / `largest`, and 1 for a row of zeros; numbers are rounded to the nearest.
    """
    scales = np.abs(weights).max(1) / np.float32(largest)
    scales[scales == 0] = 1
    return scales, np.rint(weights / scales[:, None]).astype(np.int8)


def from_rows(scales: np.ndarray, numbers: Stream, values: np.ndarray) -> None:
    """Fill in scale * number, row by row: in float32, then rounded if the values are bfloat16."""
    width = values.size // max(scales.size, 1)
    rows = max(_AT_A_TIME // max(width, 1), 1)
    for start in range(0, scales.size, rows):
        part = scales[start : start + rows]
        found = numbers.take(part.size * width).view(np.int8).reshape(part.size, width)
        values[start * width : (start + part.size) * width] = row_patterns(part, found, values.dtype)
    numbers.end()


def row_patterns(scales: np.ndarray, numbers: np.ndarray, patterns: np.dtype) -> np.ndarray:
    """scale * number of each row, as patterns of float32 or bfloat16 in one dimension."""
    with np.errstate(over="ignore"):  # of scales that are not those of a model
        found = (scales[:, None] * numbers.astype(np.float32)).reshape(-1).view("<u4")
    return found if patterns.itemsize == 4 else round_to_bfloat16(found)


def round_to_bfloat16(patterns: np.ndarray) -> np.ndarray:
    """Patterns of float32 as those of bfloat16: to the nearest, ties to even; NaN stays NaN."""
    rounded = np.empty(patterns.size, "<u2")
    for start in range(0, patterns.size, _AT_A_TIME):
        part = patterns[start : start + _AT_A_TIME]
        near = part + (0x7FFF + (part >> np.uint32(16) & np.uint32(1)))
        is_nan = part & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
        rounded[start : start + _AT_A_TIME] = np.where(is_nan, part | np.uint32(0x400000), near) >> np.uint32(16)
    return rounded
