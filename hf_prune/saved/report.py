"""Zeros counted in saved files: a model's folder -> how sparse each tensor is."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config.pruning import CONFIG_NAME, PruningConfig, load_configs
from ..errors import ReportError
from ..model.targets import find_targets
from .files import MODULES_NAME, find_model, weight_files
from .skeleton import build_skeleton, owner_of, owners_of

# Rows read at a time, so that a large embedding is never in memory whole.
_VALUES_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class TensorReport:
    """One parameter: fused expert weights that are saved one by one count as the one parameter they are.

    `prunable` is None where the model's class is not known.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    prunable: bool | None

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / max(self.weights, 1)


@dataclass(frozen=True)
class Report:
    """All tensors of a saved model. `note` says why it is not known what is prunable, where it is not."""

    model: str
    tensors: list[TensorReport]
    file_bytes: int
    note: str | None = None

    @property
    def prunable(self) -> list[TensorReport]:
        """The tensors that may be pruned."""
        return [tensor for tensor in self.tensors if tensor.prunable]

    @property
    def prunable_sparsity(self) -> float:
        """The share of zeros in all prunable tensors together."""
        return share_of_zeros(self.prunable)

    @property
    def sparsity(self) -> float:
        """The share of zeros in all tensors together."""
        return share_of_zeros(self.tensors)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "file_bytes": self.file_bytes,
            "note": self.note,
            "prunable": _totals(self.prunable),
            "overall": _totals(self.tensors),
            "tensors": [asdict(tensor) | {"sparsity": tensor.sparsity} for tensor in self.tensors],
        }


def share_of_zeros(tensors: Sequence[TensorReport]) -> float:
    """Zeros of all the tensors over weights of all the tensors."""
    return sum(tensor.zeros for tensor in tensors) / max(sum(tensor.weights for tensor in tensors), 1)


def _totals(tensors: Sequence[TensorReport]) -> dict[str, Any]:
    return {
        "weights": sum(tensor.weights for tensor in tensors),
        "zeros": sum(tensor.zeros for tensor in tensors),
        "sparsity": share_of_zeros(tensors),
    }


def make_report(model: str | os.PathLike) -> Report:
    """Count the zeros in the safetensors of a saved model: a folder, or a name on the Hub, which is downloaded.

    Reads one file or a sharded index, a part of a tensor at a time. Which tensors are prunable follows from the model's
    class in its config.json, and from the `pruning_config.json` beside it where there is one.

    Raises ReportError if there is no folder, no safetensors in it, or a file is broken.
    """
    folder = find_model(model)
    files = weight_files(folder)
    skeleton, note = build_skeleton(folder)
    owners = owners_of(skeleton) if skeleton is not None else {}
    prunable = _prunable(skeleton, folder) if skeleton is not None else set()
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()} if skeleton else {}

    counts: dict[str, list[Any]] = {}
    for file in files:
        for key, shape, zeros in _count_zeros(file):
            name = owner_of(key, owners, skeleton)
            entry = counts.setdefault(name, [shapes.get(name, shape), 0, 0])
            entry[1] += math.prod(shape)
            entry[2] += zeros
    tensors = [
        TensorReport(name, tuple(shape), weights, zeros, name in prunable if skeleton is not None else None)
        for name, (shape, weights, zeros) in counts.items()
    ]
    order = {name: index for index, name in enumerate(shapes)}
    tensors.sort(key=lambda tensor: order.get(tensor.name, len(order)))
    return Report(str(model), tensors, sum(file.stat().st_size for file in files), note)


def _count_zeros(file: Path) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """Name, shape and number of zeros of each tensor in a safetensors file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            for name in names:
                part = tensors.get_slice(name)
                shape = tuple(part.get_shape())
                yield name, shape, sum(int((rows == 0).sum()) for rows in _rows(part, shape))
    except SafetensorError as error:
        raise ReportError(f"{file}: expected safetensors, got a file that cannot be read ({error})") from error


def _rows(part: Any, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    if not shape:
        yield part[...]
        return
    step = max(_VALUES_AT_A_TIME // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        rows = part[start : start + step]
        yield rows if rows.dtype.itemsize > 1 else rows.float()


def _prunable(skeleton: nn.Module, folder: Path) -> set[str]:
    """The names of the tensors that the folder's pruning configuration selects, or else may be pruned by default.

    Raises TargetError for expressions that fit no name of this model.
    """
    configs = load_configs(folder) if (folder / CONFIG_NAME).exists() else []
    if not configs:
        return {target.name for target in find_targets(skeleton)}
    if (folder / MODULES_NAME).exists():
        return {name for config in configs for name in _prunable_of_first_module(skeleton, config)}
    return {target.name for config in configs for target in find_targets(skeleton, config.targets, config.exclude)}


def _prunable_of_first_module(skeleton: nn.Module, config: PruningConfig) -> set[str]:
    """The same of a sentence-transformers model, which is trained as a list of modules, the skeleton in the first.

    Expressions that fit no name are those of modules after it.
    """
    first = nn.Module()
    first.model = skeleton
    whole = nn.Sequential(first)
    names = [name for name, _ in whole.named_parameters()]
    exclude = [expression for expression in config.exclude if _fits_any(expression, names)]
    if config.targets is None:
        found = find_targets(whole, exclude=exclude)
    else:
        targets = [expression for expression in config.targets if _fits_any(expression, names)]
        found = find_targets(whole, targets, exclude) if targets else []
    return {target.name.removeprefix("0.model.") for target in found}


def _fits_any(expression: str, names: Sequence[str]) -> bool:
    return any(re.fullmatch(expression, name) for name in names)


@dataclass(frozen=True)
class Totals:
    """Weights and zeros of several tensors."""

    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / max(self.weights, 1)


def totals_of(tensors: Sequence[TensorReport]) -> Totals:
    """Weights and zeros of all the tensors."""
    return Totals(weights=sum(tensor.weights for tensor in tensors), zeros=sum(tensor.zeros for tensor in tensors))
