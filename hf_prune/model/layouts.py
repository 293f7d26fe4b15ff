"""How the dimensions of a tensor are interpreted: as a stack of matrices (batch, out, in)."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .anatomy import CONVOLUTIONS, is_experts

LAYOUTS = ("matrix", "transposed", "convolution", "experts", "experts_transposed", "flat")


@dataclass(frozen=True)
class Target:
    """A tensor to prune: its parameter name, its shape, and how its dimensions are interpreted.

    `layout` is `matrix` (out, in), `transposed` (in, out: Conv1D of GPT-2), `convolution` (out, in, kernel...),
    `experts` (expert, out, in), `experts_transposed` (expert, in, out), or `flat` (no input dimension is known).
    `aliases` are the other names of a tied tensor.
    """

    name: str
    shape: tuple[int, ...]
    layout: str
    aliases: tuple[str, ...] = ()

    def matches(self, expression: str) -> bool:
        """Whether an expression matches one of the tensor's names."""
        return any(re.fullmatch(expression, name) for name in (self.name, *self.aliases))

    @property
    def weights(self) -> int:
        """The number of weights in the tensor."""
        return math.prod(self.shape)

    @property
    def experts(self) -> int:
        """The number of experts whose matrices the tensor holds; 1 for a tensor of another kind."""
        return self.shape[0] if self.layout.startswith("experts") else 1

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of one matrix or convolution: experts are separate matrices."""
        return self.shape[1:] if self.layout.startswith("experts") else self.shape

    @property
    def matrices(self) -> tuple[int, int, int]:
        """The shape (batch, out, in) of `as_matrices`."""
        batch, rows, columns = as_matrices(torch.empty(self.shape, device="meta"), self.layout).shape
        return batch, rows, columns


def layout_of(module: nn.Module, dims: int) -> str:
    """The layout of a module's own parameter with this number of dimensions."""
    if isinstance(module, Conv1D) and dims == 2:
        return "transposed"
    if isinstance(module, CONVOLUTIONS) and dims in (3, 4):
        return "convolution"
    if is_experts(module) and dims == 3:
        return "experts_transposed" if getattr(module, "is_transposed", False) else "experts"
    return "matrix" if dims == 2 else "flat"


def inputs_of(module: nn.Module) -> int | None:
    """The number of input features of a linear layer; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.nx)
    return int(module.in_features) if isinstance(module, nn.Linear) else None


def outputs_of(module: nn.Module) -> int | None:
    """The number of output features of a linear layer; None for other modules."""
    if isinstance(module, Conv1D):
        return int(module.nf)
    return int(module.out_features) if isinstance(module, nn.Linear) else None


def as_matrices(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor as a stack of matrices (batch, out, in), a view wherever possible.

    A convolution gives one (out, in) matrix for each kernel position. A `flat` tensor is one row.
    """
    if layout == "matrix":
        return tensor.unsqueeze(0)
    if layout == "transposed":
        return tensor.t().unsqueeze(0)
    if layout == "convolution":
        return tensor.flatten(2).permute(2, 0, 1)
    if layout == "experts":
        return tensor
    if layout == "experts_transposed":
        return tensor.transpose(1, 2)
    return tensor.reshape(1, 1, -1)


def from_matrices(matrices: torch.Tensor, layout: str, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `as_matrices`: a contiguous tensor of the given shape."""
    if layout == "transposed":
        matrices = matrices.transpose(1, 2)
    elif layout == "convolution":
        matrices = matrices.permute(1, 2, 0)
    elif layout == "experts_transposed":
        matrices = matrices.transpose(1, 2)
    return matrices.reshape(tuple(shape)).contiguous()


def features_of(indices: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """The output feature that each weight of a tensor adds to, and the input feature that it is multiplied with.

    Both and the indices of the weights are int64.
    """
    _, outputs, inputs = matrix_coordinates(torch.unravel_index(indices, target.shape), target)
    return outputs, inputs


def matrix_coordinates(
    coordinates: Sequence[torch.Tensor], target: Target
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Coordinates in a tensor -> (batch, out, in) in its stack of matrices."""
    first, second, *others = coordinates
    if target.layout == "experts":
        return first, second, others[0]
    if target.layout == "experts_transposed":
        return first, others[0], second
    batch = ravel(others, target.shape[2:]) if others else torch.zeros_like(first)
    return (batch, second, first) if target.layout == "transposed" else (batch, first, second)


def tensor_coordinates(
    batch: torch.Tensor, row: torch.Tensor, column: torch.Tensor, shape: tuple[int, ...], layout: str
) -> tuple[torch.Tensor, ...]:
    """The inverse of `matrix_coordinates`, for a tensor of this shape and layout."""
    if layout == "experts":
        return batch, row, column
    if layout == "experts_transposed":
        return batch, column, row
    kernel = torch.unravel_index(batch, shape[2:]) if len(shape) > 2 else ()
    return (column, row, *kernel) if layout == "transposed" else (row, column, *kernel)


def sides_in_tensor(rows: int, columns: int, layout: str, dims: int) -> tuple[int, ...]:
    """The size of a block of (out, in) weights of a matrix in each of the tensor's dimensions."""
    if layout.endswith("transposed"):
        rows, columns = columns, rows
    if layout.startswith("experts"):
        return (1, rows, columns)
    return (rows, columns, *(1,) * (dims - 2))


def rows_as_tensor(shape: tuple[int, ...], layout: str) -> tuple[tuple[int, ...], str]:
    """Shape and layout of a tensor as rows of its flattened weights: the experts' matrices become one."""
    if not layout.startswith("experts"):
        return shape, layout
    return (shape[0] * shape[1], shape[2]), "matrix" if layout == "experts" else "transposed"


def ravel(coordinates: Sequence[torch.Tensor], shape: Sequence[int]) -> torch.Tensor:
    """Flat indices (int64) of coordinates in a shape: the inverse of `torch.unravel_index`."""
    flat = torch.zeros_like(coordinates[0])
    for coordinate, size in zip(coordinates, shape, strict=True):
        flat = flat * size + coordinate
    return flat


def group_indices(indices: torch.Tensor, target: Target, rows: int | None, columns: int | None) -> torch.Tensor:
    """The index of the group of each weight of a tensor, given by its flat index (both int64).

    A group is `rows` neighbouring rows of a matrix, `columns` neighbouring weights of each, and all of them for None.
    Groups end with their matrix; they are numbered matrix by matrix, from top to bottom and left to right.
    """
    if rows is None:
        return torch.zeros_like(indices)
    _, height, width = target.matrices
    coordinates = torch.unravel_index(indices, target.shape)
    if len(target.shape) == 1:
        batch, row, column = torch.zeros_like(indices), torch.zeros_like(indices), indices
    else:
        batch, row, column = matrix_coordinates(coordinates, target)
    down, across = -(-height // rows), 1 if columns is None else -(-width // columns)
    return (batch * down + row // rows) * across + (0 if columns is None else column // columns)
