"""Damping: what is added to the diagonal of a gram matrix, so that few tokens do not decide on too many weights.

The gram matrix of a linear layer is H = mean over tokens of x xᵀ. Solvers minimise the error of a layer in the metric
of H + diag(ridge), and factor that matrix.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import PruningStateError

logger = logging.getLogger(__name__)

# The diagonal of a feature that is always zero, as a share of the mean: so little that its weights are dropped first.
_DEAD = 1e-12

# Inputs whose mean square is not above this count as always zero: float32 has few digits for their products, or none.
_NOTHING = 1e-20

# What damping starts from where it is raised from nothing, and how often it is raised at most, ten times each time.
_LEAST = 1e-6
_TRIES = 12


@dataclass(frozen=True)
class Damping:
    """How the ridge follows from the diagonal of the gram matrix.

    `of="mean"` adds `share` times the mean of the diagonal to each of its values, `of="own"` adds `share` times the
    value itself.
    """

    share: float
    of: str = "mean"


def ridge_of(gram: torch.Tensor, damping: Damping) -> torch.Tensor:
    """What is added to the diagonal of a gram matrix (in, in): a vector (in), of the same dtype.

    A feature that is always zero, or nearly, gets 1e-12 of the mean (1 if all are zero) in place of its own value and
    of its damping: what it is multiplied with cannot matter, and goes first.
    """
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    dead = _DEAD * mean
    ridge = damping.share * (diagonal if damping.of == "own" else mean.expand_as(diagonal))
    ridge = torch.where(diagonal > dead, ridge, dead - diagonal)
    return torch.where(mean > _NOTHING, ridge, 1.0 - diagonal)


def factor(gram: torch.Tensor, damping: Damping, extra: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, Damping]:
    """The Cholesky factor L (lower) of gram + diag(ridge), the ridge, and the damping that it comes from.

    `extra` is a further damping of each feature's own diagonal, ridge included, which the returned ridge does not have.
    Costs d³/6 multiplications and additions, and one new matrix d².

    Where the factorisation fails, as rounding left the matrix indefinite, the damping is raised tenfold and a warning
    is logged. Raises PruningStateError if that does not help either: the gram matrix is not finite, or not symmetric.
    """
    matrix = torch.empty_like(gram, memory_format=torch.contiguous_format)
    failed = torch.zeros((), dtype=torch.int32, device=gram.device)
    for _ in range(_TRIES if bool(gram.sum().isfinite()) else 0):
        ridge = ridge_of(gram, damping)
        matrix.copy_(gram)
        diagonal = matrix.diagonal()
        diagonal += ridge
        diagonal *= 1 + extra
        lower = matrix.T  # the same matrix, in the memory format that LAPACK factors in place
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not int(failed) and bool(lower.diagonal().isfinite().all()):
            return lower, ridge, damping
        raised = replace(damping, share=max(10 * damping.share, _LEAST))
        logger.warning(
            "The inputs' gram matrix is not positive definite with a damping of %g; it is raised to %g.",
            damping.share,
            raised.share,
        )
        damping = raised
    raise PruningStateError(
        "expected a symmetric gram matrix of inputs with finite values, got one without a Cholesky factor at any "
        "damping; the calibration data, or the model on it, gives values that are not finite"
    )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices in float32 while this lasts: without autocast, TF32 and bfloat16."""
    backends = (torch.backends.cuda, torch.backends.mkldnn)
    with products_in("ieee", backends), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def products_in(precision: str, backends: Sequence[Any]) -> Iterator[None]:
    """Products of float32 matrices in a precision of `torch.backends.BACKEND.matmul.fp32_precision` while this lasts.

    With `bf16`, factors are rounded to bfloat16 where the processor has instructions for it, and sums are float32.
    """
    before = [backend.matmul.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.matmul.fp32_precision = precision
        yield
    finally:
        for backend, former in zip(backends, before, strict=True):
            backend.matmul.fp32_precision = former
