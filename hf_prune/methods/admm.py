"""ALPS: the mask and the weights by the alternating direction method of multipliers, then least squares."""

import torch

from .choosing import drop_lowest
from .damping import Damping, factor
from .patterns import Pattern
from .survivors import solve_survivors

# Three tenths of each feature's own mean square. With less, a lower error of the layer made language models worse.
DAMPING = Damping(0.3, "own")

# More rounds gain little: 20 to 30 lower the error of a layer by 5 to 7% more.
ROUNDS = 12

# In how many rounds the sparsity of the mask rises to its final value.
_RAMP = 8

# The penalty, in units of the diagonal of H; a third or three times as much changes the error by a few percent.
_PENALTY = 1.0


def admm(
    wanted: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    pattern: Pattern,
    drop: int,
    damping: Damping = DAMPING,
    within_rows: bool = False,
    rounds: int = ROUNDS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the mask of a matrix, and change the weights that stay, so that `tr(D H Dᵀ)` is small.

    H is the damped gram matrix and D the new weights minus those that are wanted. The problem is split into weights B
    that are near the wanted ones, and sparse weights Z, which are pulled together: with S the diagonal of H, and U, at
    first zero, what B and Z still differ by,

        V = B + U;  Z = V without the units with the lowest sums of S V²;  U = V - Z;
        B = (wanted H + ρ (Z - U) S) (H + ρ S)⁻¹

    in each of 12 rounds, with ρ = 1 (ALPS: Meng et al., arXiv 2406.07831, section 3.2). The number of units that Z
    loses rises on a cubic curve in the first 8 (as of the schedule `cubic`), which is Boža's (arXiv 2401.02938, section
    3.3); ALPS raises ρ instead, and takes up to 300 rounds. The weights under the mask of the last round are then
    solved by least squares, see `survivors.solve_survivors`.

    Takes d³/2 multiplications and additions for the inverse, and r d² in each round, for r x d weights. `numbers` says
    how much memory it needs; the gram matrix is left as it is.

    Args:
        wanted: the weights (out, in) that are approximated.
        gram: the mean over tokens of x xᵀ (in, in), undamped.
        kept: False where a weight is masked already (out, in); it stays masked.
        pattern: what is dropped together.
        drop: how many more units are dropped.
        damping: what is added to the diagonal of the gram matrix.
        within_rows: whether each row drops equally many units, see `choosing.drop_lowest`.
        rounds: how often the mask is chosen.

    Returns the mask and the new weights (out, in), zero where masked. Raises PruningStateError if the gram matrix has
    no Cholesky factor at any damping.
    """
    lower, ridge, damping = factor(gram, damping, extra=_PENALTY)
    inverse = torch.cholesky_inverse(lower, out=lower)
    scales = gram.diagonal() + ridge
    target = torch.addmm(wanted * ridge, wanted, gram)
    values = wanted.clone()
    for number in range(1, rounds + 1):
        share = 1 - (1 - min(number / min(_RAMP, rounds), 1)) ** 3
        scores = values.square().mul_(scales)
        mask = drop_lowest(scores, kept, pattern, round(drop * share), within_rows)
        if number < rounds:
            pulled = torch.mul(values, mask, out=scores).mul_(2).sub_(values)  # 2 Z - V, which is Z - U
            pulled.mul_(_PENALTY * scales).add_(target)
            values.mul_(mask.logical_not()).add_(pulled @ inverse)
            del pulled
        del scores
    del target, lower, inverse
    return mask, solve_survivors(wanted, gram, mask, damping, start=values)


def numbers(rows: int, columns: int) -> int:
    """The most float32 numbers that `admm` holds at once: 2 d² + 6.5 r d.

    What it is given is among them: the gram matrix, d², and weights and mask, 1.25 r d. There are also the inverse, V,
    the weights times H, two matrices of the size of the weights that change from step to step, and masks. With other
    `wanted` weights, or with zeros, it is r d more.
    """
    return 2 * columns**2 + 13 * rows * columns // 2
