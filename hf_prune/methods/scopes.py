"""Scopes: how one sparsity for several tensors becomes the number of units to drop in each, or in all together.

To add a scope, write its function and one entry of `SCOPES`.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING

from .allocation import (
    counts_near,
    histogram,
    largest_remainder,
    lowest_of_all,
    moved_towards,
    no_costs,
    outlier_share,
    shares_by_outliers,
)
from .patterns import PATTERNS, Pattern, count_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Seen:
    """A matrix of a tensor or a part of it, in whole units of the pattern, and what was seen of it.

    Attributes:
        weight: the weights (out, in), or a stack of such matrices.
        kept: False where a weight is masked (bool; of the shape of `weight`).
        squares: the mean over tokens of the square of the input of each weight (float32; it broadcasts to `weight`,
            such as (in)).
        gradients: the sum over tokens of the square of the loss's gradient at the output of each weight, times any
            constant (float32; it broadcasts to `weight`, such as (out, 1)); None for a scope that does not read it.
    """

    weight: "torch.Tensor"
    kept: "torch.Tensor"
    squares: "torch.Tensor"
    gradients: "torch.Tensor | None" = None


def _alone(numbers: "torch.Tensor") -> "torch.Tensor":
    """The sum over one process."""
    return numbers


@dataclass(frozen=True)
class Prunable:
    """What a scope needs to know about a tensor.

    Attributes:
        units: how many units its pattern divides it into.
        dropped: how many are dropped already, and stay so.
        sides: the sides of one matrix (out, in), or of a convolution's kernel too (out, in, height, width).
        inputs: the norm of each input feature (float32) in the optimizer step before the update, or over all tokens of
            calibration, for a scope that reads it; None for a tensor of several matrices.
        matrices: its matrices, or the parts of them that this process counts, with what was seen of each, for a scope
            that reads it; they can be gone through again. None where nothing was seen (an empty sequence).
        pattern: what is dropped together.
        block: the layer of the model's repeated stack that it is in, by its path; empty outside of one.
        add_up: sums what each process has counted of its parts, if the tensors are sharded over processes.
    """

    units: int
    dropped: int
    sides: tuple[int, ...]
    inputs: "torch.Tensor | None" = None
    matrices: Iterable[Seen] = ()
    pattern: Pattern = field(default_factory=lambda: Pattern("unstructured"))
    block: str = ""
    add_up: "Callable[[torch.Tensor], torch.Tensor]" = _alone


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
        reads: what `pools` needs besides the counts: `inputs`, the norms of the inputs and the weights, or `outputs`,
            the gradients at the outputs too; None for a scope that knows all by the shapes.
        sees_matrices: whether it sees the matrices (`Prunable.matrices`). `pools` then has one tensor in each pool and
            is called once for the final sparsity: before pruning at once, and in training at the first mask update;
            the updates after it go towards these numbers.
        paper: a BibTeX entry.
    """

    pools: Callable[[Sequence[Prunable], Fraction], list[Pool]]
    words: str
    ranks_together: bool = False
    within_rows: bool = False
    reads: str | None = None
    sees_matrices: bool = False
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

    whole = largest_remainder(kept, wanted)
    return [Pool((index,), tensor.units - whole[index]) for index, tensor in enumerate(tensors)]


def _erk_density(tensor: Prunable) -> Fraction:
    return Fraction(max(sum(tensor.sides), 1), max(math.prod(tensor.sides), 1))


# How far a sparsity moves from that of all towards what the ranking gives a tensor, and at most.
_PART, _BOUND = 0.5, 0.15


def sensitivity(tensors: Sequence[Prunable], sparsity: Fraction) -> list[Pool]:
    """Less is dropped where the loss depends more on the weights.

    In one ranking of the units of all tensors by `sum of w² E[x²] E[g²]`, for the inputs x and the gradients g of the
    loss at the outputs, every tensor loses a share. Its sparsity is moved half-way to that share, by 0.15 at most, and
    so that it keeps half of the density of all; then all are moved by the same amount to the exact total. A tensor of
    which nothing was seen stays at the sparsity of all.
    """
    shares = [float(sparsity)] * len(tensors)
    seen = [index for index, tensor in enumerate(tensors) if _is_seen(tensor)]
    if seen:
        total = count_of(sparsity, sum(tensors[index].units for index in seen))
        more = max(total - sum(tensors[index].dropped for index in seen), 0)
        lost = lowest_of_all([_histogram(tensors[index]) for index in seen], more)
        for index, number in zip(seen, lost, strict=True):
            ranked = (tensors[index].dropped + number) / max(tensors[index].units, 1)
            shares[index] = moved_towards(float(sparsity), ranked, _PART, _BOUND)
    return _separate(tensors, shares, sparsity)


