"""Second moments of the inputs of a layer, summed over calibration tokens."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from ..methods.damping import products_in

# (x, x of the dense model, what the residual stream lacks) of a micro-batch, each (tokens, features).
Rows = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]

# How many tokens of the first micro-batch are kept to estimate the error of a layer with.
SAMPLE = 256


@dataclass
class Moments:
    """Means over `tokens` calibration tokens, float32.

    Attributes:
        tokens: how many there were.
        squares: of x² (in), for the inputs x in the model that is pruned so far.
        gram: of x xᵀ (in, in); None if only `squares` were asked for.
        cross: of x° xᵀ (in, in), for the inputs x° in the dense model; None without them.
        lack: of e xᵀ (out, in), for what the residual stream lacks, e = h° - h; None where that is not known.
        sample: some of the inputs (tokens, in).
    """

    tokens: int
    squares: torch.Tensor
    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    lack: torch.Tensor | None = None
    sample: torch.Tensor | None = None


def moments_of(inputs: Iterable[Rows], width: int, products: bool, rounded: bool = False) -> Moments:
    """The moments of a layer of so many input features; with `products`, those of pairs of features too.

    With `rounded`, both factors of products are rounded to bfloat16 on a CPU, as the layer itself reads its inputs
    under autocast; sums are float32.
    """
    found = Moments(0, torch.zeros(width))
    for rows, dense_rows, missing in inputs:
        rows = rows.float()
        found.tokens += len(rows)
        if found.sample is None and len(rows):
            found.sample = rows[:SAMPLE].clone()
        if products:
            found.gram = _add(found.gram, rows, rows, rounded)
            if dense_rows is not None:
                found.cross = _add(found.cross, dense_rows.float(), rows, rounded)
            if missing is not None:
                found.lack = _add(found.lack, missing.float(), rows, rounded)
        else:
            found.squares = found.squares.to(rows.device) + rows.square().sum(0)
        del rows, dense_rows, missing  # before those of the next micro-batch are there
    if found.gram is not None:
        found.squares = found.gram.diagonal().clone()
    for one in (found.squares, found.gram, found.cross, found.lack):
        if one is not None:
            one.div_(max(found.tokens, 1))
    return found


def _add(total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, rounded: bool) -> torch.Tensor:
    """`total + leftᵀ right`; on a CPU by numpy, which computes the product of a matrix with itself in half the time."""
    on_cpu = left.device.type == "cpu"
    if on_cpu and not rounded:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused with the name of its layer
            product = torch.from_numpy(left.numpy().T @ right.numpy())
        return product if total is None else total.add_(product)
    precision, backend = ("bf16", torch.backends.mkldnn) if on_cpu else ("ieee", torch.backends.cuda)
    with products_in(precision, [backend]):
        return left.T @ right if total is None else total.addmm_(left.T, right)
