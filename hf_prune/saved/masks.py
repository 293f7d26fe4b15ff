"""Masks and the memory of methods on disk: safetensors, masks packed to eight weights a byte, validated when read.

If tensors are sharded, each process writes the masks of its shards into a file of its own, and reads from all files
what its shards need: the number of processes and the sharding may differ from those at saving.

Each file has a digest of each of its masks, and the pruning state one of each file's digests.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config.safe_json import parse_json
from ..engines.regions import Region, whole
from ..errors import PruningStateError, one_line

MASKS_NAME = "pruning_masks.safetensors"

FORMAT_VERSION = 1

_SHARD_NAME = re.compile(r"pruning_masks-(\d{5})-of-(\d{5})\.safetensors")

# Weights whose positions are computed at a time.
_PIECE = 1 << 22

_NOT_FOUND = 2  # in a mask of 0 and 1


def mask_files(directory: Path) -> list[Path]:
    """The mask files in a directory: a single one, or one of each process that wrote them."""
    if (directory / MASKS_NAME).exists():
        return [directory / MASKS_NAME]
    return sorted(path for path in directory.glob("*.safetensors") if _SHARD_NAME.fullmatch(path.name))


def is_mask_file(name: str) -> bool:
    """Whether this is the name of a mask file."""
    return name == MASKS_NAME or _SHARD_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Remembered:
    """What a method remembers of each weight of a tensor, or of a shard of it: float32, of any shape."""

    parameter: str
    values: torch.Tensor


def write_masks(
    directory: Path, masks: Mapping[str, torch.Tensor], memory: Mapping[str, Remembered] = MappingProxyType({})
) -> int:
    """Write `pruning_masks.safetensors`: one uint8 tensor a mask, eight weights a byte, lowest bit first.

    A mask is packed as (first dimension, rest), each row padded to whole bytes, so that rows can be resharded; a single
    dimension is one row. The shapes are in the file's metadata. What methods remember is in the same file. Returns the
    file's digest.
    """
    _remove_others(directory, [MASKS_NAME])
    return _write(directory / MASKS_NAME, masks, {name: whole(mask.shape) for name, mask in masks.items()}, memory)


def write_mask_shard(
    directory: Path,
    masks: Mapping[str, torch.Tensor],
    regions: Mapping[str, Region],
    rank: int,
    processes: int,
    memory: Mapping[str, Remembered] = MappingProxyType({}),
) -> int | None:
    """Write the masks of one process's shards as `pruning_masks-00001-of-00004.safetensors`; returns the file's digest.

    Packed as in `write_masks`; the metadata say which shard of which tensor each mask is. Without masks, an existing
    file of that name is removed, and None returned. The first process removes the files of other numbers of processes.
    """
    name = shard_name(rank, processes)
    if rank == 0:
        _remove_others(directory, [shard_name(other, processes) for other in range(processes)])
    if masks:
        return _write(directory / name, masks, regions, memory)
    (directory / name).unlink(missing_ok=True)
    return None


def shard_name(rank: int, processes: int) -> str:
    """The name of a process's mask file."""
    return f"pruning_masks-{rank + 1:05d}-of-{processes:05d}.safetensors"


def _remove_others(directory: Path, names: Sequence[str]) -> None:
    for path in directory.glob("pruning_masks*.safetensors"):
        if is_mask_file(path.name) and path.name not in names:
            path.unlink(missing_ok=True)


def _write(
    path: Path,
    masks: Mapping[str, torch.Tensor],
    regions: Mapping[str, Region],
    memory: Mapping[str, Remembered],
) -> int:
    packed = {name: pack(mask) for name, mask in masks.items()}
    digests = json.dumps({name: _digest_of_mask(values) for name, values in packed.items()})
    for key, one in memory.items():
        packed[key] = one.values.reshape(regions[one.parameter].size).float().cpu().contiguous()
    metadata = {
        "format_version": str(FORMAT_VERSION),
        "shapes": json.dumps({name: regions[name].shape for name in masks}),
        "digests": digests,
    }
    parts = {name: (region.start, region.size) for name, region in regions.items() if region != whole(region.shape)}
    if parts:
        metadata["parts"] = json.dumps({name: parts[name] for name in masks if name in parts})
    if memory:
        metadata["memory"] = json.dumps({key: one.parameter for key, one in memory.items()})
    save_file(packed, path, metadata=metadata)
    return digest_of(digests.encode())


