"""Zeros counted in saved files: a model's folder -> how sparse each tensor is."""

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from .config import CONFIG_NAME, PruningConfig, load_configs
from .messages import first_line, nearest_beside
from .targets import find_targets

_WEIGHTS_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_MODULES_NAME = "modules.json"  # of sentence-transformers

# Rows read at a time, so that a large embedding is never in memory whole.
_VALUES_AT_A_TIME = 1 << 24


class ReportError(ValueError):
    """A folder or file that no report can be made from."""


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
    owners = _owners(skeleton) if skeleton is not None else {}
    prunable = _prunable(skeleton, folder) if skeleton is not None else set()
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()} if skeleton else {}

    counts: dict[str, list[Any]] = {}
    for file in files:
        for key, shape, zeros in _count_zeros(file):
            name = _owner(key, owners, skeleton)
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


def find_model(model: str | os.PathLike) -> Path:
    """The folder of a model: as named, or downloaded from the Hub (weights and JSON files only)."""
    folder = Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise ReportError(f"{model}: expected a folder with a saved model, found {_what_is_there(folder)}")
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:  # what huggingface_hub raises: no such name, no network, no right
        raise ReportError(
            f"{model}: expected a folder or a model on the Hub; there is no such folder, and the Hub answered: "
            f"{first_line(error)}{nearest_beside(folder)}"
        ) from error


def _what_is_there(path: Path) -> str:
    return "a file" if path.is_file() else "nothing"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model: the one or, where that is not there, those of the index.

    Raises ReportError if there is neither, or the index is broken or names a file that is missing.
    """
    if (folder / _WEIGHTS_NAME).exists():
        return [folder / _WEIGHTS_NAME]
    index = folder / _INDEX_NAME
    if (folder / "adapter_config.json").exists() and not index.exists():
        raise ReportError(
            f"{folder}: expected a model, found adapters of PEFT; merge them (hf_prune.merge) and save what it returns"
        )
    if not index.exists():
        raise ReportError(
            f"{folder}: expected {_WEIGHTS_NAME} or {_INDEX_NAME}, found neither; save the model with save_pretrained"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ReportError(f"{index}: expected an index of safetensors files, got a file that cannot be read") from error
    if missing:
        raise ReportError(f"{folder}: {_INDEX_NAME} names {missing[0]}, which is not there")
    return [folder / name for name in names]


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


# What the constructors of transformers run into when a config.json does not fit its class: the note tells it.
_BUILDING_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError),
    *(RuntimeError, TypeError, ValueError, StrictDataclassError),
)


def build_skeleton(folder: Path) -> tuple[PreTrainedModel | None, str | None]:
    """The model of a folder's config.json without weights (on the meta device), or None and the reason."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        return None, f"the model's class is not known: {first_line(error)}"
    names = [str(name) for name in getattr(config, "architectures", None) or []]
    model_class = getattr(transformers, names[0], None) if names else None
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        return None, f"the model's class {names[0] if names else '(none named)'} is not one of transformers"
    try:
        with torch.device("meta"):
            return model_class(config), None
    except _BUILDING_ERRORS as error:
        return None, f"no {names[0]} can be made from config.json: {first_line(error)}"


def _prunable(skeleton: nn.Module, folder: Path) -> set[str]:
    """The names of the tensors that the folder's pruning configuration selects, or else may be pruned by default.

    Raises TargetError for expressions that fit no name of this model.
    """
    configs = load_configs(folder) if (folder / CONFIG_NAME).exists() else []
    if not configs:
        return {target.name for target in find_targets(skeleton)}
    if (folder / _MODULES_NAME).exists():
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


def _owner(key: str, owners: dict[str, str], skeleton: PreTrainedModel | None) -> str:
    """The parameter that a name in the file belongs to; the prefix of the base model may be there or not."""
    if skeleton is None or key in owners:
        return owners.get(key, key)
    prefix = f"{skeleton.base_model_prefix}."
    other = key.removeprefix(prefix) if key.startswith(prefix) else prefix + key
    return owners.get(other, key)


def _owners(skeleton: PreTrainedModel) -> dict[str, str]:
    """Name in the file -> name of the parameter, as the model's own save_pretrained converts it."""
    owners = {}
    for name, parameter in skeleton.named_parameters():
        owners.update(dict.fromkeys(revert_weight_conversion(skeleton, {name: parameter}), name))
    return owners
