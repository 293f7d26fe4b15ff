"""The layers that are pruned, as plain matrices (out, in): their weights, and the inputs these are multiplied with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..model.anatomy import CONVOLUTIONS, expert_modules, is_layer
from ..model.layouts import Target, as_matrices, from_matrices


@dataclass(frozen=True, eq=False)
class Layer:
    """A tensor that is pruned, and the modules that own it: several where it is tied.

    Attributes:
        target: the tensor.
        parameter: its parameter.
        modules: the modules whose calls are seen.
        kind: `linear`, `convolution`, `experts`, or `unknown`, for a tensor whose use is not seen: it is no weight of a
            layer, such as the matrices of XLNet's attention or a convolution over three dimensions.
        parts: the number of matrices: experts, or groups of a convolution.
        routed: whether it belongs to an expert, fused or not: it gets other tokens in another model.
    """

    target: Target
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]
    kind: str
    parts: int
    routed: bool


def find_layers(model: nn.Module, targets: Sequence[Target], names: dict[str, nn.Parameter]) -> list[Layer]:
    """The layers of these targets; `names` has the model's parameters by their plain names."""
    in_experts = expert_modules(model)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    layers = []
    for target in targets:
        parameter = names[target.name]
        modules = tuple(owners[id(parameter)])
        kind = _kind(target, parameter, modules)
        parts = target.experts if kind == "experts" else _groups(modules[0]) if kind == "convolution" else 1
        routed = kind == "experts" or any(id(module) in in_experts for module in modules)
        layers.append(Layer(target, parameter, modules, kind, parts, routed))
    return layers


def _kind(target: Target, parameter: nn.Parameter, modules: Sequence[nn.Module]) -> str:
    if target.layout.startswith("experts"):
        return "experts"
    if not all(is_layer(module) and getattr(module, "weight", None) is parameter for module in modules):
        return "unknown"
    if target.layout == "convolution":
        return "convolution" if all(isinstance(module, CONVOLUTIONS) for module in modules) else "unknown"
    return "linear" if target.layout in ("matrix", "transposed") else "unknown"


def _groups(module: nn.Module) -> int:
    assert isinstance(module, CONVOLUTIONS)
    return module.groups


def matrix_of(layer: Layer, part: int) -> torch.Tensor:
    """The matrix (out, in) of a part; a view where it can be one.

    A convolution's columns are in the order of `inputs_of_part`: kernel positions, and in each the input channels.
    """
    weight = layer.parameter.detach()
    if layer.kind == "convolution":
        rows = _share(weight, 0, layer.parts, part).flatten(2)
        return rows.transpose(1, 2).reshape(len(rows), -1)
    return as_matrices(weight, layer.target.layout)[part]


def _share(tensor: torch.Tensor, dim: int, parts: int, part: int) -> torch.Tensor:
    """One of several equal parts of a tensor."""
    size = tensor.shape[dim] // parts
    return tensor.narrow(dim, part * size, size)


def put_matrix(layer: Layer, part: int, matrix: torch.Tensor) -> None:
    """Write the matrix of a part into the parameter, in place."""
    weight = layer.parameter.detach()
    if layer.kind == "convolution":
        rows = _share(weight, 0, layer.parts, part)
        columns = matrix.reshape(len(rows), math.prod(rows.shape[2:]), rows.shape[1])
        rows.copy_(columns.transpose(1, 2).reshape(rows.shape))
    else:
        as_matrices(weight, layer.target.layout)[part].copy_(matrix)


def part_of(layer: Layer, part: int) -> torch.Tensor:
    """The part of the parameter that a matrix is of, (of the first dimension, ...): a view."""
    return _share(layer.parameter.detach(), 0, layer.parts, part)


def as_part(layer: Layer, matrix: torch.Tensor) -> torch.Tensor:
    """The matrix (out, in) of a part in the shape of `part_of`."""
    first, *others = layer.target.shape
    sides = (first // layer.parts, *others)
    if layer.kind == "convolution":
        rows = matrix.reshape(len(matrix), math.prod(sides[2:]), sides[1])
        return rows.transpose(1, 2).reshape(sides).contiguous()
    return from_matrices(matrix[None], layer.target.layout, sides)


def can_map(target: Target) -> bool:
    """Whether a tensor is one matrix (out, in) as it is, so that one from a file can take its place."""
    return target.layout == "matrix"


def take_matrix(layer: Layer, matrix: torch.Tensor) -> None:
    """Give a parameter, for which `can_map` holds, this matrix (out, in) as its memory, without a copy."""
    layer.parameter.data = matrix


def inputs_of_part(layer: Layer, part: int, seen: torch.Tensor) -> torch.Tensor:
    """What the matrix of a part is multiplied with, (tokens, in), from what its layer got.

    A convolution has one token for each position of its output, in the order of samples, then positions, and is
    unfolded. Of its groups, each has its own input channels.
    """
    if layer.kind != "convolution":
        return seen.reshape(-1, seen.shape[-1])
    module = layer.modules[0]
    assert isinstance(module, CONVOLUTIONS)
    return _unfold(module, seen.unsqueeze(0) if seen.dim() == len(module.kernel_size) + 1 else seen, part)


def reads_alike(one: Layer, other: Layer) -> bool:
    """Whether two layers make the same of the same input: all linear ones do, and convolutions of the same windows."""
    return one.kind == other.kind and _windows(one) == _windows(other)


def _windows(layer: Layer) -> tuple[Any, ...]:
    """What the patches are that a convolution unfolds."""
    if layer.kind != "convolution":
        return ()
    module = layer.modules[0]
    assert isinstance(module, CONVOLUTIONS)
    sizes = (module.kernel_size, module.stride, module.dilation, module.groups)
    return *sizes, module.padding, module.padding_mode


def _unfold(module: nn.Conv1d | nn.Conv2d, seen: torch.Tensor, group: int) -> torch.Tensor:
    """The patches (samples · positions, kernel · channels) that a group of a convolution is multiplied with."""
    padded = _share(seen, 1, module.groups, group)
    sides = _padding(module)
    if any(sides):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = nn.functional.pad(padded, sides, mode=mode)
    kernel, stride, dilation = (_two(sizes) for sizes in (module.kernel_size, module.stride, module.dilation))
    if padded.dim() == 3:
        padded = padded.unsqueeze(2)
    samples, channels = padded.shape[:2]
    patches = nn.functional.unfold(padded, kernel, dilation, 0, stride)  # (samples, channels · kernel, positions)
    patches = patches.reshape(samples, channels, math.prod(kernel), -1).permute(0, 3, 2, 1)
    return patches.reshape(-1, math.prod(kernel) * channels)


def _two(sizes: Sequence[int]) -> tuple[int, int]:
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])


def _padding(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """The padding of a convolution as `torch.nn.functional.pad` takes it: the last dimension first."""
    sides: list[int] = []
    for index in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[index] * (module.kernel_size[index] - 1)
            sides += [total // 2, total - total // 2]
        elif module.padding == "valid":
            sides += [0, 0]
        else:
            sides += [int(module.padding[index])] * 2
    return sides
