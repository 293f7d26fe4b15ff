"""How a sparsity is divided among tensors: the shares that statistics suggest, and exact counts near them."""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

import torch

# Costs are ranked by sign, exponent and the first seven bits of the fraction: to one part in 128.
_BINS = 1 << 15

# Shares become fractions of this denominator, so that counts are exact.
_DENOMINATOR = 10**9


def largest_remainder(values: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to `total`: each value rounded down, then one more to the largest remainders.

    Of equal remainders the first comes first.
    """
    whole = [int(value) for value in values]
    order = sorted(range(len(values)), key=lambda index: (whole[index] - values[index], index))
    for index in order[: total - sum(whole)]:
        whole[index] += 1
    return whole


def counts_near(shares: Sequence[float], units: Sequence[int], dropped: Sequence[int], total: int) -> list[int]:
    """How many units are dropped of each tensor, `total` in all, if all shares are moved by one common amount.

    No tensor drops fewer than are dropped already, or more than it has; the others make up for it. Fractions are
    rounded by largest remainder. `total` lies between the sums of `dropped` and of `units`.
    """
    exact = [Fraction(round(share * _DENOMINATOR), _DENOMINATOR) for share in shares]

    def moved(shift: Fraction) -> list[Fraction]:
        return [
            min(max((share + shift) * of, Fraction(least)), Fraction(of))
            for share, of, least in zip(exact, units, dropped, strict=True)
        ]

    # Between two neighbouring shifts at which a tensor reaches a bound, the sum is linear.
    bounds = sorted(
        {
            Fraction(end, of) - share
            for share, of, least in zip(exact, units, dropped, strict=True)
            if of
            for end in (least, of)
        }
    )
    if not bounds:
        return list(dropped)
    low, high = 0, len(bounds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(moved(bounds[middle])) <= total else (low, middle)
    below = sum(moved(bounds[low]), Fraction(0))
    above = sum(moved(bounds[high]), Fraction(0))
    part = (total - below) / (above - below) if above > below else Fraction(0)
    return largest_remainder(moved(bounds[low] + part * (bounds[high] - bounds[low])), total)


def counts_on_the_way(final: Sequence[int], dropped: Sequence[int], total: int) -> list[int]:
    """How many units are dropped of each tensor, `total` in all, on the way to `final`.

    They are in proportion to the final numbers, as far as what is dropped already allows, and never above them. So with
    growing totals no number falls, and at the total of `final` they are `final`.
    """
    return counts_near([1.0] * len(final), final, dropped, total)


def no_costs() -> torch.Tensor:
    """The histogram of no costs; see `histogram`."""
    return torch.zeros(_BINS, dtype=torch.int64)


def histogram(costs: torch.Tensor) -> torch.Tensor:
    """How many costs (float32, none below 0) fall into each of 32768 bins of a logarithmic scale; int64, on the CPU."""
    bins = (costs.float().contiguous().view(torch.int32) >> 16).clamp_(0, _BINS - 1)
    return torch.bincount(bins.reshape(-1), minlength=_BINS).cpu()


def lowest_of_all(histograms: Sequence[torch.Tensor], count: int) -> list[float]:
    """How many of the `count` lowest costs of all tensors are of each, given the histograms of their costs.

    Of the bin in which the ranking ends, each tensor gives the same share: counts need not be whole.
    """
    table = torch.stack(list(histograms))
    together = table.sum(0).cumsum(0)
    last = int(torch.searchsorted(together, count))
    if last >= _BINS:
        return table.sum(1).tolist()
    below = int(together[last - 1]) if last else 0
    inside = int(together[last]) - below
    part = (count - below) / inside if inside else 0.0
    return [
        float(before) + part * float(within)
        for before, within in zip(table[:, :last].sum(1), table[:, last], strict=True)
    ]


def moved_towards(share: float, ranked: float, part: float, bound: float) -> float:
    """`share` moved by a `part` of the way to `ranked`, at most by `bound`, and at most half-way to 1."""
    moved = share + part * (ranked - share)
    return min(max(moved, share - bound), share + bound, (1 + share) / 2)


def outlier_share(
    magnitudes: Callable[[], Iterable[torch.Tensor]],
    times: float,
    add_up: Callable[[torch.Tensor], torch.Tensor],
) -> float:
    """The share of values that are above `times` the mean of all of them; 0 if there are none.

    `magnitudes` gives the values in parts, each time again, `add_up` sums numbers of all processes that have some.
    """
    here = [(float(part.numel()), float(part.sum(dtype=torch.float64))) for part in magnitudes()]
    number, total = add_up(torch.tensor(here, dtype=torch.float64).reshape(-1, 2).sum(0)).tolist()
    above = sum(int((part > times * total / max(number, 1.0)).sum()) for part in magnitudes())
    return int(add_up(torch.tensor([above], dtype=torch.int64))) / max(number, 1.0)


def shares_by_outliers(outliers: Sequence[float], share: float, bound: float) -> list[float]:
    """The more outliers, the less is dropped: linear, over a width of twice the bound, with the mean `share`."""
    low, high = min(outliers), max(outliers)
    if high <= low:
        return [share] * len(outliers)
    kept = [(one - low) / (high - low) * 2 * bound for one in outliers]
    mean = sum(kept) / len(kept)
    return [share - (one - mean) for one in kept]


# A point of a curve: (units dropped, loss).
Point = tuple[int, float]


def lower_hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull of points, from left to right."""
    hull: list[Point] = []
    for point in sorted(points):
        if hull and hull[-1][0] == point[0]:
            continue  # the lower of two comes first
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def cheapest(curves: Sequence[Sequence[Point]], total: int) -> tuple[list[int], float] | None:
    """How many units are dropped of each tensor, `total` in all, at the least sum of losses, and this sum.

    Each tensor has the lower convex hull of its curve, linear between its points; the first point is that of the dense
    tensor. The pieces of all hulls are taken in the order of their loss per unit, the last one in part, which is the
    optimum of convex curves. None if the curves end before the total.
    """
    hulls = [lower_hull(curve) for curve in curves]
    pieces = sorted(
        (_slope(start, end), index, end[0] - start[0])
        for index, hull in enumerate(hulls)
        for start, end in pairwise(hull)
    )
    counts, loss = [hull[0][0] for hull in hulls], sum(hull[0][1] for hull in hulls)
    left = total - sum(counts)
    for slope, index, units in pieces:
        taken = min(units, max(left, 0))
        counts[index] += taken
        loss += slope * taken
        left -= taken
    return (counts, loss) if left <= 0 else None


def _slope(start: Point, end: Point) -> float:
    return (end[1] - start[1]) / (end[0] - start[0])
