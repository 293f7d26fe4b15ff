"""Files of packed tensors: safetensors in which blocks of bytes have the names of the tensors.

A packed file keeps the header of the dense one, so that unpacking it gives the same file bit for bit. Tensors that are
small, are no floating-point numbers, or that a block makes no smaller stay as they are. One tensor is in memory at a
time.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..config.safe_json import parse_json
from ..errors import PackedError, one_line
from .block import DTYPES, LARGEST_HEAD, VERSION, pack_rows, pack_tensor, read_head, unpack_tensor
from .values import ROUNDED_TO, round_to_bfloat16, row_patterns, to_rows

# The entry of a file's metadata that says that it is packed.
METADATA_KEY = "hf_prune_packed"

# What packed tensors are in the file: bytes. No other tensor of a packed file is of this type.
PACKED_DTYPE = "U8"

# Tensors with fewer weights stay as they are: most are norms and biases, and a block's head costs more than it saves.
_SMALLEST = 1024

_LARGEST_HEADER = 100_000_000  # as in safetensors

_BYTES = {"BOOL": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8}
_BYTES |= {"F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1}
_BYTES |= {name: patterns.itemsize for name, (_, patterns) in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor in a safetensors file: its bytes are at [begin, end) of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file: its bytes, metadata, and tensors in the order of their bytes."""

    content: bytes
    metadata: dict[str, str]
    entries: list[Entry]


