"""What pruning at once has done to a model, and to each of its matrices."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..config.checks import as_path
from ..config.pruning import PruningConfig
from ..saved.pruning_state import PruningState, save_pruning
from .work import Work


@dataclass(frozen=True)
class PrunedLayer:
    """What was done to a matrix: a layer's, an expert's or that of a group of a convolution (`part`).

    `error` is the relative squared error of its outputs on some of the inputs, see `solve.Solved`; None without inputs.
    """

    name: str
    part: int
    weights: int
    masked: int
    tokens: int
    error: float | None
    seconds: float


# Called after each matrix with how many are done, how many there are, and what was done to it.
Progress = Callable[[int, int, PrunedLayer], None]


@dataclass
class Pruned:
    """What `prune` has done.

    Attributes:
        config: the configuration.
        masks: parameter name -> bool tensor of the parameter's shape, on the CPU, True where a weight is kept. They are
            held as one bit a weight, and unpacked when they are asked for.
        layers: what was done to each matrix, in order; none if the method reads no inputs.
        samples: how many samples the calibration data have.
        tokens: how many of their tokens counted.
        damping: the share of the diagonal that was added to it; None where no products were read.
        left_dense: names of target tensors whose layers the first batch did not call, and which were left as they are.
        notes: sentences about what was pruned otherwise, or not at all, for people.
    """

    config: PruningConfig
    masks: Mapping[str, torch.Tensor]
    layers: list[PrunedLayer] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    damping: float | None = None
    left_dense: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _work: Work | None = field(default=None, repr=False)

    @property
    def sparsity(self) -> float:
        """The share of masked weights of the tensors that were pruned."""
        weights = kept = 0
        for mask in self.masks.values():
            weights, kept = weights + mask.numel(), kept + int(mask.sum())
        return (weights - kept) / max(weights, 1)

    def save(self, directory: str | os.PathLike) -> None:
        """Write masks and configuration beside a model that `save_pretrained` has written there.

        Then remove the finished layers that were kept to resume from.
        """
        state = PruningState(completed_steps=0, finished={0})
        save_pruning(as_path(directory), [self.config], state, self.masks, notes={"sparsity": self.sparsity})
        if self._work is not None:
            self._work.remove()
