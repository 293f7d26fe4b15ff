"""Solvers: functions from the weights of a tensor to a mask and new values of the weights that remain.

To add a solver, write its function and one entry of `SOLVERS`. A criterion only ranks weights; a solver may also change
the remaining ones, to compensate for those that are pruned.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .patterns import Pattern


@dataclass(frozen=True)
class Problem:
    """A tensor that a solver is to prune.

    Attributes:
        name: the parameter's name.
        weight: its matrices (batch, out, in) in float32.
        kept: bool, of the same shape: False where a weight is masked already; it stays masked.
        pattern: what is dropped together.
        drop: exactly how many more units of the pattern are to be dropped.
        statistic: what the solver reads for each weight (float32, of the same shape), or None; see `Solver.reads`.
        seed: the configuration's seed.
    """

    name: str
    weight: torch.Tensor
    kept: torch.Tensor
    pattern: Pattern
    drop: int
    statistic: torch.Tensor | None
    seed: int


@dataclass(frozen=True)
class Solver:
    """How to prune a tensor and update the weights that remain.

    Attributes:
        solve: `problem -> (kept, values)`, both of the weight's shape: the mask, with exactly `problem.drop` more units
            dropped, and the new weights (float32); values of masked weights are ignored.
        words: what is pruned, as model cards describe it.
        reads: what it needs besides the weights, from the optimizer step before a mask update: `inputs`, the norm of
            the input that each weight is multiplied with; `gradients`, the gradient of each weight; or None.
        paper: a BibTeX entry.
    """

    solve: Callable[[Problem], tuple[torch.Tensor, torch.Tensor]]
    words: str
    reads: str | None = None
    paper: str | None = None


SOLVERS: dict[str, Solver] = {}