def digest_of(content: bytes) -> int:
    """A digest of 64 bits, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little", signed=True)


def _digest_of_mask(packed: torch.Tensor) -> int:
    return digest_of(packed.numpy().tobytes())


@dataclass(frozen=True)
class _File:
    """A mask file: which shard of which tensor each mask is, and which tensor each remembered tensor belongs to.

    `digests` are those of the masks, and `digest` is that of the file; files of earlier versions have none.
    """

    path: Path
    regions: dict[str, Region]
    memory: dict[str, str]
    digests: dict[str, int]
    digest: int | None


def read_masks(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    regions: Mapping[str, Region],
    digests: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:
    """The masks (bool, on the CPU) of shards of tensors of these names and shapes, from the files in a directory.

    `digests` are the digests of the files, by name; None for those of earlier versions. Raises PruningStateError,
    naming the file, if one cannot be read or has another digest, or if they hold other or not all tensors.
    """
    paths = mask_files(directory)
    if not paths:
        raise PruningStateError(f"{directory / MASKS_NAME}: the file with the saved masks does not exist")
    files = [_read_header(path) for path in paths]
    _check_tensors(files, shapes)
    if digests is not None:
        _check_digests(directory, files, digests)
    masks = {}
    for name, region in regions.items():
        mask = torch.full((region.weights,), _NOT_FOUND, dtype=torch.uint8)
        for file in files:
            if name in file.regions and region.overlaps(file.regions[name]):
                _copy(mask, region, _read_mask(file, name).reshape(-1), file.regions[name])
        if bool((mask == _NOT_FOUND).any()):
            raise PruningStateError(
                f"{files[0].path}: expected the mask of each weight of {name!r} once, found parts that overlap; mask "
                "files are left over from another run"
            )
        masks[name] = mask.reshape(region.size).bool()
    return masks


def _check_digests(directory: Path, files: Sequence[_File], digests: Mapping[str, int]) -> None:
    """Raise PruningStateError unless these are the files that were saved with the state."""
    found = {file.path.name: file.digest for file in files}
    for name in sorted(found.keys() | digests.keys()):
        if found.get(name) != digests.get(name):
            raise PruningStateError(
                f"{directory / name}: expected the masks that were saved with the pruning state beside them, got "
                "others; take all files from one checkpoint"
            )


def read_memory(directory: Path, regions: Mapping[str, Region]) -> dict[str, Remembered]:
    """What methods remember of shards of tensors, flat, by key; empty if the files in a directory hold none.

    Raises PruningStateError, naming the file, if one cannot be read, or if they do not hold every weight once.
    """
    files = [_read_header(path) for path in mask_files(directory)]
    memory: dict[str, Remembered] = {}
    for key, parameter in {key: parameter for file in files for key, parameter in file.memory.items()}.items():
        holding = [file for file in files if key in file.memory]
        found = sum(file.regions[parameter].weights for file in holding)
        if parameter not in regions or found != regions[parameter].all_weights:
            raise PruningStateError(
                f"{directory}: expected {key!r} for every weight of {parameter!r}, found it for {found}; mask files "
                "are missing, or left over from another run"
            )
        region = regions[parameter]
        values = torch.zeros(region.weights, dtype=torch.float32)
        for file in holding:
            if region.overlaps(file.regions[parameter]):
                with safe_open(file.path, framework="pt") as opened:
                    _copy(values, region, opened.get_tensor(key).reshape(-1), file.regions[parameter])
        memory[key] = Remembered(parameter, values)
    return memory


def _read_header(path: Path) -> _File:
    """The contents that a file declares; the shapes of its packed masks and remembered tensors are checked."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            stored = {name: (one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
        if "format_version" not in metadata:
            raise ValueError("it has no format version")
        check_version(path, metadata["format_version"])
        regions = {name: whole(_sizes(shape)) for name, shape in parse_json(metadata.get("shapes", "{}")).items()}
        for name, (start, size) in parse_json(metadata.get("parts", "{}")).items():
            regions[name] = _part(regions[name].shape, _sizes(start), _sizes(size))
        memory = {str(key): str(parameter) for key, parameter in parse_json(metadata.get("memory", "{}")).items()}
        digests = dict(parse_json(metadata.get("digests", "{}")))
    except PruningStateError:
        raise
    except (OSError, SafetensorError, ValueError, AttributeError, LookupError, TypeError) as error:
        why = one_line(error)
        raise PruningStateError(f"{path}: expected saved masks, got a file that cannot be read ({why})") from error
    for name, region in regions.items():
        expected = ("U8", packed_shape(region.size))
        if stored.get(name) != expected:
            raise PruningStateError(
                f"{path}: expected {name!r} packed as {expected} for the shape {region.size}, got {stored.get(name)}"
            )
    for key, parameter in memory.items():
        size = regions[parameter].size if parameter in regions else None
        if size is None or stored.get(key) != ("F32", size):
            raise PruningStateError(
                f"{path}: expected {key!r} as {('F32', size)}, the shape of its mask, got {stored.get(key)}"
            )
    digest = digest_of(metadata["digests"].encode()) if "digests" in metadata else None
    return _File(path, regions, memory, digests, digest)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"expected a list of whole numbers of 0 or more, got {values!r}")
    return tuple(values)


