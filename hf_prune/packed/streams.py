"""Streams of bytes as they are stored: raw, or entropy-coded with deflate (zlib), whichever is smaller."""

import zlib

import numpy as np

from ..errors import PackedError

RAW, DEFLATE = 0, 1

# Bytes that decide how a stream is coded, in so many pieces.
_SAMPLE, _PIECES = 1 << 15, 32

# A stream that deflate makes no smaller than this share is stored raw: random mantissas are not worth the time. Coding
# low bits of dense weights would take half of the time, for a few percent at most.
_WORTH = 0.985
_WORTH_OF_LOW = 0.95

_REPEATS_SAVE = 0.8

# Bytes by which it is judged whether repeats save anything: finding them takes long where there are few.
_SHORT_SAMPLE = 1 << 12

_LEVEL = 6

# Stored bytes that are given to the decoder at a time: it copies those that it leaves.
_FED = 1 << 14

_RAW_DEFLATE = -15  # the window bits by which zlib writes no header and no checksum of its own


def encode(content: np.ndarray, repeats: bool = False, is_low: bool = False) -> tuple[int, bytes | memoryview]:
    """The coding and the stored bytes of a stream of uint8.

    Huffman codes alone (zlib's `Z_HUFFMAN_ONLY`); with `repeats`, sequences that come again are found, too, which takes
    longer, if a sample says that this saves much. `is_low`: low bits of values, which are coded only if it pays.
    """
    sample = _sample_of(content).tobytes()
    size, strategy = len(_deflate(sample, zlib.Z_HUFFMAN_ONLY)), zlib.Z_HUFFMAN_ONLY
    if repeats:
        short = sample[:_SHORT_SAMPLE]
        plain, with_repeats = (len(_deflate(short, one)) for one in (strategy, zlib.Z_DEFAULT_STRATEGY))
        if with_repeats < _REPEATS_SAVE * plain:
            size, strategy = 0, zlib.Z_DEFAULT_STRATEGY
    if size < (_WORTH_OF_LOW if is_low else _WORTH) * len(sample):
        stored = _deflate(content.data, strategy)
        if len(stored) < content.size:
            return DEFLATE, stored
    return RAW, content.data


def _sample_of(content: np.ndarray) -> np.ndarray:
    """Pieces from all over a stream: the first rows of embeddings are of tokens that are not used."""
    if content.size <= _SAMPLE:
        return content
    size = _SAMPLE // _PIECES
    starts = np.linspace(0, content.size - size, _PIECES).astype(int)
    return np.concatenate([content[start : start + size] for start in starts])


def _deflate(content: bytes | memoryview, strategy: int) -> bytes:
    coder = zlib.compressobj(_LEVEL, zlib.DEFLATED, _RAW_DEFLATE, 9, strategy)
    return coder.compress(content) + coder.flush()


class Stream:
    """A stored stream of `size` bytes when decoded, read in parts: no more than is asked for is decoded.

    Raises PackedError, naming `what` it has, for any other number of bytes.
    """

    def __init__(self, coding: int, stored: memoryview, size: int, what: str):
        if coding not in (RAW, DEFLATE):
            raise PackedError(f"expected {what} coded as {RAW} or {DEFLATE}, got {coding}")
        if coding == RAW and len(stored) != size:
            raise PackedError(f"expected {size} bytes of {what}, got {len(stored)}")
        self._stored, self._size, self._what, self._at = stored, size, what, 0
        self._decoder = zlib.decompressobj(_RAW_DEFLATE) if coding == DEFLATE else None

    def take(self, number: int) -> np.ndarray:
        """The next `number` bytes, as uint8."""
        if self._decoder is None:
            self._at += number
            return np.frombuffer(self._stored[self._at - number : self._at], np.uint8)
        content, found = np.empty(number, np.uint8), 0
        while found < number:
            piece = self._decode(number - found)
            content[found : found + len(piece)] = np.frombuffer(piece, np.uint8)
            found += len(piece)
            if not piece and self._is_read:
                raise PackedError(f"expected {self._size} bytes of {self._what}, got fewer")
        return content

    def take_all(self) -> np.ndarray:
        """All bytes, of which none was taken before, as uint8."""
        content = self.take(self._size)
        self.end()
        return content

    def end(self) -> None:
        """Raise PackedError if there is more than was taken."""
        if self._decoder is None:
            return
        more, is_stuck = b"", False
        while not (more or is_stuck or self._decoder.eof):
            is_stuck = self._is_read
            more = self._decode(1)
        if more or not self._is_read or not self._decoder.eof or self._decoder.unused_data:
            raise PackedError(f"expected {self._size} bytes of {self._what}, got more")

    @property
    def _is_read(self) -> bool:
        """Whether the decoder has had all stored bytes."""
        return self._at == len(self._stored) and not (self._decoder and self._decoder.unconsumed_tail)

    def _decode(self, most: int) -> bytes:
        """The next decoded bytes, at most so many; perhaps none while there is more to read."""
        assert self._decoder is not None
        fed: bytes | memoryview = self._decoder.unconsumed_tail
        if not fed:
            fed = self._stored[self._at : self._at + _FED]
            self._at += len(fed)
        try:
            return self._decoder.decompress(fed, most)
        except zlib.error as error:
            raise PackedError(f"{self._what} cannot be decompressed: {error}") from error
