"""One matrix pruned: what it is to approximate, the mask, the weights that stay, and the error that is left."""

from dataclasses import dataclass, replace

import torch

from ..config.calibration import CalibrationConfig
from ..config.pruning import PruningConfig
from ..methods.choosing import drop_lowest, dropped_units
from ..methods.criteria import CRITERIA, Piece
from ..methods.damping import Damping, full_precision
from ..methods.scopes import SCOPES
from ..methods.solvers import SOLVERS, Problem
from ..methods.survivors import solve_survivors, wanted_weights
from ..quantise.codebooks import not_zero, share
from ..quantise.feeding import share_with_feedback
from ..quantise.kmeans import kmeans
from .grams import Moments

# The damping of least squares after a method that has none of its own: that of `alps`.
_OF_LEAST_SQUARES = Damping(0.3, "own")


@dataclass(frozen=True)
class Matrix:
    """A matrix to prune.

    Attributes:
        name: of the parameter that it is, or is part of.
        weight: the dense weights (out, in), float32.
        kept: False where a weight is masked already (out, in).
        drop: how many more units of the pattern are dropped.
        indices: the flat index of each weight in the parameter (out, in; int64), for the method `random`.
    """

    name: str
    weight: torch.Tensor
    kept: torch.Tensor
    drop: int
    indices: torch.Tensor | None = None


@dataclass(frozen=True)
class Solved:
    """The mask (bool) and the weights (float32, zero where masked) of a matrix, and the relative error of its outputs.

    `error` is `mean |x (W' - W*)ᵀ|² / mean |x W*ᵀ|²` on some of the inputs, for the weights W* that were to be
    approximated; None without inputs.
    """

    kept: torch.Tensor
    weight: torch.Tensor
    error: float | None


def needs_products(config: PruningConfig) -> bool:
    """Whether weights that stay are changed, for which the products of inputs are needed, not their norms alone."""
    solver = SOLVERS.get(config.method)
    return config.reconstruction is not None or (solver is not None and solver.reads == "products")


def by_magnitude(config: PruningConfig) -> PruningConfig:
    """The configuration with which a matrix is pruned that nothing reaches: an expert that gets no token."""
    return replace(config, method="magnitude", reconstruction=None)


def no_moments(weight: torch.Tensor) -> Moments:
    """The moments of a matrix that nothing reaches."""
    return Moments(0, torch.ones(weight.shape[1], device=weight.device))


def damping_of(config: PruningConfig, calibration: CalibrationConfig) -> Damping:
    """The damping of a method for what layers approximate, with the share that the user asks for."""
    solver = SOLVERS.get(config.method)
    damping = (solver.damping if solver is not None else None) or _OF_LEAST_SQUARES
    if solver is not None and solver.own_damping is not None and calibration.dense_weight == 0:
        damping = solver.own_damping
    return damping if calibration.damping is None else replace(damping, share=calibration.damping)


@torch.no_grad()
def solve(matrix: Matrix, moments: Moments, config: PruningConfig, calibration: CalibrationConfig) -> Solved:
    """Prune a matrix with the method of a configuration, from the moments of its inputs."""
    damping = damping_of(config, calibration)
    wanted = matrix.weight
    with full_precision(wanted.device):
        if moments.gram is not None and (moments.cross is not None or moments.lack is not None):
            weights = (calibration.dense_weight, calibration.residual_weight)
            wanted = wanted_weights(wanted, moments.gram, damping, moments.cross, moments.lack, *weights)
        kept, values = _pruned(matrix, wanted, moments, config, damping)
        values = values.masked_fill_(~kept, 0)
        if config.shared_values is not None:
            values = _shared(values, kept, moments, int(config.shared_values), damping).masked_fill_(~kept, 0)
        return Solved(kept, values, _error(values, wanted, moments))


def _pruned(
    matrix: Matrix, wanted: torch.Tensor, moments: Moments, config: PruningConfig, damping: Damping
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask and the weights."""
    pattern, within_rows = config.parsed_pattern, SCOPES[config.scope].within_rows
    solver = SOLVERS.get(config.method)
    if solver is not None and (moments.gram is not None or solver.reads != "products"):
        problem = Problem(
            name=matrix.name,
            weight=matrix.weight[None],
            kept=matrix.kept[None],
            pattern=pattern,
            drop=matrix.drop,
            statistic=_norms(moments).expand_as(matrix.weight)[None] if solver.reads == "inputs" else None,
            seed=config.pruning_seed,
            gram=moments.gram,
            wanted=wanted[None],
            damping=damping.share,
            within_rows=within_rows,
        )
        kept, values = solver.solve(problem)
        return kept[0], values[0]
    scores = _scores(matrix, moments, config)
    kept = drop_lowest(scores, matrix.kept, pattern, matrix.drop, within_rows, norm=config.block_norm)
    if config.reconstruction is None or moments.gram is None:
        return kept, matrix.weight.clone()
    return kept, solve_survivors(wanted, moments.gram, kept, damping)


def _shared(values: torch.Tensor, kept: torch.Tensor, moments: Moments, number: int, damping: Damping) -> torch.Tensor:
    """The weights with few values: with the products of inputs, later columns make up for what earlier ones lose."""
    if moments.gram is not None:
        return share_with_feedback(values, moments.gram, kept, number, damping)
    codebook = not_zero(kmeans(values[kept], number, importance=moments.squares.expand_as(values)[kept]))
    return share(values, kept, codebook)


def _scores(matrix: Matrix, moments: Moments, config: PruningConfig) -> torch.Tensor:
    """The scores of an element-wise criterion; those of `wanda` for a solver that has no inputs to read."""
    indices = None if matrix.indices is None else matrix.indices.reshape(-1)
    piece = Piece(
        name=matrix.name,
        seed=config.pruning_seed,
        index_of=None if indices is None else lambda positions: indices[positions],
        statistic=_norms(moments).expand_as(matrix.weight).reshape(-1),
    )
    method = config.method if config.method in CRITERIA else "magnitude"
    return CRITERIA[method].score(matrix.weight.reshape(-1), piece).view(matrix.weight.shape)


def _norms(moments: Moments) -> torch.Tensor:
    """The norm of each input feature over all tokens."""
    return (moments.squares * moments.tokens).sqrt()


def _error(values: torch.Tensor, wanted: torch.Tensor, moments: Moments) -> float | None:
    if moments.sample is None:
        return None
    size = float((moments.sample @ wanted.T).square().sum())
    return float((moments.sample @ (values - wanted).T).square().sum()) / size if size > 0 else 0.0


def more_to_drop(kept: torch.Tensor, config: PruningConfig, count: int) -> int:
    """How many more units are dropped in a matrix, where `count` are to be in all."""
    return max(count - int(dropped_units(kept, config.parsed_pattern).sum()), 0)
