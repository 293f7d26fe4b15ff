"""Penalties on weights: what they come to, and their gradients. To add one, write two functions and a table line.

All take weights and the sides of a pattern's units, rows (outputs) and columns (inputs), and compute in float32: the
value is a scalar, the gradient has the weights' shape. Those of single weights take any shape and leave the sides
unused, those of units a stack of matrices (batch, out, in), see `targets.as_matrices`, whose sides are whole multiples
of the units'.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Sides = tuple[int, int]


def _l1(weights: torch.Tensor, sides: Sides) -> torch.Tensor:
    """The sum of absolute values."""
    return weights.float().abs().sum()


def _l1_gradient(weights: torch.Tensor, sides: Sides) -> torch.Tensor:
    return weights.sign().float()


def _l2(weights: torch.Tensor, sides: Sides) -> torch.Tensor:
    """Half the sum of squares, as weight decay has it."""
    return weights.float().square().sum() / 2


def _l2_gradient(weights: torch.Tensor, sides: Sides) -> torch.Tensor:
    return weights.to(torch.float32, copy=True)


def _as_units(weights: torch.Tensor, sides: Sides) -> torch.Tensor:
    """(batch, out, in) -> (batch, out / rows, rows, in / columns, columns), in float32."""
    batch, out, features = weights.shape
    rows, columns = sides
    return weights.float().reshape(batch, out // rows, rows, features // columns, columns)


def _norms(units: torch.Tensor) -> torch.Tensor:
    return units.square().sum(dim=(2, 4), keepdim=True).sqrt()


def _group_lasso(weights: torch.Tensor, sides: Sides) -> torch.Tensor:
    """The sum of the l2 norms of units, each times the square root of its size (Yuan and Lin, 2006, equation 2.1)."""
    return math.sqrt(math.prod(sides)) * _norms(_as_units(weights, sides)).sum()


def _group_lasso_gradient(weights: torch.Tensor, sides: Sides) -> torch.Tensor:
    """The subgradient that is zero for units of zeros."""
    units = _as_units(weights, sides)
    norms = _norms(units)
    return (units / norms.where(norms > 0, 1) * math.sqrt(math.prod(sides))).reshape(weights.shape)


@dataclass(frozen=True)
class Penalty:
    """What weights come to, and the gradient of that; `of_units` says that it is not a sum over single weights."""

    value: Callable[[torch.Tensor, Sides], torch.Tensor]
    gradient: Callable[[torch.Tensor, Sides], torch.Tensor]
    of_units: bool = False
    paper: str | None = None


PENALTIES: dict[str, Penalty] = {
    "l1": Penalty(
        _l1,
        _l1_gradient,
        paper="""@article{tibshirani1996regression,
  title = {Regression Shrinkage and Selection via the Lasso},
  author = {Tibshirani, Robert},
  journal = {Journal of the Royal Statistical Society: Series B},
  volume = {58},
  number = {1},
  pages = {267--288},
  year = {1996}
}""",
    ),
    "l2": Penalty(_l2, _l2_gradient),
    "group_lasso": Penalty(
        _group_lasso,
        _group_lasso_gradient,
        of_units=True,
        paper="""@article{yuan2006model,
  title = {Model selection and estimation in regression with grouped variables},
  author = {Yuan, Ming and Lin, Yi},
  journal = {Journal of the Royal Statistical Society: Series B},
  volume = {68},
  number = {1},
  pages = {49--67},
  year = {2006}
}""",
    ),
}
