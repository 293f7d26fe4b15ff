"""Streams of bytes as they are stored: raw, or entropy-coded with deflate (zlib), whichever is smaller."""

import zlib

import numpy as np

from ..errors import PackedError

RAW, DEFLATE = 0, 1

# Bytes that decide how a stream is coded. Statistics of weights change little along a tensor.
_SAMPLE = 1 << 15

# A stream that deflate makes no smaller than this share is stored raw: random mantissas are not worth the time.
_WORTH = 0.985

_REPEATS_SAVE = 0.8

# Bytes by which it is judged whether repeats save anything: finding them takes long where there are few.
_SHORT_SAMPLE = 1 << 12

_LEVEL = 6

_RAW_DEFLATE = -15  # the window bits by which zlib writes no header and no checksum of its own


def encode(content: np.ndarray, repeats: bool = False) -> tuple[int, bytes | memoryview]:
    """The coding and the stored bytes of a stream of uint8.

    Huffman codes alone (zlib's `Z_HUFFMAN_ONLY`); with `repeats`, sequences that come again are found, too, which takes
    longer, if a sample says that this saves much.
    """
    sample = content[:_SAMPLE].tobytes()
    size, strategy = len(_deflate(sample, zlib.Z_HUFFMAN_ONLY)), zlib.Z_HUFFMAN_ONLY
    if repeats:
        short = sample[:_SHORT_SAMPLE]
        plain, with_repeats = (len(_deflate(short, one)) for one in (strategy, zlib.Z_DEFAULT_STRATEGY))
        if with_repeats < _REPEATS_SAVE * plain:
            size, strategy = 0, zlib.Z_DEFAULT_STRATEGY
    if size < _WORTH * len(sample):
        stored = _deflate(content.data, strategy)
        if len(stored) < content.size:
            return DEFLATE, stored
    return RAW, content.data


def _deflate(content: bytes | memoryview, strategy: int) -> bytes:
    coder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW_DEFLATE, 9, strategy)
    return coder.compress(content) + coder.flush()


def decode(coding: int, stored: memoryview, size: int, what: str) -> np.ndarray:
    """The `size` bytes of a stream, as uint8. Raises PackedError for any other number, and never makes more."""
    if coding == RAW:
        if len(stored) != size:
            raise PackedError(f"expected {size} bytes of {what}, got {len(stored)}")
        return np.frombuffer(stored, np.uint8)
    if coding != DEFLATE:
        raise PackedError(f"expected {what} coded as {RAW} or {DEFLATE}, got {coding}")
    decoder = zlib.decompressobj(_RAW_DEFLATE)
    try:
        content = decoder.decompress(stored, size + 1)
    except zlib.error as error:
        raise PackedError(f"{what} cannot be decompressed: {error}") from error
    if len(content) != size or not decoder.eof or decoder.unused_data:
        raise PackedError(f"expected {size} bytes of {what}, got {'more' if len(content) > size else len(content)}")
    return np.frombuffer(content, np.uint8)
