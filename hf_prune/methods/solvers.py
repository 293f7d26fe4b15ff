"""Solvers: functions from the weights of a tensor to a mask and new values of the weights that remain.

To add a solver, write its function and one entry of `SOLVERS`. A criterion only ranks weights; a solver may also change
the remaining ones, to compensate for those that are pruned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import admm, obs
from .damping import Damping, full_precision
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
        gram: the mean over tokens of x xᵀ, undamped (in, in; float32), for a solver that reads `products`; otherwise
            None. Several matrices then have the same inputs.
        wanted: the weights that a solver with `gram` approximates (float32, of the weight's shape), see
            `survivors.wanted_weights`; None for the weights themselves, with zeros where they are masked.
        damping: the share of the diagonal of the gram matrix that is added to it, in place of `Solver.damping.share`.
        within_rows: whether every row (output; with blocks, row of blocks) is to end with equally many dropped units,
            to one. A solver may do that only where it reads `products`.
    """

    name: str
    weight: torch.Tensor
    kept: torch.Tensor
    pattern: Pattern
    drop: int
    statistic: torch.Tensor | None
    seed: int
    gram: torch.Tensor | None = None
    wanted: torch.Tensor | None = None
    damping: float | None = None
    within_rows: bool = False


@dataclass(frozen=True)
class Solver:
    """How to prune a tensor and update the weights that remain.

    Attributes:
        solve: `problem -> (kept, values)`, both of the weight's shape: the mask, with exactly `problem.drop` more units
            dropped, and the new weights (float32); values of masked weights are ignored. The problem's tensors are
            left as they are.
        words: what is pruned, as model cards describe it.
        reads: what it needs besides the weights, from the optimizer step before a mask update: `inputs`, the norm of
            the input that each weight is multiplied with; `gradients`, the gradient of each weight; `products`, the
            gram matrix of the inputs, `Problem.gram`; or None.
        damping: what it adds to the diagonal of the gram matrix, if it reads one.
        own_damping: what pruning at once adds in place of it where every layer approximates its own outputs, and not
            those of the dense model; None for the same.
        numbers: `(out, in) -> numbers`: the most float32 numbers that it holds at once for a matrix of dense weights,
            with the problem's; None where it is not known.
        paper: a BibTeX entry.
    """

    solve: Callable[[Problem], tuple[torch.Tensor, torch.Tensor]]
    words: str
    reads: str | None = None
    damping: Damping | None = None
    own_damping: Damping | None = None
    numbers: Callable[[int, int], int] | None = None
    paper: str | None = None


def sparsegpt(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """One sweep over the columns, each of which makes up for what the columns before it have lost; see `obs.sweep`."""
    return _solve(obs.sweep, obs.DAMPING, problem)


def alps(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask by ADMM, and the weights under it by least squares; see `admm.admm`."""
    return _solve(admm.admm, admm.DAMPING, problem)


def _solve(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]], damping: Damping, problem: Problem
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve a problem as one matrix: more matrices with the same inputs are more rows."""
    assert problem.gram is not None
    shape = problem.weight.shape
    wanted = problem.weight if problem.wanted is None else problem.wanted
    if problem.wanted is None and not bool(problem.kept.all()):
        wanted = wanted * problem.kept
    if problem.damping is not None:
        damping = replace(damping, share=problem.damping)
    with torch.no_grad(), full_precision(wanted.device):
        kept, values = function(
            wanted.reshape(-1, shape[2]),
            problem.gram,
            problem.kept.reshape(-1, shape[2]),
            problem.pattern,
            problem.drop,
            damping,
            problem.within_rows,
        )
    return kept.reshape(shape), values.reshape(shape)


SOLVERS: dict[str, Solver] = {
    "sparsegpt": Solver(
        sparsegpt,
        words="the weights that the other weights of their outputs can make up for best, column by column",
        reads="products",
        damping=obs.DAMPING,
        own_damping=obs.OWN_DAMPING,
        numbers=obs.numbers,
        paper="""@inproceedings{frantar2023sparsegpt,
  title = {{SparseGPT}: Massive Language Models Can Be Accurately Pruned in One-Shot},
  author = {Frantar, Elias and Alistarh, Dan},
  booktitle = {International Conference on Machine Learning},
  year = {2023}
}""",
    ),
    "alps": Solver(
        alps,
        words="the weights without which the others, solved anew, change the outputs of their layer least",
        reads="products",
        damping=admm.DAMPING,
        numbers=admm.numbers,
        paper="""@inproceedings{meng2024alps,
  title = {{ALPS}: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models},
  author = {Meng, Xiang and Behdin, Kayhan and Wang, Haoyue and Mazumder, Rahul},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}""",
    ),
}
