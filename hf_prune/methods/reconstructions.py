"""Reconstructions: functions that change what reads removed units, so that its output stays as it was.

To add one, write its function and one entry of `RECONSTRUCTIONS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# The ridge of `least_squares`: this times the number of kept features for each token.
_RIDGE = 2.0

# What is added to it, as a share of the mean, for features that are always zero.
_FLOOR = 1e-6


@dataclass(frozen=True)
class InputMoments:
    """Moments of the inputs x of a linear layer over the tokens of a step, on all processes together.

    Attributes:
        tokens: the number of tokens.
        means: the mean m of x (float64, of the number of input features).
        products: the sum of (x - m) (x - m)ᵀ (float32, input features by input features).
    """

    tokens: int
    means: torch.Tensor
    products: torch.Tensor

    @property
    def gram(self) -> torch.Tensor:
        """The mean of x xᵀ (float32)."""
        means = self.means.to(self.products)
        return (self.products / max(self.tokens, 1)).addr_(means, means)


@dataclass(frozen=True)
class Reconstruction:
    """How to change the layers that read removed units.

    Attributes:
        solve: `(weight, kept, moments, has_bias) -> (weight, shift)` for the weight of a linear layer (out, in) in
            float64 and the input features that are kept (bool): its new weight, zero where features are not kept, and
            what is to be added to its bias (out), zero if it has none.
        words: what is done, as model cards describe it.
        paper: a BibTeX entry.
    """

    solve: Callable[[torch.Tensor, torch.Tensor, InputMoments, bool], tuple[torch.Tensor, torch.Tensor]]
    words: str
    paper: str | None = None


def least_squares(
    weight: torch.Tensor, kept: torch.Tensor, moments: InputMoments, has_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The change D of the kept weights K that minimises `mean ||x_K Dᵀ + c - x_R Rᵀ||² + ||D ridge^½||²` over tokens.

    R are the weights of the features that are not kept; c is zero if the layer has no bias. So what the layer loses is
    regressed on what it keeps: `D = R S_RK (S_KK + ridge)⁻¹`, where S has the second moments of the inputs, about their
    means if there is a bias. The ridge is the diagonal of S_KK times 2 K / tokens, as a change follows noise if tokens
    are few: `benchmarks/README.md` compares it with others. Where rounding leaves the matrix indefinite nevertheless,
    it is ten times as large, and so on. (He, Zhang and Sun, arXiv 1707.06168, equation 5, with a ridge.)
    """
    products, means = moments.products.to(weight) / moments.tokens, moments.means.to(weight)
    if not has_bias:
        products = products + torch.outer(means, means)
    inside, removed = products[kept][:, kept], weight[:, ~kept]
    squares = inside.diagonal()
    ridge = _RIDGE * len(squares) / moments.tokens * squares + _FLOOR * squares.mean()
    new = weight * kept
    shift = torch.zeros_like(weight[:, 0])
    if squares.sum() > 0:  # else the kept inputs are all zero, or constant, and explain nothing
        factor, failed = torch.linalg.cholesky_ex(inside + torch.diag(ridge))
        while failed:
            ridge = 10 * ridge
            factor, failed = torch.linalg.cholesky_ex(inside + torch.diag(ridge))
        new[:, kept] += torch.cholesky_solve(products[kept][:, ~kept] @ removed.T, factor).T
    if has_bias:
        shift = (weight - new) @ means
    return new, shift


RECONSTRUCTIONS: dict[str, Reconstruction] = {
    "least_squares": Reconstruction(
        least_squares,
        words="what reads them is solved anew by least squares, so that its output changes least",
        paper="""@inproceedings{he2017channel,
  title = {Channel Pruning for Accelerating Very Deep Neural Networks},
  author = {He, Yihui and Zhang, Xiangyu and Sun, Jian},
  booktitle = {International Conference on Computer Vision},
  year = {2017}
}""",
    ),
}
