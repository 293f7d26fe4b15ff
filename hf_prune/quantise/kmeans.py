"""Optimal k-means of numbers in one dimension: a histogram, and dynamic programming over its bins.

In one dimension each cluster is an interval, so the best clusters are found exactly by dynamic programming (Wang and
Song, "Ckmeans.1d.dp", The R Journal 3(2), 2011); as the first number of the best last cluster never moves back when
numbers are added, each row of its table takes O(n log n) by divide and conquer (Grønlund et al., arXiv 1701.07204). The
numbers are first counted in bins: those of the same sign and exponent whose first 7 bits after the point are the same,
so that a bin is at most 1/128 of its numbers wide. The clusters are the best of those that keep each bin together; the
means and costs of the bins are exact.

Of numbers that lie on several processes, only counts and sums of whole numbers are added up: they are exact in any
order, so every process gets the same codebook to the bit, however the numbers are divided.
"""

from collections.abc import Callable

import numpy as np
import torch

# Adds up int64 counts over all processes, with the same result on each.
AllReduce = Callable[[torch.Tensor], torch.Tensor]

_BINS = 1 << 16

# Numbers processed at a time.
_PIECE = 1 << 22


def kmeans(
    values: torch.Tensor,
    clusters: int,
    all_reduce: AllReduce | None = None,
    importance: torch.Tensor | None = None,
) -> torch.Tensor:
    """The codebook that minimises the sum of squared differences from `values`, ascending (float32, on the CPU).

    It minimises Σᵢ hᵢ (vᵢ - c(vᵢ))², where c(vᵢ) is the nearest number of the codebook, among the clusters that keep
    each bin of the histogram together. There are fewer numbers than `clusters` if there are fewer bins.

    Args:
        values: finite numbers of any shape and floating-point type; they are taken as float32.
        clusters: how many numbers the codebook may have, 1 or more.
        all_reduce: adds up counts over processes that have other parts of the numbers; each gets the same codebook.
        importance: hᵢ, 0 or more, of the shape of `values`; None for 1. The sums are float64 then, so it cannot be used
            with `all_reduce`.
    """
    assert importance is None or all_reduce is None, "the sums of weighted numbers depend on their order"
    if importance is None:
        weights, sums = _exact_sums(values, all_reduce)
    else:
        weights, sums = _weighted_sums(values, importance)
    there = np.flatnonzero(weights)
    there = there[np.argsort(_lower_edges()[there], kind="stable")]
    return torch.from_numpy(_best_means(weights[there], sums[there], clusters).astype(np.float32))


# ---- The histogram ----


def _exact_sums(values: torch.Tensor, all_reduce: AllReduce | None) -> tuple[np.ndarray, np.ndarray]:
    """How many numbers are in each bin, and their sum (both float64)."""
    counts = torch.zeros(2, _BINS, dtype=torch.int64)
    for piece in values.detach().reshape(-1).split(_PIECE):
        bits = piece.float().view(torch.int32)
        bins = (bits >> 16) & (_BINS - 1)
        counts[0] += torch.bincount(bins, minlength=_BINS).cpu()
        lower_bits = (bits & (_BINS - 1)).double()  # whole numbers, whose sums below 2^53 are exact
        counts[1] += torch.bincount(bins, lower_bits, minlength=_BINS).cpu().long()
    if all_reduce is not None:
        counts = all_reduce(counts)
    numbers, steps = (row.double().numpy() for row in counts)
    edges = _lower_edges()
    return numbers, numbers * edges + steps * _spacing(edges)


def _weighted_sums(values: torch.Tensor, importance: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The sum of the importance in each bin, and of importance times number (both float64)."""
    sums = torch.zeros(2, _BINS, dtype=torch.float64)
    parts = zip(values.detach().reshape(-1).split(_PIECE), importance.detach().reshape(-1).split(_PIECE), strict=True)
    for piece, shares in parts:
        bins = (piece.float().view(torch.int32) >> 16) & (_BINS - 1)
        sums[0] += torch.bincount(bins, shares.double(), minlength=_BINS).cpu()
        sums[1] += torch.bincount(bins, shares.double() * piece.double(), minlength=_BINS).cpu()
    return sums[0].numpy(), sums[1].numpy()


def _lower_edges() -> np.ndarray:
    """The number of each bin that is nearest to zero (float64; no finite number is in the bins of infinity and NaN)."""
    edges = (np.arange(_BINS, dtype=np.uint32) << 16).view(np.float32)
    return np.where(np.isfinite(edges), edges, 0.0).astype(np.float64)


def _spacing(edges: np.ndarray) -> np.ndarray:
    """The distance between neighbouring float32 numbers of each bin, away from zero."""
    signs = np.where(np.arange(_BINS) < _BINS // 2, 1.0, -1.0)
    exponents = (np.arange(_BINS) >> 7) & 0xFF
    return signs * np.exp2(np.maximum(exponents, 1) - 150.0)


# ---- Dynamic programming ----


def _best_means(weights: np.ndarray, sums: np.ndarray, clusters: int) -> np.ndarray:
    """The means of the clusters of least cost, of bins in ascending order with these weights and sums.

    The cost of a cluster is the sum of its squares, which is the same in any clustering, less (Σ w v)² / Σ w.
    """
    bins = len(weights)
    clusters = min(clusters, bins)
    if clusters == 0:
        return np.zeros(0)
    before_weights = np.concatenate([[0.0], np.cumsum(weights)])
    before_sums = np.concatenate([[0.0], np.cumsum(sums)])

    def cost(first: np.ndarray, end: np.ndarray) -> np.ndarray:
        total = before_sums[end] - before_sums[first]
        return -(total * total) / (before_weights[end] - before_weights[first])

    best = np.full(bins + 1, np.inf)  # of the first so many bins
    best[1:] = cost(np.zeros(bins, dtype=np.int64), np.arange(1, bins + 1))
    firsts = []
    for used in range(1, clusters):
        best, first = _one_more(best, used, cost)
        firsts.append(first)
    ends = [bins]
    for first in reversed(firsts):
        ends.append(int(first[ends[-1]]))
    edges = np.array([*ends, 0])[::-1]
    return np.diff(before_sums[edges]) / np.diff(before_weights[edges])


def _one_more(
    best: np.ndarray, used: int, cost: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The least costs with one cluster more than the `used` ones, and the first bin of the last cluster of each.

    Every second, then every fourth number of bins and so on is solved between those that are solved already.
    """
    bins = len(best) - 1
    costs = np.full(bins + 1, np.inf)
    first = np.zeros(bins + 1, dtype=np.int64)
    first[: used + 1] = used
    stride = 1 << bins.bit_length()
    while stride := stride // 2:
        ends = np.arange(stride, bins + 1, 2 * stride)
        ends = ends[ends > used]
        if not len(ends):
            continue
        lowest = np.maximum(first[ends - stride], used)
        after = np.minimum(ends + stride, bins)
        solved = ends + stride <= bins
        highest = np.where(solved, np.minimum(first[after], ends - 1), ends - 1)
        highest = np.maximum(highest, lowest)  # costs that differ by rounding alone
        lengths = highest - lowest + 1
        starts = np.cumsum(lengths) - lengths
        candidates = np.arange(lengths.sum()) - np.repeat(starts - lowest, lengths)
        found = best[candidates] + cost(candidates, np.repeat(ends, lengths))
        costs[ends] = np.minimum.reduceat(found, starts)
        hits = np.flatnonzero(found == np.repeat(costs[ends], lengths))
        first[ends] = candidates[hits[np.searchsorted(hits, starts)]]
    return costs, first
