"""Weights of a layer rounded to few values, each column making up for what the columns before it have lost."""

import torch

from ..methods.damping import Damping, factor
from .codebooks import nearest, not_zero
from .kmeans import kmeans

# Columns after which those right of them are updated together.
_COLUMNS = 128


def share_with_feedback(
    weight: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    number: int,
    damping: Damping,
) -> torch.Tensor:
    """Weights W' with few values under a mask, so that `tr((W' - W) H (W' - W)ᵀ)` is small.

    W are the weights that a solver has found under the mask, not the dense ones: a solver makes up for what is masked
    better than this sweep would. The values are those of the best k-means of W, each weight as important as the
    diagonal of the gram matrix at its input. Then the columns are swept from left to right: each takes the nearest
    values, and zero where it is masked, and the columns right of it make up for what it has lost. With the damped gram
    matrix H = V Vᵀ (V upper triangular) and R = V⁻¹, a loss l of column j changes a column k right of it by
    `-l R_jk / R_jj` (Frantar et al., GPTQ, arXiv 2210.17323).

    Costs d³/2 + r d² multiplications and additions for r x d weights; `numbers` says how much memory it needs.

    Args:
        weight: the weights (out, in) that are approximated, float32, zero where masked.
        gram: the mean over tokens of x xᵀ (in, in), undamped.
        kept: the mask (out, in), bool.
        number: how many values there are, at most.
        damping: what is added to the diagonal of the gram matrix.
    """
    codebook = not_zero(kmeans(weight[kept], number, importance=gram.diagonal().expand_as(weight)[kept]))
    codebook = codebook.to(weight.device)
    upper = factor(gram.flip(0, 1), damping)[0].flip(0, 1)
    inverse = torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True)
    ratios = inverse.div_(inverse.diagonal()[:, None].clone())
    now, stays = weight.T.clone(memory_format=torch.contiguous_format), kept.T.contiguous()
    lost = torch.empty_like(now)
    for first in range(0, len(now), _COLUMNS):
        end = min(first + _COLUMNS, len(now))
        for column in range(first, end):
            shared = codebook[nearest(now[column], codebook)] * stays[column] if len(codebook) else now[column] * 0
            torch.sub(now[column], shared, out=lost[column])
            now[column] = shared
            now[column + 1 : end].addcmul_(ratios[column, column + 1 : end, None], lost[column], value=-1)
        now[end:].addmm_(ratios[first:end, end:].T, lost[first:end], alpha=-1)
    return now.T.contiguous()


def numbers(rows: int, columns: int) -> int:
    """The most float32 numbers that `share_with_feedback` holds at once: 4 d² and 4.5 r d, with what it is given."""
    return 4 * columns**2 + 9 * rows * columns // 2
