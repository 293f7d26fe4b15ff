"""SparseGPT: the optimal brain surgeon in one sweep over the columns of a matrix."""

import numpy as np
import torch

from .choosing import choose_units, drop_counts, dropped_units, row_counts, shares
from .damping import Damping, factor
from .patterns import Pattern

# Columns in which the mask is chosen together, as published.
_COLUMNS = 128

# Columns after which the others of the block are updated: few enough to stay in a processor's cache meanwhile.
_AT_ONCE = 16

# A tenth of the mean of the diagonal: ten times what the paper's code adds, and better on language models where layers
# approximate the dense model's outputs, or where there are few tokens. For a layer's own outputs, the paper's is.
DAMPING = Damping(0.1, "mean")
OWN_DAMPING = Damping(0.01, "mean")


def sweep(
    wanted: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    pattern: Pattern,
    drop: int,
    damping: Damping = DAMPING,
    within_rows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop units of a matrix, and change the weights right of each so that `tr(D H Dᵀ)` grows least.

    H is the damped gram matrix and D the new weights minus those that are wanted. With H = V Vᵀ (V upper triangular),
    what is dropped from column j adds `(w V_jj)²` to the error once the columns right of it have made up for it. The
    matrix is swept from left to right in blocks of 128 columns. In each, the units with the lowest sums of `(w V_jj)²`
    at its start are dropped; with n:m, these choose the groups, and within a group the m - n lowest at its first column
    are dropped. (Frantar and Alistarh, arXiv 2301.00774, section 3 and algorithm 1.)

    All blocks end with the same share of dropped units, by largest remainder, so that the count is exact; those in
    which more are masked already stay as they are, and the others share the rest.

    The paper factors the inverse of H, and updates all columns to the right after each block. That is the same as
    `w_B = wanted_B - (D_<B V_<B,B) V_BB⁻¹` for a block B, which reads V, and needs no inverse: d³/6 + r d²/2
    multiplications and additions for r x d weights. `numbers` says how much memory it needs; the gram matrix is left as
    it is.

    Args:
        wanted: the weights (out, in) that are approximated.
        gram: the mean over tokens of x xᵀ (in, in), undamped.
        kept: False where a weight is masked already (out, in); it stays masked, and its column makes up for it.
        pattern: what is dropped together.
        drop: how many more units are dropped.
        damping: what is added to the diagonal of the gram matrix.
        within_rows: whether each row drops equally many units, see `choosing.drop_lowest`.

    Returns the mask and the new weights (out, in), zero where masked. Raises PruningStateError if the gram matrix has
    no Cholesky factor at any damping.
    """
    columns = wanted.shape[1]
    upper = factor(gram.flip(0, 1), damping)[0].flip(0, 1)
    weights = wanted.T.contiguous()  # by column, so that a column's numbers lie together
    changes = torch.empty_like(weights)
    mask = torch.empty_like(kept)
    width = _COLUMNS // pattern.sides[1] * pattern.sides[1] or pattern.sides[1]
    counts = _counts(kept, pattern, drop, width, within_rows)
    for place, start in enumerate(range(0, columns, width)):
        block = slice(start, min(start + width, columns))
        now, change = weights[block], changes[block]
        torch.neg(now, out=change)
        inner = upper[block, block]
        inverse = torch.linalg.solve_triangular(inner, torch.eye(len(now)).to(inner), upper=True)
        if start:
            now -= inverse.T @ (upper[:start, block].T @ changes[:start])
        mask[:, block] = _sweep_block(now, inner, inverse, kept[:, block], pattern, counts[:, place])
        change += now
    del changes, change
    return mask, weights.T.contiguous()


def numbers(rows: int, columns: int) -> int:
    """The most float32 numbers that `sweep` holds at once: 3 d² + 1.5 r d, or 2 d² + 3.75 r d + 512 r if that is more.

    What it is given is among them: the gram matrix, d², and weights and mask, 1.25 r d. At first there are two more
    matrices d²; then the factor, the weights by column with how they have changed, or with those that it returns, the
    mask, and four times the 128 columns of a block. With other `wanted` weights, or with zeros, it is r d more.
    """
    square, plain = columns**2, rows * columns
    return max(3 * square + 3 * plain // 2, 2 * square + 15 * plain // 4 + 4 * _COLUMNS * rows)


def _sweep_block(
    now: torch.Tensor,
    upper: torch.Tensor,
    inverse: torch.Tensor,
    kept: torch.Tensor,
    pattern: Pattern,
    counts: np.ndarray,
) -> torch.Tensor:
    """Choose the mask (out, columns) of a block, and change its weights `now` (columns, out) in place."""
    costs = upper.diagonal()[:, None]
    ratios = inverse / inverse.diagonal()[:, None]
    scores = (now * costs).square_().T
    is_grouped = pattern.name == "n:m"
    if is_grouped:
        groups = choose_units(scores, kept, pattern, counts).T.contiguous()
        gone = kept.T.logical_not()
    else:
        gone = drop_counts(scores, kept, pattern, counts).logical_not_().T
    lost = gone.to(now.dtype)
    before = torch.ones(pattern.columns, pattern.columns, dtype=torch.bool, device=now.device).tril_()[:, :, None]
    step = (_AT_ONCE // pattern.columns or 1) * pattern.columns if is_grouped else _AT_ONCE
    for start in range(0, len(now), step):
        stop = min(start + step, len(now))
        for column in range(start, stop):
            if is_grouped and column % pattern.columns == 0:
                group = slice(column, column + pattern.columns)
                lowest = _lowest_of_columns((now[group] * costs[group]).square_(), gone[group], before, pattern)
                gone[group] |= lowest.logical_and_(groups[column // pattern.columns])
                lost[group] = gone[group]
            lost[column] *= now[column]
            now[column + 1 : stop].addcmul_(ratios[column, column + 1 : stop, None], lost[column], value=-1)
        now[stop:].addmm_(ratios[start:stop, stop:].T, lost[start:stop], alpha=-1)
    stays = gone.logical_not_()
    now *= stays
    return stays.T


def _lowest_of_columns(
    scores: torch.Tensor, gone: torch.Tensor, before: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """Flags (m, out) of the m - n weights of each group to drop: masked ones first, then by score, then by index.

    `before` (m, m, 1) are the pairs of places of which the second is not after the first.
    """
    scores.masked_fill_(gone, -1)
    lower = (scores < scores[:, None]).logical_or_((scores == scores[:, None]).logical_and_(before))
    return lower.sum(1) <= pattern.columns - pattern.rows


def _counts(kept: torch.Tensor, pattern: Pattern, drop: int, width: int, within_rows: bool) -> np.ndarray:
    """How many units are dropped in each block of columns: of all rows (1, blocks), or of each (rows, blocks)."""
    dropped = dropped_units(kept, pattern)
    counts = row_counts(dropped, drop) if within_rows else np.array([drop])
    parts = dropped.split(width // pattern.sides[1], dim=1)
    before = torch.stack([part.sum(1) for part in parts], dim=1).cpu().numpy()
    sizes = np.array([part.shape[1] for part in parts])
    if within_rows:
        return shares(sizes, before, counts)
    return shares(sizes * len(dropped), before.sum(0, keepdims=True), counts)