def _is_seen(tensor: Prunable) -> bool:
    return not isinstance(tensor.matrices, Sequence) or len(tensor.matrices) > 0


def _histogram(tensor: Prunable) -> "torch.Tensor":
    """The histogram of what dropping each unit costs that is not dropped yet, over all processes."""
    rules, found = PATTERNS[tensor.pattern.name], no_costs()
    for one in tensor.matrices:
        assert one.gradients is not None
        costs = one.weight.float().square().mul_(one.squares).mul_(one.gradients)
        costs, kept = (part if part.dim() == 3 else part[None] for part in (costs, one.kept))
        units = rules.scores(costs, kept, tensor.pattern, "sum")
        found += histogram(units[~rules.dropped(kept, tensor.pattern)])
    return tensor.add_up(found)


# Above how many times the mean a weight is an outlier, and how far sparsities may lie from their mean.
_OUTLIER, _WIDTH = 5.0, 0.08


def owl(tensors: Sequence[Prunable], sparsity: Fraction) -> list[Pool]:
    """Less is dropped in layers of the model in which more weights stand out by |w| ‖x‖.

    D is the share of all weights of a layer of the stack with more than M = 5 times the mean; the sparsities of the
    layers are linear in D, over a range of 2 λ = 0.16; then all are moved by the same amount to the exact total.
    Yin et al., "Outlier Weighed Layerwise Sparsity" (arXiv 2310.05175), section 3.2, with the constants of its code.
    """
    shares = [float(sparsity)] * len(tensors)
    blocks: dict[str, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if _is_seen(tensor):
            blocks.setdefault(tensor.block, []).append(index)
    if blocks:
        outliers = [
            outlier_share(partial(_magnitudes, [tensors[index] for index in inside]), _OUTLIER, tensors[0].add_up)
            for inside in blocks.values()
        ]
        for inside, share in zip(blocks.values(), shares_by_outliers(outliers, float(sparsity), _WIDTH), strict=True):
            for index in inside:
                shares[index] = share
    return _separate(tensors, shares, sparsity)


def _magnitudes(tensors: Sequence[Prunable]) -> "Iterator[torch.Tensor]":
    """`|w| ‖x‖` of all weights, for the root mean square of the inputs."""
    for tensor in tensors:
        for one in tensor.matrices:
            yield one.weight.float().abs().mul_(one.squares.sqrt())


def _separate(tensors: Sequence[Prunable], shares: Sequence[float], sparsity: Fraction) -> list[Pool]:
    """Every tensor by itself, near these shares; in all as many units as the sparsity says."""
    units, dropped = [tensor.units for tensor in tensors], [tensor.dropped for tensor in tensors]
    total = max(count_of(sparsity, sum(units)), sum(dropped))
    return [Pool((index,), count) for index, count in enumerate(counts_near(shares, units, dropped, total))]


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
    "sensitivity": Scope(
        sensitivity,
        words="with a sparsity for each tensor by how much the loss depends on its weights",
        reads="outputs",
        sees_matrices=True,
    ),
    "owl": Scope(
        owl,
        words="with a sparsity for each layer by how many weights stand out in it (OWL)",
        reads="inputs",
        sees_matrices=True,
        paper="""@inproceedings{yin2024owl,
  title = {Outlier Weighed Layerwise Sparsity ({OWL}): A Missing Secret Sauce for Pruning {LLM}s to High Sparsity},
  author = {Yin, Lu and Wu, You and Zhang, Zhenyu and Hsieh, Cheng-Yu and Wang, Yaqing and Jia, Yiling and
            Li, Gen and Jaiswal, Ajay and Pechenizkiy, Mykola and Liang, Yi and Bendersky, Michael and
            Wang, Zhangyang and Liu, Shiwei},
  booktitle = {International Conference on Machine Learning},
  year = {2024}
}""",
    ),
}
