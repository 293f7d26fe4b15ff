"""Codebooks: which weight gets which value, new values from the weights that share them, and counting distinct ones."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch

# Adds up int64 counts over all processes, with the same result on each.
AllReduce = Callable[[torch.Tensor], torch.Tensor]

# How many values the weights of a tensor can be asked to share.
FEWEST_VALUES, MOST_VALUES = 2, 256

# Numbers processed at a time.
_PIECE = 1 << 22

# Numbers that are looked at before all of them, as most tensors have too many values to count.
_SAMPLE = 1 << 12

# Whole numbers up to this power of two, and their sums, are exact in float64.
_EXACT_BITS = 52

# Exponents of float32 numbers are above the negative of this, and below it.
_EXPONENTS = 160


def nearest(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """For each value the index (int64) of the nearest number of a codebook, which is ascending (float32).

    Half-way between two it is the upper one.
    """
    codebook = codebook.to(values.device)
    bounds = codebook[:-1] + (codebook[1:] - codebook[:-1]) / 2
    return torch.bucketize(values.float(), bounds, right=True)


def share(weight: torch.Tensor, mask: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The weights (float32): the nearest value of the codebook where one is kept, and zero elsewhere."""
    shared = torch.zeros_like(weight, dtype=torch.float32)
    kept = weight[mask].float()
    shared[mask] = codebook.to(weight.device)[nearest(kept, codebook)]
    return shared


def not_zero(codebook: torch.Tensor) -> torch.Tensor:
    """The codebook with the smallest normal number of its type in place of a zero, so that no kept weight becomes zero.

    Numbers stay in ascending order, and no value is added.
    """
    return torch.where(codebook == 0, torch.finfo(codebook.dtype).tiny, codebook)


def cluster_means(
    values: Sequence[torch.Tensor],
    indices: Sequence[torch.Tensor],
    codebooks: Sequence[torch.Tensor],
    numbers: Sequence[int],
    all_reduce: AllReduce,
) -> list[torch.Tensor]:
    """New codebooks (float32, on the CPU): each value becomes the mean of the numbers that have its index.

    This is the second half of an iteration of Lloyd's algorithm; `nearest` is the first. A value that no number has is
    NaN; if a number is not finite, all values are. Numbers are rounded to whole multiples of a power of two that is so
    small that their sums in float64 are exact: the means do not depend on the order of the numbers, nor on how they are
    divided between processes.

    Args:
        values: for each codebook, the numbers that this process counts.
        indices: the index of the value that each number has.
        codebooks: the values until now.
        numbers: for each codebook, how many numbers there are on all processes together, or more.
        all_reduce: adds up counts over all processes; it is called twice.
    """
    exponents = _largest_exponents(values, all_reduce)
    scales = [
        2.0 ** (_bits_for(number) - exponent) if exponent is not None else 0.0
        for exponent, number in zip(exponents, numbers, strict=True)
    ]
    most = max(map(len, codebooks), default=0)
    sums = torch.zeros(len(codebooks), 2, most, dtype=torch.int64)
    for row, of_one, places, scale in zip(sums, values, indices, scales, strict=True):
        for piece, where in zip(of_one.split(_PIECE), places.split(_PIECE), strict=True):
            row[0] += torch.bincount(where, minlength=most).cpu()
            whole = (piece.double() * scale).round() if scale else torch.zeros_like(piece, dtype=torch.float64)
            row[1] += torch.bincount(where, whole, minlength=most).cpu().long()
    means = []
    for (counts, totals), codebook, scale in zip(all_reduce(sums), codebooks, scales, strict=True):
        counts, totals = counts[: len(codebook)], totals[: len(codebook)]
        means.append((totals.double() / counts / scale).float() if scale else codebook * math.nan)
    return means


def _bits_for(number: int) -> int:
    """How many bits each of so many numbers may have for their sum to be exact."""
    return _EXACT_BITS - max(number, 1).bit_length()


def _largest_exponents(values: Sequence[torch.Tensor], all_reduce: AllReduce) -> list[int | None]:
    """For each tensor the exponent e of its largest magnitude m on all processes, m < 2^e; 0 of no numbers.

    None if a number is not finite.
    """
    flags = torch.zeros(len(values), 2 * _EXPONENTS, dtype=torch.int64)
    for row, of_one in zip(flags, values, strict=True):
        largest = float(of_one.abs().amax()) if of_one.numel() else 0.0
        row[math.frexp(largest)[1] + _EXPONENTS if math.isfinite(largest) else -1] = 1
    last = [int(row.nonzero()[-1]) for row in all_reduce(flags)]
    return [place - _EXPONENTS if place < flags.shape[1] - 1 else None for place in last]


def distinct_values(parts: Iterable[torch.Tensor], most: int = MOST_VALUES) -> torch.Tensor | None:
    """The distinct values other than zero of all parts together, ascending (float32); None if there are more than most.

    A sample is looked at first, so that tensors with many values cost next to nothing.
    """
    found = torch.zeros(0)
    for part in parts:
        flat = part.detach().reshape(-1)
        for piece in (flat[:_SAMPLE], *flat[_SAMPLE:].split(_PIECE)):
            found = torch.cat([found, piece[piece != 0].float().unique().cpu()]).unique()
            if len(found) > most:
                return None
    return found
