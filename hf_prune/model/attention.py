"""Attention whose heads have no size of their own in the configuration, as in BERT: the width over their number.

Which linear layers are query, key and value, and which reads the heads, does not show in the shapes that other values
of the configuration give. It is found from the sizes of the layers beside the number of heads, and tried before
anything is removed (`structure.proof`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Names of attributes that are widths, and not numbers of heads.
_WIDTHS = ("size", "dim")


@dataclass(frozen=True)
class Attention:
    """The path of a module that counts heads, of the linear layers that compute them, and of the one that reads them.

    Each linear layer of `writers` has rows for all heads, once (query, key or value), or three times (fused).
    """

    path: str
    writers: tuple[str, ...]
    reader: str


def find_attention(model: nn.Module, heads: int, width: int, hidden: int) -> Iterator[Attention]:
    """All attention of a layer with so many heads, which have this width together, in a model of the width `hidden`."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        size = width // heads
        told = any(value in (heads, size) for name, value in vars(module).items() if "head" in name)
        if not told:
            continue
        sides = {name: _sides(child) for name, child in module.named_children()}
        writers = [name for name, both in sides.items() if both in ((width, hidden), (hidden, width))]
        fused = [name for name, both in sides.items() if both == (3 * width, hidden)]
        reader = None
        if len(fused) == 1 and len(writers) == 1:
            reader = _joined(path, writers[0])
            writers = fused
        elif len(writers) == 4 and not fused:
            reader = _joined(path, writers.pop())
        elif path and (len(writers) >= 3 or fused):  # the reader is in another module beside this one
            parent, _, own = path.rpartition(".")
            others = [
                name
                for name, child in modules[parent].named_modules()
                if name and not f"{name}.".startswith(f"{own}.") and _sides(child) == (hidden, width)
            ]
            reader = _joined(parent, others[0]) if others else None
            writers = writers if len(writers) >= 3 else fused
        if reader is not None and len(writers) in (1, 3, 4, 5):
            yield Attention(path, tuple(_joined(path, name) for name in writers), reader)


def resize_heads(layer: nn.Module, heads: int, width: int, left: int) -> None:
    """Give the attention of a newly built layer fewer heads of the same size, in place: the first ones stay."""
    for attention in list(find_attention(layer, heads, width, width)):  # before anything is changed
        for name in attention.writers:
            linear = layer.get_submodule(name)
            _resize(linear, "out", _sides(linear)[0] // heads * left)
        _resize(layer.get_submodule(attention.reader), "in", width // heads * left)
        module = layer.get_submodule(attention.path)
        for name, value in list(vars(module).items()):
            if _counts_heads(name) and value == heads:
                setattr(module, name, left)
            elif name.endswith(_WIDTHS) and type(value) is int and value == width:
                setattr(module, name, width // heads * left)


def _counts_heads(name: str) -> bool:
    return "head" in name and not name.endswith(_WIDTHS)


def _sides(module: nn.Module) -> tuple[int, int]:
    """The numbers of outputs and inputs of a linear layer; zeros for anything else."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):
        return module.weight.shape[1], module.weight.shape[0]
    return 0, 0


def _resize(linear: nn.Module, side: str, size: int) -> None:
    """Keep so many outputs or inputs of a linear layer."""
    transposed = isinstance(linear, Conv1D)
    dim = int(side == "in") if not transposed else int(side == "out")
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if parameter.dim() == 2 or side == "out":
            smaller = parameter.detach().narrow(dim if parameter.dim() == 2 else 0, 0, size).clone()
            setattr(linear, name, nn.Parameter(smaller, requires_grad=parameter.requires_grad))
    attribute = {"out": "nf", "in": "nx"}[side] if transposed else f"{side}_features"
    setattr(linear, attribute, size)


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def has_shape(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have parameters of the same names and shapes."""
    shapes: list[dict[str, torch.Size]] = [
        {name: parameter.shape for name, parameter in module.named_parameters()} for module in (one, other)
    ]
    return shapes[0] == shapes[1]
