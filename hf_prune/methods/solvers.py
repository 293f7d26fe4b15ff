"""Which weights go and what the others become: weights -> a mask and new values of the survivors.

To add a solver, write its function and one entry of `SOLVERS`. Where a criterion ranks weights as they are, a solver
may change those that stay, to make up for those that go.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .patterns import Pattern


@dataclass(frozen=True)
class Problem:
    """One tensor to solve.

    Attributes:
        name: the parameter's name.
        weight: its matrices (batch, out, in) in float32.
        kept: bool, of the same shape: False where a weight is masked already, and stays so.
        pattern: what is dropped together.
        drop: how many more units of the pattern are to be dropped, exactly.
        statistic: what the solver reads of each weight (float32, of the same shape), or None; see `Solver.reads`.
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
    """One way to prune a tensor and change what stays.

    Attributes:
        solve: `problem -> (kept, values)`, both of the weight's shape: the mask, with exactly `problem.drop` more units
            dropped, and the weights as they are to be (float32); values of masked weights do not count.
        words: what is pruned, as a card says it.
        reads: what it needs of each weight beside itself, in the optimizer step before a mask update: `inputs`, the
            norm of the input that it is multiplied with; `gradients`, its gradient; or None.
        paper: a BibTeX entry.
    """

    solve: Callable[[Problem], tuple[torch.Tensor, torch.Tensor]]
    words: str
    reads: str | None = None
    paper: str | None = None


SOLVERS: dict[str, Solver] = {}
