"""Scopes: how one sparsity for several tensors becomes the number of units to drop in each, or in all together.

To add a scope, write its function and one entry of `SCOPES`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from .patterns import count_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prunable:
    """What a scope needs to know about a tensor.

    `units`: how many units its pattern divides it into; `dropped`: how many are dropped already, and stay so;
    `sides`: the sides of one matrix (out, in), or of a convolution's kernel too (out, in, height, width); `inputs`: the
    norm of each input feature (float32) in the optimizer step before the update, for a scope that reads it.
    """

    units: int
    dropped: int
    sides: tuple[int, ...]
    inputs: "torch.Tensor | None" = None


@dataclass(frozen=True)
class Pool:
    """Indices of tensors that are ranked together, and how many of their units are dropped in total."""

    members: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Scope:
    """How a sparsity is distributed among tensors.

    Attributes:
        pools: `(tensors, sparsity) -> pools`; in each pool exactly `count` units are dropped, those with the lowest
            scores of all its members.
        words: which weights are ranked together, as model cards describe it.
        ranks_together: whether several tensors are ranked together in one pool.
        within_rows: whether the weights of each row (output) of a tensor are ranked by themselves, as only solvers and
            pruning at once can.
        reads: `inputs` where `pools` needs the norms of the inputs, or None.
        paper: a BibTeX entry.
    """

    pools: Callable[[Sequence[Prunable], Fraction], list[Pool]]
    words: str
    ranks_together: bool = False
    within_rows: bool = False
    reads: str | None = None
    paper: str | None = None


def layer(tensors: Sequence[Prunable], sparsity: Fraction) -> list[Pool]:
    """Every tensor at the same sparsity: `round(s * n)` of its own n units."""
    return [
        Pool((index,), max(count_of(sparsity, tensor.units), tensor.dropped)) for index, tensor in enumerate(tensors)
    ]


def global_(tensors: Sequence[Prunable], sparsity: Fraction) -> list[Pool]:
    """All tensors in one ranking: `round(s * n)` of their n units together."""
    units = sum(tensor.units for tensor in tensors)
    dropped = sum(tensor.dropped for tensor in tensors)
    return [Pool(tuple(range(len(tensors))), max(count_of(sparsity, units), dropped))]


def erk(tensors: Sequence[Prunable], sparsity: Fraction) -> list[Pool]:
    """Erdős–Rényi-kernel: the density of a tensor is proportional to the sum of its sides over their product.

    For a matrix that is `(in + out) / (in * out)`; for a convolution the sides of its kernel are counted too. Small
    tensors stay denser than large ones. A tensor that would keep more units than it has keeps all of them, and the
    others are solved again. Fractions are rounded by largest remainder, so that the total is exactly `round(s * n)`.
    Evci et al., "Rigging the Lottery" (arXiv 1911.11134), section 3 (1).
    """
    available = [tensor.units - tensor.dropped for tensor in tensors]
    total = sum(tensor.units for tensor in tensors)
    wanted = min(total - count_of(sparsity, total), sum(available))
    raw = [tensor.units * _erk_density(tensor) for tensor in tensors]

    kept = [Fraction(0)] * len(tensors)
    free = set(range(len(tensors)))
    remaining = Fraction(wanted)
    while free:
        scale = remaining / sum(raw[index] for index in free) if remaining else Fraction(0)
        saturated = [index for index in free if scale * raw[index] >= available[index]]
        if not saturated:
            for index in free:
                kept[index] = scale * raw[index]
            break
        for index in saturated:
            kept[index] = Fraction(available[index])
            remaining -= available[index]
            free.remove(index)

    whole = _largest_remainder(kept, wanted)
    return [Pool((index,), tensor.units - whole[index]) for index, tensor in enumerate(tensors)]


def _erk_density(tensor: Prunable) -> Fraction:
    return Fraction(max(sum(tensor.sides), 1), max(math.prod(tensor.sides), 1))


def _largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to `total`: each share rounded down, then one more to the largest remainders."""
    whole = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: (whole[index] - shares[index], index))
    for index in order[: total - sum(whole)]:
        whole[index] += 1
    return whole


SCOPES: dict[str, Scope] = {
    "layer": Scope(layer, words="in each tensor separately"),
    "global": Scope(global_, words="ranked across all tensors", ranks_together=True),
    "row": Scope(layer, words="in each row (output) of each tensor separately", within_rows=True),
    "erk": Scope(
        erk,
        words="with a sparsity for each tensor that depends on its shape (Erdős–Rényi-kernel)",
        paper="""@inproceedings{evci2020rigging,
  title = {Rigging the Lottery: Making All Tickets Winners},
  author = {Evci, Utku and Gale, Trevor and Menick, Jacob and Castro, Pablo Samuel and Elsen, Erich},
  booktitle = {International Conference on Machine Learning},
  year = {2020}
}""",
    ),
}
