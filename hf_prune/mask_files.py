"""Masks and pruning state on disk: safetensors and JSON, checked whole when they are read."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

MASKS_NAME = "pruning_masks.safetensors"
STATE_NAME = "pruning_state.json"
FORMAT_VERSION = 1


class PruningStateError(RuntimeError):
    """Weights that cannot be ranked, or saved masks that cannot be used."""


def write_masks(directory: Path, masks: Mapping[str, torch.Tensor]) -> None:
    """Write `pruning_masks.safetensors`: one uint8 tensor a mask, eight weights a byte, lowest bit first.

    A mask is packed as (first dimension, rest), each row padded to whole bytes, so that rows can be cut anew; one of a
    single dimension is one row. The shapes are in the file's metadata.
    """
    packed = {name: _pack(mask) for name, mask in masks.items()}
    shapes = {name: tuple(mask.shape) for name, mask in masks.items()}
    metadata = {"format_version": str(FORMAT_VERSION), "shapes": json.dumps(shapes)}
    save_file(packed, directory / MASKS_NAME, metadata=metadata)


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write `pruning_state.json`."""
    content = {"format_version": FORMAT_VERSION, **state}
    (directory / STATE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_masks(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The masks in a file; PruningStateError if it cannot be read or holds others than these names and shapes."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = file.keys()
            packed = {name: file.get_tensor(name) for name in names}
        version = metadata.get("format_version")
        saved = {name: tuple(shape) for name, shape in json.loads(metadata.get("shapes", "{}")).items()}
    except FileNotFoundError as error:
        raise PruningStateError(f"{path}: expected the saved masks, found no such file") from error
    except (SafetensorError, ValueError, AttributeError, TypeError) as error:
        raise PruningStateError(f"{path}: expected saved masks, got a file that cannot be read ({error})") from error
    _check_version(path, version)
    different = sorted(name for name in saved.keys() | shapes.keys() if saved.get(name) != shapes.get(name))
    if different:
        raise PruningStateError(
            f"{path}: saved for other tensors than the model's targets; the first that differs is {different[0]!r}: "
            f"{saved.get(different[0])} in the file, {shapes.get(different[0])} in the model"
        )
    for name, shape in saved.items():
        expected = (torch.uint8, _packed_shape(shape))
        came = (packed[name].dtype, tuple(packed[name].shape)) if name in packed else None
        if came != expected:
            raise PruningStateError(f"{path}: expected {name!r} packed as {expected} for the shape {shape}, got {came}")
    return {name: _unpack(packed[name], shape) for name, shape in saved.items()}


def read_state(path: Path) -> dict[str, Any]:
    """The state in a `pruning_state.json`. Raises PruningStateError, naming the file, if it cannot be used."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = str(content["format_version"])
        state = {
            "completed_steps": int(content["completed_steps"]),
            "starts": {int(index): float(start) for index, start in content["starts"].items()},
        }
    except FileNotFoundError as error:
        raise PruningStateError(f"{path}: expected the saved pruning state, found no such file") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningStateError(
            f"{path}: expected the saved pruning state, got a file that cannot be used ({error!r})"
        ) from error
    _check_version(path, version)
    return state


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """A mask as a matrix: its first dimension, and the rest; a single dimension is one row."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(rows, 1)


def _packed_shape(shape: Sequence[int]) -> tuple[int, int]:
    rows, columns = _rows_and_columns(shape)
    return rows, math.ceil(columns / 8)


def _pack(mask: torch.Tensor) -> torch.Tensor:
    bits = mask.reshape(_rows_and_columns(mask.shape)).cpu().numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little"))


def _unpack(packed: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    _, columns = _rows_and_columns(shape)
    bits = np.unpackbits(packed.numpy(), axis=1, count=columns, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).reshape(tuple(shape))


def _check_version(path: Path, version: str | None) -> None:
    if version != str(FORMAT_VERSION):
        raise PruningStateError(
            f"{path}: expected format version {FORMAT_VERSION}, got {version}; a newer hf-prune may read it"
        )