def read_header(path: Path) -> Header:
    """The header of a safetensors file. Raises PackedError if it is not one, or not complete."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            raise PackedError(f"{path}: expected safetensors, got a file without a header of them")
        content = file.read(length)
    try:
        return _parse_header(content, size - 8 - length)
    except PackedError as error:
        raise PackedError(f"{path}: {error}") from error


def _parse_header(content: bytes, data: int | None) -> Header:
    """A header, for a file with so many bytes of tensors; None: as many as it says."""
    try:
        parsed = parse_json(content.decode("utf-8"))
        metadata = parsed.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are no texts")
        at = 8 + len(content)
        entries = sorted((_entry(name, fields, at) for name, fields in parsed.items()), key=lambda one: one.end)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise PackedError(
            f"expected a header of safetensors, got one that cannot be read ({one_line(error)})"
        ) from error
    for entry in entries:
        if entry.begin != at:
            raise PackedError(f"expected the bytes of {entry.name!r} to follow those before, got a gap or an overlap")
        at = entry.end
    if data is not None and at != 8 + len(content) + data:
        raise PackedError("expected the bytes of the tensors that the header lists, got more or fewer")
    return Header(content, metadata, entries)


def _entry(name: str, fields: dict[str, Any], start: int) -> Entry:
    dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise ValueError(f"{name!r} has a shape or offsets that are no whole numbers")
    if dtype not in _BYTES:
        raise ValueError(f"{name!r} is of the data type {dtype!r}, expected one of {', '.join(sorted(_BYTES))}")
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise ValueError(f"{name!r} does not have the bytes of its shape")
    return Entry(name, dtype, shape, start + begin, start + end)


def is_packed(path: Path) -> bool:
    """Whether a safetensors file is packed. Raises PackedError if it is not safetensors."""
    return METADATA_KEY in read_header(path).metadata


def pack_file(source: Path, target: Path, to_bfloat16: bool = False, rounded: Mapping[str, str] | None = None) -> None:
    """Pack a safetensors file; with `to_bfloat16`, float32 tensors are rounded first, to the nearest, ties to even.

    `rounded` are names of matrices that are rounded to `int8` or `int4` with a scale for each row: the dense file is
    then that of the rounded weights. Raises PackedError for a file that is not safetensors, or is packed already, and
    for such a matrix that is neither float32 nor bfloat16, or not finite.
    """
    header = read_header(source)
    if METADATA_KEY in header.metadata:
        raise PackedError(f"{source}: expected dense weights, got packed ones")
    dense = _rounded_header(header) if to_bfloat16 else header
    digest = hashlib.sha256(len(dense.content).to_bytes(8, "little") + dense.content)
    room = _room_for_header(dense, source.stat().st_size)
    listed: dict[str, Any] = {}
    at = 0
    with source.open("rb") as reading, target.open("wb") as writing:
        writing.write(bytes(8 + room))
        for entry, wanted in zip(header.entries, dense.entries, strict=True):
            content = _read(reading, entry)
            if wanted.dtype != entry.dtype:
                content = round_to_bfloat16(content.view("<u4")).view(np.uint8)
            block: bytearray | None
            if rounded and entry.name in rounded:
                content, block = _rounded_rows(content, wanted, rounded[entry.name])
            else:
                block = _block_of(content, wanted)
            digest.update(content.data)
            kept = {"dtype": wanted.dtype, "shape": list(wanted.shape)}
            stored = (kept, content.data) if block is None else ({"dtype": PACKED_DTYPE, "shape": [len(block)]}, block)
            begin, at = at, at + writing.write(stored[1])
            listed[entry.name] = {**stored[0], "data_offsets": [begin, at]}
        text = _header_text(dense, digest.hexdigest(), listed)
        writing.seek(0)
        writing.write(room.to_bytes(8, "little") + text.ljust(room))


def _block_of(content: np.ndarray, entry: Entry) -> bytearray | None:
    """The block of a tensor, given its bytes; None for one that stays as it is."""
    if entry.dtype not in DTYPES or (entry.dtype != PACKED_DTYPE and math.prod(entry.shape) < _SMALLEST):
        return None
    block = pack_tensor(content.view(DTYPES[entry.dtype][1]), entry.dtype, entry.shape)
    return block if len(block) < content.size or entry.dtype == PACKED_DTYPE else None


def _rounded_rows(content: np.ndarray, entry: Entry, kind: str) -> tuple[np.ndarray, bytearray]:
    """A matrix rounded by rows: its bytes, and its block."""
    if entry.dtype not in ("F32", "BF16") or len(entry.shape) != 2:
        raise PackedError(
            f"{entry.name}: expected a matrix of float32 or bfloat16 to round to {kind}, got {entry.dtype}"
        )
    patterns = content.view(DTYPES[entry.dtype][1])
    whole = patterns if entry.dtype == "F32" else patterns.astype("<u4") << np.uint32(16)
    weights = whole.view("<f4").reshape(entry.shape)
    if not np.isfinite(weights).all():
        raise PackedError(f"{entry.name}: expected finite weights to round to {kind}, got others")
    if entry.shape[0] and not entry.shape[1]:
        raise PackedError(f"{entry.name}: expected rows with weights to round to {kind}, got the shape {entry.shape}")
    scales, numbers = to_rows(weights, ROUNDED_TO[kind])
    most = np.full((scales.size, 1), ROUNDED_TO[kind], np.int8)  # each row has its scale times this
    infinity = 0x7F80 if patterns.itemsize == 2 else 0x7F800000
    if (row_patterns(scales, most, patterns.dtype) & infinity == infinity).any():
        raise PackedError(
            f"{entry.name}: expected weights that stay finite when they are rounded to {kind}, got some up to "
            f"{np.abs(weights).max():g}"
        )
    return row_patterns(scales, numbers, patterns.dtype).view(np.uint8), pack_rows(scales, numbers, entry.dtype)


def _header_text(dense: Header, digest: str, listed: Mapping[str, Any]) -> bytes:
    """The header of a packed file as JSON."""
    kept = base64.b64encode(zlib.compress(dense.content, 9)).decode()
    content = json.dumps({"format_version": VERSION, "header": kept, "sha256": digest})
    header = {"__metadata__": {**dense.metadata, METADATA_KEY: content}, **listed}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _room_for_header(dense: Header, size: int) -> int:
    """Enough bytes for the header of a packed file, which is known only when all tensors are written."""
    largest = 2 * size + 2 * LARGEST_HEAD
    listed = {
        entry.name: {"dtype": entry.dtype, "shape": [*entry.shape, largest], "data_offsets": [largest, largest]}
        for entry in dense.entries
    }
    return -(-len(_header_text(dense, "0" * 64, listed)) // 8) * 8


def _rounded_header(header: Header) -> Header:
    """The header of the file with float32 tensors in bfloat16."""
    listed: dict[str, Any] = {"__metadata__": header.metadata} if header.metadata else {}
    at = 0
    for entry in header.entries:
        dtype = "BF16" if entry.dtype == "F32" else entry.dtype
        begin, at = at, at + (entry.end - entry.begin) // _BYTES[entry.dtype] * _BYTES[dtype]
        listed[entry.name] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [begin, at]}
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    return _parse_header(text.ljust(-(-len(text) // 8) * 8), None)


# ---- Reading ----


class PackedReader:
    """A packed file: its dense header, and its tensors one at a time.

    Raises PackedError for a file that is not packed, or whose content does not fit its header.
    """

    def __init__(self, path: Path):
        self.path = path
        header = read_header(path)
        if METADATA_KEY not in header.metadata:
            raise PackedError(f"{path}: expected packed weights, got a file without them")
        try:
            said = parse_json(header.metadata[METADATA_KEY])
            if said["format_version"] != VERSION:
                raise ValueError(
                    f"its format version is {said['format_version']!r}, expected {VERSION}; update hf-prune"
                )
            self.sha256 = str(said["sha256"])
            decoder = zlib.decompressobj()
            content = decoder.decompress(base64.b64decode(said["header"], validate=True), _LARGEST_HEADER)
            if not decoder.eof:
                raise ValueError("the header of the dense file is cut off")
            self.dense = _parse_header(content, None)
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise PackedError(
                f"{path}: expected packed weights, got metadata that cannot be used ({one_line(error)})"
            ) from error
        self._stored = {entry.name: entry for entry in header.entries}
        if {entry.name for entry in self.dense.entries} != self._stored.keys():
            raise PackedError(f"{path}: expected the tensors of the dense file, got others")

    @property
    def dense_bytes(self) -> int:
        """The size of the dense file."""
        return self.dense.entries[-1].end if self.dense.entries else 8 + len(self.dense.content)

    def tensors(self) -> Iterator[tuple[Entry, np.ndarray]]:
        """Each tensor of the dense file, in the order of its bytes there: what it is, and its bytes (uint8)."""
        with self.path.open("rb") as file:
            for entry in self.dense.entries:
                stored = self._stored[entry.name]
                try:
                    yield entry, _dense_bytes(file, entry, stored)
                except PackedError as error:
                    raise PackedError(f"{self.path}: {entry.name}: {error}") from error


def _dense_bytes(file: BinaryIO, entry: Entry, stored: Entry) -> np.ndarray:
    """The bytes of a tensor of the dense file."""
    content = _read(file, stored)
    if stored.dtype == PACKED_DTYPE:
        head = read_head(content.data)
        found = (head.dtype, head.shape)
        if found == (entry.dtype, entry.shape):
            return unpack_tensor(content.data)[0].view(np.uint8)
    else:
        found = (stored.dtype, stored.shape)
        if found == (entry.dtype, entry.shape):
            return content
    raise PackedError(f"expected {entry.dtype} of shape {entry.shape}, got {found[0]} of shape {found[1]}")


def _read(file: BinaryIO, entry: Entry) -> np.ndarray:
    """The stored bytes of a tensor, as uint8."""
    file.seek(entry.begin)
    content = np.fromfile(file, np.uint8, entry.end - entry.begin)
    if content.size != entry.end - entry.begin:
        raise PackedError("expected more bytes, got the end of the file")
    return content


def unpack_file(source: Path, target: Path) -> None:
    """Write the dense file of a packed one, bit for bit. Raises PackedError if it is not the one that was packed."""
    reader = PackedReader(source)
    content = len(reader.dense.content).to_bytes(8, "little") + reader.dense.content
    digest = hashlib.sha256(content)
    with target.open("wb") as writing:
        writing.write(content)
        for _, tensor in reader.tensors():
            digest.update(tensor.data)
            writing.write(tensor.data)
    if digest.hexdigest() != reader.sha256:
        raise PackedError(f"{source}: expected the weights that were packed (by their SHA-256), got others")
