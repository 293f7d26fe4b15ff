"""A tensor to prune as this process holds it, with what its method reads and remembers for each weight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from ..engines.holdings import Holding
from ..methods.criteria import Criterion, Piece
from ..methods.reconstructions import InputMoments
from ..model.layouts import Target, features_of

# Weights processed at a time: small enough for a CPU's cache, large enough to keep an accelerator busy.
_CPU_PIECE = 1 << 18
_ACCELERATOR_PIECE = 1 << 24


@dataclass(frozen=True)
class LocalTensor:
    """This process's shard of a tensor, or all of it without sharding; flat.

    Attributes:
        weight: its weights; masked weights that may come back have the values that they had.
        mask: True where a weight is kept; it is changed in place.
        masked: the number of masked weights of the tensor on all processes.
        counted: whether this process counts the shard: one of those that hold the same shard does.
        inputs: the norm of each input feature, if it was read.
        moments: the moments of the input features, if they were read.
        gradient: the gradient of each weight, if it was read.
        memory: what the method remembers for each weight, by name.
        regrowable: True where a weight may be kept after the next update; None if that is `mask`.
    """

    target: Target
    holding: Holding
    weight: torch.Tensor
    mask: torch.Tensor
    masked: int
    counted: bool
    inputs: torch.Tensor | None = None
    moments: InputMoments | None = None
    gradient: torch.Tensor | None = None
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)
    regrowable: torch.Tensor | None = None

    @property
    def candidates(self) -> torch.Tensor:
        """True where a weight may be kept after the next update."""
        return self.mask if self.regrowable is None else self.regrowable

    def pieces(self) -> Iterator[slice]:
        """Slices of the weights that are processed at a time: at least one, which may be empty."""
        size = _CPU_PIECE if self.weight.device.type == "cpu" else _ACCELERATOR_PIECE
        for start in range(0, max(self.weight.numel(), 1), size):
            yield slice(start, start + size)

    def statistic(self, reads: str | None, part: slice = slice(None)) -> torch.Tensor | None:
        """What a method reads for each weight of a slice (float32); None if nothing was read in this step."""
        if reads == "gradients":
            return None if self.gradient is None else self.gradient[part]
        if reads != "inputs" or self.inputs is None:
            return None
        return self.inputs.to(self.weight.device)[self.features(part)[1]]

    def features(self, part: slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and the input feature of each weight of a slice (both int64)."""
        start, stop, _ = part.indices(self.weight.numel())
        positions = torch.arange(start, stop, dtype=torch.int64, device=self.weight.device)
        return features_of(self.holding.region.indices(positions), self.target)

    def piece(self, criterion: Criterion, seed: int, part: slice = slice(None)) -> Piece:
        """What a criterion is told about the weights of a slice."""
        return Piece(
            self.target.name,
            offset=part.start or 0,
            seed=seed,
            index_of=self.holding.region.indices,
            statistic=self.statistic(criterion.reads, part),
            memory={name: values[part] for name, values in self.memory.items()},
        )
