"""Units of a pattern where processes hold parts of a tensor: which lie whole in a part, and which several share.

What lies whole in a part is ranked there. The weights of a unit that several processes share are sent to one of them,
which ranks the unit and sends back what it keeps: so every unit is worth what it would be on one process, to the bit.
"""

import math
from dataclasses import dataclass

import torch

from ..engines.holdings import Holding
from ..engines.processes import exchange, processes
from ..engines.regions import Region
from ..methods.patterns import Pattern
from ..model.layouts import (
    Target,
    as_matrices,
    from_matrices,
    matrix_coordinates,
    ravel,
    rows_as_tensor,
    sides_in_tensor,
    tensor_coordinates,
)


@dataclass(frozen=True)
class Division:
    """The whole units in a part of a tensor: a box of the flattened part's range `span`, read in the shape `view`."""

    target: Target
    pattern: Pattern
    region: Region
    span: slice
    view: tuple[int, ...]
    box: tuple[slice, ...]
    layout: str

    def whole_units(self, part: torch.Tensor) -> torch.Tensor:
        """The whole units of the flattened part as a stack of matrices, in its memory."""
        return as_matrices(part[self.span].view(self.view)[self.box], self.layout)

    def write(self, part: torch.Tensor, stack: torch.Tensor) -> None:
        """Write a stack of matrices like that of `whole_units` into the flattened part."""
        part[self.span].view(self.view)[self.box] = from_matrices(stack, self.layout, self._sizes)

    def shared_positions(self) -> torch.Tensor:
        """The positions of weights whose units other processes hold parts of (int64)."""
        if math.prod(self._sizes) == self.region.weights:
            return torch.zeros(0, dtype=torch.int64)
        is_shared = torch.ones(self.region.weights, dtype=torch.bool)
        is_shared[self.span].view(self.view)[self.box] = False
        return is_shared.nonzero().squeeze(1)

    def unit_indices(self, units: torch.Tensor) -> torch.Tensor:
        """The indices in the whole tensor of whole units, from their numbers in `whole_units` (both int64)."""
        rows, columns = self.pattern.sides
        matrices = as_matrices(torch.empty(self._sizes, device="meta"), self.layout).shape
        batch, row, column = torch.unravel_index(units, (matrices[0], matrices[1] // rows, matrices[2] // columns))
        coordinates = tensor_coordinates(batch, row * rows, column * columns, self._sizes, self.layout)
        inside = [one + part.start for one, part in zip(coordinates, self.box, strict=True)]
        positions = ravel(inside, self.view) + self.span.start
        return units_of(self.region.indices(positions), self.target, self.pattern)[0]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.box)


def divide(target: Target, pattern: Pattern, region: Region) -> Division:
    """Find the whole units in a part of a tensor that the pattern fits."""
    shape, layout = target.shape, target.layout
    start, view, span = region.start, region.size, slice(0, region.weights)
    if region.shape != shape:  # a range of the flattened tensor: the whole rows in it
        shape, layout = rows_as_tensor(shape, layout)
        a_row = math.prod(shape[1:])
        first = math.ceil(region.first / a_row)
        rows = max((region.first + region.weights) // a_row - first, 0)
        start, view = (first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
        before = first * a_row - region.first if rows else 0
        span = slice(before, before + rows * a_row)
    box = []
    for begin, size, side in zip(start, view, sides_in_tensor(*pattern.sides, layout, len(shape)), strict=True):
        low = min(-begin % side, size)
        high = (begin + size) // side * side - begin
        box.append(slice(low, max(low, high)))
    return Division(target, pattern, region, span, view, tuple(box), layout)


def units_of(indices: torch.Tensor, target: Target, pattern: Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The unit of each weight of a tensor and its place in the unit, from its index (all int64)."""
    rows, columns = pattern.sides
    batch, row, column = matrix_coordinates(torch.unravel_index(indices, target.shape), target)
    _, all_rows, all_columns = target.matrices
    unit = (batch * (all_rows // rows) + row // rows) * (all_columns // columns) + column // columns
    return unit, (row % rows) * columns + column % columns


# ---- Units that processes share ----


@dataclass(frozen=True)
class SharedUnits:
    """Units that this process ranks for others: their indices, and (unit, row, column) scores and masks."""

    indices: torch.Tensor
    scores: torch.Tensor
    kept: torch.Tensor
    _order: torch.Tensor  # of what came, by unit and place
    _came: list[int]
    _sent: torch.Tensor  # positions here, in the order in which they were sent

    def give_back(self, values: torch.Tensor, part: torch.Tensor) -> None:
        """Write a value for each weight of all shared units (as `scores`) into the flattened parts that hold them."""
        values = values.reshape(-1)
        sendable = values.to(torch.uint8) if values.dtype == torch.bool else values
        answers = torch.empty_like(sendable)
        answers[self._order] = sendable
        received, _ = exchange(answers, self._came)
        part[self._sent] = received.to(part.device, part.dtype)


def share_units(division: Division, holding: Holding, scores: torch.Tensor, kept: torch.Tensor) -> SharedUnits:
    """Bring the weights of each shared unit together on one process.

    `scores` (float32 or int32) and `kept` (bool) are of the flattened part. Every process must call this for the same
    tensor.
    """
    positions = division.shared_positions().to(scores.device)
    units, places = units_of(division.region.indices(positions), division.target, division.pattern)
    ranks = torch.tensor(holding.peers, device=scores.device)[units % len(holding.peers)]
    order = ranks.argsort(stable=True)
    positions = positions[order]
    size = division.pattern.unit_size
    bits = scores[positions].view(torch.int32).to(torch.int64)
    rows = torch.stack([(units * size + places)[order] * 2 + kept[positions], bits], dim=1)
    received, came = exchange(rows, torch.bincount(ranks, minlength=processes()).tolist())
    by_unit = received[:, 0].argsort()
    numbers = received[by_unit, 0]
    rows_of_unit, columns_of_unit = division.pattern.sides
    stack = (-1, rows_of_unit, columns_of_unit)
    return SharedUnits(
        indices=numbers[::size] // 2 // size,
        scores=received[by_unit, 1].to(torch.int32).view(scores.dtype).reshape(stack),
        kept=(numbers % 2).to(torch.bool).reshape(stack),
        _order=by_unit,
        _came=came,
        _sent=positions,
    )
