"""Which shard of a tensor a process holds, and where each of its weights lies in the whole tensor.

A weight's index is its flat index in the whole tensor; a position is its flat index in the shard.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Region:
    """A box in a tensor viewed with the shape `shape`: from `start`, of `size` in each dimension.

    A range of the flattened tensor is a box in the tensor viewed as one dimension. In both, positions follow the order
    of indices.
    """

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def weights(self) -> int:
        """The number of weights in the shard."""
        return math.prod(self.size)

    @property
    def all_weights(self) -> int:
        """The number of weights in the whole tensor."""
        return math.prod(self.shape)

    @property
    def first(self) -> int:
        """The index of the first weight; for an empty shard, where it would be."""
        return sum(start * stride for start, stride in zip(self.start, _strides(self.shape), strict=True))

    def slices(self, number: int) -> list[slice]:
        """The positions here of each of this number of equal parts of the tensor, cut along its first dimension."""
        if number == 1:
            return [slice(0, self.weights)]
        length, inner = self.shape[0] // number, math.prod(self.size[1:])
        bounds = [min(max(index * length - self.start[0], 0), self.size[0]) * inner for index in range(number + 1)]
        return [slice(first, end) for first, end in pairwise(bounds)]

    @property
    def is_range(self) -> bool:
        """Whether the indices are contiguous."""
        outermost = next((dim for dim, size in enumerate(self.size) if size != 1), len(self.size))
        return self.size[outermost + 1 :] == self.shape[outermost + 1 :]

    def indices(self, positions: torch.Tensor) -> torch.Tensor:
        """The indices of positions (both int64)."""
        if self.is_range:
            return positions + self.first
        indices = torch.zeros_like(positions)
        left = positions
        for start, size, stride in reversed(list(zip(self.start, self.size, _strides(self.shape), strict=True))):
            indices += (left % size + start) * stride
            left = left // size
        return indices

    def positions(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which indices lie in the shard (bool), and the positions of those that do (int64)."""
        inside = torch.ones_like(indices, dtype=torch.bool)
        positions = torch.zeros_like(indices)
        dims = zip(self.start, self.size, _strides(self.shape), _strides(self.size), self.shape, strict=True)
        for start, size, stride, local_stride, length in dims:
            coordinates = (indices // stride) % max(length, 1) - start
            inside &= (coordinates >= 0) & (coordinates < size)
            positions += coordinates * local_stride
        return inside, positions[inside]

    def overlaps(self, other: "Region") -> bool:
        """Whether two shards of a tensor may have a weight in common; False only if they have none."""
        if not self.weights or not other.weights:
            return False
        if self.shape == other.shape:
            sides = zip(self.start, self.size, other.start, other.size, strict=True)
            return all(start < after + more and after < start + size for start, size, after, more in sides)
        return self.first <= other.last and other.first <= self.last

    @property
    def last(self) -> int:
        """The index of the last weight of a shard that is not empty."""
        ends = [start + size - 1 for start, size in zip(self.start, self.size, strict=True)]
        return sum(end * stride for end, stride in zip(ends, _strides(self.shape), strict=True))


def whole(shape: Sequence[int]) -> Region:
    """The region of a whole tensor."""
    return Region(tuple(shape), (0,) * len(shape), tuple(shape))


def flat_range(weights: int, start: int, size: int) -> Region:
    """A range of the flattened tensor, cut to its end."""
    start = min(start, weights)
    return Region((weights,), (start,), (min(size, weights - start),))


def _strides(shape: Sequence[int]) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