def _part(shape: tuple[int, ...], start: tuple[int, ...], size: tuple[int, ...]) -> Region:
    if any(first + count > length for first, count, length in zip(start, size, shape, strict=True)):
        raise ValueError(f"expected a part of the shape {shape}, got {size} from {start}")
    return Region(shape, start, size)


def _check_tensors(files: Sequence[_File], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise PruningStateError unless the files hold every weight of these tensors once, and nothing else."""
    where = files[0].path if len(files) == 1 else files[0].path.parent
    saved: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, region in file.regions.items():
            flat = region.shape == (math.prod(shapes.get(name, ())),)  # how some engines share a tensor
            saved[name] = shapes[name] if flat and name in shapes else region.shape
    different = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
    if different:
        raise PruningStateError(
            f"{where}: saved for other tensors than the model's targets; the first difference is {different[0]!r}: "
            f"{saved.get(different[0])} in the file, {shapes.get(different[0])} in the model"
        )
    for name, shape in shapes.items():
        found = sum(file.regions[name].weights for file in files if name in file.regions)
        if found != math.prod(shape):
            raise PruningStateError(
                f"{where}: expected the masks of {math.prod(shape)} weights of {name!r}, found those of {found}; mask "
                "files are missing, or left over from another run"
            )


def _read_mask(file: _File, name: str) -> torch.Tensor:
    with safe_open(file.path, framework="pt") as opened:
        packed = opened.get_tensor(name)
    size = file.regions[name].size
    digest = _digest_of_mask(packed)
    spare = -_rows_and_columns(size)[1] % 8  # bits at the end of each row
    if file.digests.get(name, digest) != digest or bool(spare and (packed[:, -1:] >> (8 - spare)).any()):
        raise PruningStateError(f"{file.path}: the mask of {name!r} has changed since it was saved")
    return unpack(packed, size)


def _copy(values: torch.Tensor, region: Region, saved: torch.Tensor, saved_region: Region) -> None:
    """Copy the weights that two shards have in common from one flattened tensor into another."""
    if region == saved_region:
        values.copy_(saved)
        return
    for start in range(0, len(values), _PIECE):
        piece = values[start : start + _PIECE]
        indices = region.indices(torch.arange(start, start + len(piece)))
        inside, positions = saved_region.positions(indices)
        piece[inside] = saved[positions]


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A mask as a matrix: its first dimension, and the rest; a single dimension is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(rows, 1)


def packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The shape of a packed mask: rows, and the bytes of each."""
    rows, columns = _rows_and_columns(shape)
    return rows, math.ceil(columns / 8)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Eight weights a byte, lowest bit first (uint8, on the CPU), each row of the mask padded to whole bytes."""
    bits = mask.reshape(_rows_and_columns(mask.shape)).cpu().numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


def unpack(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The bits of a packed mask: 1 where a weight is kept (uint8)."""
    _, columns = _rows_and_columns(shape)
    bits = np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits).reshape(tuple(shape))


def check_version(path: Path, version: str | None) -> None:
    """Raise PruningStateError, naming the file, for another format version."""
    if version != str(FORMAT_VERSION):
        raise PruningStateError(
            f"{path}: expected format version {FORMAT_VERSION}, got {version}; a newer hf-prune may read it"
        )
