"""Least squares: the weights that stay under any mask, and the weights that a layer should have."""

import torch

from .damping import Damping, factor, ridge_of

# The last round lowers the error of the layer by less than this share of it: it is then exact to five digits.
_TOLERANCE = 1e-6

# Rounds at most; each costs as much as the product of the weights and the gram matrix.
ROUNDS = 20


def solve_survivors(
    wanted: torch.Tensor,
    gram: torch.Tensor,
    kept: torch.Tensor,
    damping: Damping,
    start: torch.Tensor | None = None,
    rounds: int = ROUNDS,
) -> torch.Tensor:
    """The weights W under a mask that minimise `tr((W - wanted) H (W - wanted)ᵀ)`, where H is the damped gram matrix.

    Conjugate gradients on all rows at once, preconditioned with the diagonal of H, with the gradient masked in each
    round (Nocedal and Wright, Numerical Optimization, algorithm 5.3; as in ALPS, arXiv 2406.07831, section 3.3). They
    end when a round lowers the error by less than a millionth of it, or after `rounds`, which each cost r d²
    multiplications and additions. Beside what it is given, it needs 3 r d numbers, and returns r d.

    Args:
        wanted: the weights (out, in) that are approximated.
        gram: the mean over tokens of x xᵀ (in, in), undamped.
        kept: the mask (out, in), bool.
        damping: what is added to the diagonal of the gram matrix.
        start: the weights from which it starts, for instance those of a solver, which are overwritten; without them,
            `wanted` under the mask.
        rounds: how many rounds at most.
    """
    ridge = ridge_of(gram, damping)
    diagonal = gram.diagonal() + ridge
    weights = wanted * kept if start is None else start.mul_(kept)
    direction = wanted - weights
    residual = (direction * ridge).addmm_(direction, gram)
    error = float(_row_dots(direction, residual).sum(dtype=torch.float64))
    residual.mul_(kept)
    torch.div(residual, diagonal, out=direction)
    squares = _row_dots(residual, direction)
    product = torch.empty_like(residual)
    for _ in range(rounds):
        torch.mm(direction, gram, out=product)
        product.addcmul_(direction, ridge).mul_(kept)
        step = _ratio(squares, _row_dots(direction, product))
        weights.addcmul_(direction, step[:, None])
        residual.addcmul_(product, step[:, None], value=-1)
        gain = float((step * squares).sum(dtype=torch.float64))
        error -= gain
        if gain <= _TOLERANCE * max(error, 0.0):
            break
        torch.div(residual, diagonal, out=product)
        before, squares = squares, _row_dots(residual, product)
        direction.mul_(_ratio(squares, before)[:, None]).add_(product)
    return weights


def wanted_weights(
    weight: torch.Tensor,
    gram: torch.Tensor,
    damping: Damping,
    cross: torch.Tensor | None = None,
    lack: torch.Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    """The weights W* with which a layer comes nearest to the dense model's output, from the inputs that it gets.

    `W* = W + (α W (C - G) + β E) (G + ridge)⁻¹`, with the gram matrix G = mean x xᵀ of the inputs in the pruned model,
    C = mean x° xᵀ with those of the dense model, and E = mean e xᵀ with what the stream that the layer adds to lacks of
    the dense one's. With α = β = 1 it minimises `mean |W* x - W x° - e|² + tr((W* - W) ridge (W* - W)ᵀ)`; smaller ones
    go a part of that way. As the error of other weights is `tr((W' - W*) (G + ridge) (W' - W*)ᵀ)` and a constant,
    every solver can go on from W*. (The asymmetric target is that of GPTAQ, Li et al., arXiv 2504.02692.)

    Costs one Cholesky factor, d³/6, and 3 r d² multiplications and additions; one new matrix d², and 2 r d.

    Args:
        weight: the dense weights W (out, in).
        gram: G (in, in), undamped.
        damping: what is added to the diagonal of G.
        cross: C (in, in); None for the pruned model's own inputs, as with α = 0.
        lack: E (out, in), or None.
        alpha: how far the target moves from the layer's own output to that of the dense model, 0 to 1.
        beta: the share of the lack that the layer makes up for, 0 to 1.
    """
    asked = torch.zeros_like(weight)
    if cross is not None:
        asked = (weight @ cross).sub_(weight @ gram).mul_(alpha)
    if lack is not None:
        asked.add_(lack, alpha=beta)
    lower, *_ = factor(gram, damping)
    solved = asked.T  # solved where it is: `cholesky_solve` would copy both matrices
    torch.linalg.solve_triangular(lower, solved, upper=False, out=solved)
    torch.linalg.solve_triangular(lower.T, solved, upper=True, out=solved)
    return asked.add_(weight)


def _row_dots(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The dot product of each row of two matrices."""
    rows = max((1 << 18) // max(one.shape[1], 1), 1)
    return torch.cat([(a * b).sum(1) for a, b in zip(one.split(rows), other.split(rows), strict=True)])


def _ratio(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Their ratio; zero where both are, as in a row that is solved."""
    return torch.where(other > 0, one / other, 0.0)
