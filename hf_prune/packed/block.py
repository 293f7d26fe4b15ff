"""A tensor as one block of bytes, which says all that is needed to read it: docs/packing.md has the format.

A block never stands for more than 1024 times its own size, so that a small file cannot ask for all memory.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import PackedError
from . import masks, streams, values

MAGIC = b"HFPT"
VERSION = 1

# Data types as safetensors calls them: their code, and the unsigned integers that their patterns are read as.
DTYPES: dict[str, tuple[int, np.dtype]] = {
    "F64": (1, np.dtype("<u8")),
    "F32": (2, np.dtype("<u4")),
    "F16": (3, np.dtype("<u2")),
    "BF16": (4, np.dtype("<u2")),
    "F8_E4M3": (5, np.dtype("u1")),
    "F8_E5M2": (6, np.dtype("u1")),
    "U8": (7, np.dtype("u1")),
}
_NAMES = {code: name for name, (code, _) in DTYPES.items()}

# The most that a block may stand for, as a multiple of its own size.
LARGEST_RATIO = 1024

# magic, version, data type, coding of the mask, coding of the values, size of the codebook, dimensions, low bits,
# checksum, stored weights, bytes of gaps, smallest magnitude
_HEAD = struct.Struct("<4sBBBBHBBIQQQ")
_CHECKSUM_AT = 12
_STREAM = struct.Struct("<BQ")
_LARGEST_RANK = 16
_CODINGS = (values.HISTOGRAM, values.CODEBOOK, values.ROWS)
_OF_ROWS = ("F32", "BF16")  # data types of matrices whose rows have a scale

# More bytes than a block has beside its content.
LARGEST_HEAD = 1024

# Weights by which the coding of the mask is chosen, and whose signs are set at a time.
_SAMPLE = 1 << 19


@dataclass(frozen=True)
class Head:
    """What the beginning of a block says."""

    dtype: str
    shape: tuple[int, ...]
    mask: int
    coding: int
    codebook: int
    stored: int
    gap_bytes: int
    low: int
    base: int

    @property
    def weights(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def patterns(self) -> np.dtype:
        """The unsigned integers that the weights are read as."""
        return DTYPES[self.dtype][1]

    @property
    def size(self) -> int:
        """Where the streams begin."""
        return _HEAD.size + 8 * len(self.shape)


def pack_tensor(patterns: np.ndarray, dtype: str, shape: tuple[int, ...]) -> bytearray:
    """The block of a tensor.

    Args:
        patterns: the weights in one dimension, as the unsigned integers that `DTYPES` has for the data type.
        dtype: the data type, as safetensors calls it.
        shape: the shape of the tensor.
    """
    is_kept = masks.nonzero(patterns, _magnitude(patterns.dtype))
    stored = int(np.count_nonzero(is_kept))
    coding_of_mask, gap_bytes = masks.ALL, 0
    parts: list[tuple[int, bytes | memoryview]] = []
    kept = patterns
    if stored < patterns.size:
        coding_of_mask = _coding_of_mask(is_kept[:_SAMPLE])
        where = np.flatnonzero(is_kept) if coding_of_mask == masks.GAPS else is_kept
        mask = masks.gaps_encode(where) if coding_of_mask == masks.GAPS else np.packbits(is_kept)
        gap_bytes = mask.size if coding_of_mask == masks.GAPS else 0
        parts += [streams.encode(mask, repeats=coding_of_mask == masks.BITS), _pack_signs(patterns[~is_kept])]
        kept = patterns[where]
    codebook = values.find_codebook(kept)
    base, low = 0, 0
    if codebook is not None:
        parts.append((streams.RAW, codebook.tobytes()))
        parts.append(streams.encode(values.to_codes(kept, codebook)))
    else:
        base, low, contents = values.to_histogram(kept)
        parts += [streams.encode(content, is_low=place > 1) for place, content in enumerate(contents)]
    size = codebook.size if codebook is not None else 0
    codings = (DTYPES[dtype][0], coding_of_mask, values.HISTOGRAM if codebook is None else values.CODEBOOK)
    head = (MAGIC, VERSION, *codings, size, len(shape), low, 0, stored, gap_bytes, base)
    return _put_together(head, shape, parts, patterns.nbytes)


def pack_rows(scales: np.ndarray, numbers: np.ndarray, dtype: str) -> bytearray:
    """The block of a matrix of scale * number, with a scale (float32) for each row of numbers (int8)."""
    code, patterns = DTYPES[dtype]
    parts = [
        (streams.RAW, scales.astype("<f4").view(np.uint8).data),
        streams.encode(numbers.reshape(-1).view(np.uint8)),
    ]
    head = (MAGIC, VERSION, code, masks.ALL, values.ROWS, 0, 2, 0, 0, numbers.size, 0, 0)
    return _put_together(head, numbers.shape, parts, numbers.size * patterns.itemsize)


def _put_together(
    head: Sequence[Any], shape: tuple[int, ...], parts: Sequence[tuple[int, bytes | memoryview]], dense_bytes: int
) -> bytearray:
    """A block of a head and streams, each with its coding."""
    pieces: list[bytes | memoryview] = [_HEAD.pack(*head), struct.pack(f"<{len(shape)}Q", *shape)]
    for coding, content in parts:
        pieces += [_STREAM.pack(coding, len(content)), content]
    length = max(sum(map(len, pieces)), -(-dense_bytes // LARGEST_RATIO))
    if shape == (length,):  # so that a reader that takes the block for the tensor sees another shape
        length += 1
    block, at = bytearray(length), 0  # filled once: a copy of large tensors would take as long as coding them
    for piece in pieces:
        block[at : at + len(piece)] = piece
        at += len(piece)
    struct.pack_into("<I", block, _CHECKSUM_AT, _checksum(block))
    return block


def _coding_of_mask(sample: np.ndarray) -> int:
    """The coding of a mask that takes the fewest bytes for a sample of it."""
    as_bits = streams.encode(np.packbits(sample), repeats=True)
    as_gaps = streams.encode(masks.gaps_encode(np.flatnonzero(sample)))
    return masks.GAPS if sample.any() and len(as_gaps[1]) < len(as_bits[1]) else masks.BITS


def _magnitude(patterns: np.dtype) -> np.unsignedinteger:
    """All bits of a pattern but its sign."""
    return patterns.type((1 << 8 * patterns.itemsize - 1) - 1)


def _pack_signs(zeros: np.ndarray) -> tuple[int, bytes | memoryview]:
    """The stream with a bit for each weight that is not stored: 1 for -0.0; nothing if there is none."""
    return streams.encode(np.packbits(zeros != 0)) if zeros.any() else (streams.RAW, b"")


def _checksum(block: bytes | bytearray | memoryview) -> int:
    """CRC-32 of all bytes but those of the checksum."""
    content = memoryview(block)
    return zlib.crc32(content[_CHECKSUM_AT + 4 :], zlib.crc32(content[:_CHECKSUM_AT]))


def read_head(block: memoryview) -> Head:
    """The head of a block, checked. Raises PackedError for what is no block, or one that cannot be right."""
    if len(block) < _HEAD.size or bytes(block[:4]) != MAGIC:
        raise PackedError("expected a packed tensor, got other bytes")
    _, version, code, mask, coding, codebook, rank, low, _, stored, gap_bytes, base = _HEAD.unpack_from(block)
    if version != VERSION:
        raise PackedError(f"expected a packed tensor of version {VERSION}, got {version}; update hf-prune")
    if code not in _NAMES or rank > _LARGEST_RANK or len(block) < _HEAD.size + 8 * rank:
        raise PackedError(f"expected a data type and up to {_LARGEST_RANK} dimensions, got {code} and {rank}")
    shape = struct.unpack_from(f"<{rank}Q", block, _HEAD.size)
    head = Head(_NAMES[code], shape, mask, coding, codebook, stored, gap_bytes, low, base)
    problem = _problem(head, len(block))
    if problem is not None:
        raise PackedError(f"expected a packed tensor, got one of shape {shape} with {problem}")
    return head


def _problem(head: Head, size: int) -> str | None:
    """What cannot be right in a head; every size that is allocated follows from it."""
    if head.weights * head.patterns.itemsize > LARGEST_RATIO * size:
        return f"more than {LARGEST_RATIO} times the bytes of its block"
    if head.stored > head.weights or (head.mask == masks.ALL and head.stored != head.weights):
        return f"{head.stored} stored weights"
    if head.mask not in (masks.ALL, masks.BITS, masks.GAPS) or head.coding not in _CODINGS:
        return f"codings {head.mask} and {head.coding}"
    if head.gap_bytes > (head.stored + head.weights // 255 if head.mask == masks.GAPS else 0):
        return f"{head.gap_bytes} bytes of gaps"
    if head.coding == values.ROWS and (head.mask != masks.ALL or len(head.shape) != 2 or head.dtype not in _OF_ROWS):
        return f"rows of {head.dtype}"
    if head.coding == values.ROWS and head.shape[0] > head.weights:  # their scales would be allocated
        return "rows that have no columns"
    if head.coding == values.CODEBOOK and not 0 < head.codebook <= values.LARGEST_CODEBOOK:
        return f"{head.codebook} values in its codebook"
    if head.low + 8 > max(8 * head.patterns.itemsize, 8) or head.base > int(_magnitude(head.patterns)):
        return f"{head.low} low bits above {head.base}"
    return None


class _Streams:
    """The streams of a block, taken one after another."""

    def __init__(self, block: memoryview, at: int):
        self._block, self._at = block, at

    def _next(self) -> tuple[int, memoryview]:
        begin = self._at + _STREAM.size
        if begin > len(self._block):
            raise PackedError("expected another stream, got the end of the packed tensor")
        coding, size = _STREAM.unpack_from(self._block, self._at)
        if size > len(self._block) - begin:
            raise PackedError(f"expected a stream of {size} bytes, got {len(self._block) - begin}")
        self._at = begin + size
        return coding, self._block[begin : self._at]

    def next(self, size: int, what: str) -> streams.Stream:
        """The next stream, which has `size` bytes when decoded."""
        return streams.Stream(*self._next(), size, what)

    def take_or_none(self, size: int, what: str) -> np.ndarray | None:
        """The content of the next stream, or None if it is empty."""
        coding, stored = self._next()
        return streams.Stream(coding, stored, size, what).take_all() if len(stored) else None

    def end(self) -> None:
        """Raise PackedError if anything but zeros is left."""
        if any(self._block[self._at :].tobytes().lstrip(b"\0")):
            raise PackedError("expected zeros after the last stream, got other bytes")


def unpack_tensor(block: bytes | memoryview) -> tuple[np.ndarray, Head]:
    """The weights of a block in one dimension, as patterns of bits, and what its head says.

    Raises PackedError for bytes that are not such a block, or have been changed.
    """
    content = memoryview(block).cast("B")
    head = read_head(content)
    if struct.unpack_from("<I", content, _CHECKSUM_AT)[0] != _checksum(content):
        raise PackedError("its checksum is wrong; the file is damaged, download or copy it again")
    reader = _Streams(content, head.size)
    patterns = np.empty(head.weights, head.patterns)
    if head.mask == masks.ALL:
        _fill_values(reader, head, patterns)
    else:
        parts = _parts_of_mask(reader, head)
        signs = reader.take_or_none(-(-(head.weights - head.stored) // 8), "signs of zeros")
        _fill_values(reader, head, patterns[head.weights - head.stored :])
        masks.spread(patterns, head.stored, parts)
        if signs is not None:
            _set_signs(patterns, head, signs)
    reader.end()
    return patterns, head


def _parts_of_mask(reader: _Streams, head: Head) -> Iterator[masks.Part]:
    if head.mask == masks.BITS:
        return masks.bits_parts(reader.next(-(-head.weights // 8), "a mask").take_all(), head.stored, head.weights)
    return masks.gaps_parts(reader.next(head.gap_bytes, "gaps").take_all(), head.stored, head.weights)


def _fill_values(reader: _Streams, head: Head, kept: np.ndarray) -> None:
    """Decode the stored values, in parts, so that little but them is in memory."""
    if head.coding == values.CODEBOOK:
        codebook = reader.next(head.codebook * head.patterns.itemsize, "a codebook").take_all().view(head.patterns)
        values.from_codes(reader.next(head.stored if head.codebook > 1 else 0, "codes"), codebook, kept)
        return
    if head.coding == values.ROWS:
        scales = reader.next(4 * head.shape[0], "scales").take_all().view("<f4")
        if not np.isfinite(scales).all():
            raise PackedError("expected scales of rows that are finite, got others")
        values.from_rows(scales, reader.next(head.stored, "rows"), kept)
        return
    sizes = values.sizes_of_histogram(head.stored, head.low)
    values.from_histogram(head.base, head.low, [reader.next(size, "values") for size in sizes], kept)


def _set_signs(patterns: np.ndarray, head: Head, signs: np.ndarray) -> None:
    """Set the signs of the zeros. Raises PackedError if there are more or fewer than weights that are not stored."""
    magnitude, sign = _magnitude(patterns.dtype), patterns.dtype.type(1 << 8 * patterns.itemsize - 1)
    negative = np.unpackbits(signs, count=head.weights - head.stored).view(np.bool_)
    found = 0
    for start in range(0, patterns.size, _SAMPLE):
        part = patterns[start : start + _SAMPLE]
        positions = np.flatnonzero(part & magnitude == 0)
        found += positions.size
        if found <= negative.size:
            part[positions[negative[found - positions.size : found]]] = sign
    if found != negative.size:
        raise PackedError(f"expected {negative.size} zeros, got {found}")
