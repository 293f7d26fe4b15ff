"""Values that groups of weights share, such as the rows of a matrix: by k-means, or whole numbers times a scale.

Everything is computed for all groups at once. `groups` are the indices of the groups, one for each weight (int64).
"""

import torch

# Iterations of Lloyd's algorithm, and before how many of them a cluster moves to where another one is divided. More of
# either gained nothing; without moves, the sum of squared differences was 1.16 times as large for 16 values.
_ITERATIONS, _MOVES = 6, 5

# Bits of a number when numbers are added up as whole ones.
_BITS = 40

# Significant bits of a scale in float32: times a whole number of 7 bits, it is a float32 number still.
_SCALE_BITS = 17


def cluster_in_groups(values: torch.Tensor, groups: torch.Tensor, clusters: int) -> torch.Tensor:
    """For each number the mean of its cluster (float32): those of a group are in at most so many clusters.

    In one dimension clusters are intervals, so the numbers are sorted once, and an iteration of Lloyd's algorithm only
    moves the ends of intervals, of which sums are differences of running sums. These are sums of whole numbers, the
    numbers rounded to 2^-40 of the largest of their group: they are exact, whatever groups come before. The intervals
    at first have equal parts of the integral of the cube root of the density, as those of the best clusters have where
    there are many (Panter and Dite, Proc. IRE 39(1), 1951). The numbers of groups that have no more distinct ones than
    clusters stay as they are. The result depends on nothing else than the numbers of each group.

    Args:
        values: finite numbers, flat.
        groups: the group of each.
        clusters: how many values a group may have, 1 or more.
    """
    if not values.numel():
        return values.float()
    values = values.float()
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered, of_group = values[order], groups[order]
    sizes = torch.bincount(groups)
    starts = sizes.cumsum(0) - sizes
    numbers = torch.arange(clusters + 1, device=values.device)
    sums = _Sums(ordered, of_group, sizes)
    edges = _first_edges(ordered, of_group, starts, sizes, numbers)
    for iteration in range(_ITERATIONS):
        if clusters > 1 and iteration < _MOVES:
            edges = _move_one(ordered, sums, edges)
        # A cluster without numbers has the mean of the one before it, and stays empty.
        ascending = sums.means(edges[:, :-1], edges[:, 1:]).nan_to_num(nan=-torch.inf).cummax(1).values
        bounds = (ascending[:, 1:] + ascending[:, :-1]) / 2
        edges[:, 1:-1] = _first_not_below(ordered, bounds, edges[:, :1], edges[:, -1:])
    means = sums.means(edges[:, :-1], edges[:, 1:])
    shared = torch.empty_like(ordered)
    shared[order] = means.float().reshape(-1).repeat_interleave((edges[:, 1:] - edges[:, :-1]).reshape(-1))
    few = _count_distinct(ordered, of_group) <= clusters
    return torch.where(few[groups], values, shared)


class _Sums:
    """Sums of numbers in intervals of positions, exact for numbers that are rounded to 2^-40 of the largest.

    `ordered` are the numbers group by group, `of_group` the group of each, and `sizes` the numbers in each group.
    """

    def __init__(self, ordered: torch.Tensor, of_group: torch.Tensor, sizes: torch.Tensor):
        largest = ordered.new_zeros(len(sizes)).scatter_reduce(0, of_group, ordered.abs(), "amax")
        bits = (62 - torch.frexp(sizes.double())[1]).clamp(max=_BITS)
        self._scales = _power_of_two(bits - torch.frexp(largest)[1])
        whole = (ordered.double() * self._scales[of_group]).round().long()
        self._running = torch.cat([whole.new_zeros(1), whole.cumsum(0)])  # differences are right if it overflows, too

    def means(self, first: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """The means of the numbers at [first, end), a row for each group (float64); NaN where there are none."""
        sums = (self._running[end] - self._running[first]).double()
        return sums / (end - first) / self._scales[:, None]


def _first_edges(
    ordered: torch.Tensor, of_group: torch.Tensor, starts: torch.Tensor, sizes: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """Positions that divide the numbers of each group into as many parts as `numbers` has, less one.

    The integral of the cube root of the density is the same in each part: between two neighbours, the density is one
    over their distance, so the integral is distance^(2/3).
    """
    first, end = starts[:, None], (starts + sizes)[:, None]
    last = (end - 1).clamp(min=0)
    ranges = (ordered[last] - ordered[first.clamp(max=len(ordered) - 1)]).double().view(-1)
    steps = torch.zeros_like(ordered, dtype=torch.float64)
    steps[1:] = (ordered[1:].double() - ordered[:-1].double()) / ranges[of_group[1:]]
    steps[starts[sizes > 0]] = 0
    whole = (steps.nan_to_num(nan=0.0).clamp(min=0).pow(2 / 3) * 2.0**_BITS).long()
    reached = whole.cumsum(0)
    low = reached[first.clamp(max=len(reached) - 1)]
    edges = _first_not_below(reached, low + (reached[last] - low) * numbers // (len(numbers) - 1), first, end)
    edges[:, :1], edges[:, -1:] = first, end
    return edges


def _move_one(ordered: torch.Tensor, sums: _Sums, edges: torch.Tensor) -> torch.Tensor:
    """The edges once, in each group, the two neighbours that lose least are one and the cluster that gains most is two.

    Groups in which that would cost more than it gains keep their edges. A cluster is divided at its mean.
    """

    def gain(first: torch.Tensor, middle: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """How much smaller the sum of squared differences is with two clusters, [first, middle) and [middle, end)."""
        left, right = (middle - first).double(), (end - middle).double()
        apart = sums.means(first, middle) - sums.means(middle, end)
        return (left * right / (left + right) * apart.square()).nan_to_num(nan=0.0)

    first, end = edges[:, :-1], edges[:, 1:]
    halves = _first_not_below(ordered, sums.means(first, end), first, end)
    gained, divided = gain(first, halves, end).max(1, keepdim=True)
    lost, joined = gain(edges[:, :-2], edges[:, 1:-1], edges[:, 2:]).min(1, keepdim=True)
    moves = (gained > lost) & (divided != joined) & (divided != joined + 1)
    moved = edges.scatter(1, joined + 1, halves.gather(1, divided)).sort(1).values
    return torch.where(moves, moved, edges)


def _first_not_below(
    ordered: torch.Tensor, bounds: torch.Tensor, first: torch.Tensor, end: torch.Tensor
) -> torch.Tensor:
    """For each bound the first position in [first, end) of its row whose number is not below it, else end."""
    low, high = first.expand_as(bounds).clone(), end.expand_as(bounds).clone()
    for _ in range(int((end - first).amax()).bit_length()):
        middle = (low + high) // 2
        is_open = low < high
        below = is_open & (ordered[middle.clamp(max=len(ordered) - 1)] < bounds)
        low = torch.where(below, middle + 1, low)
        high = torch.where(is_open & ~below, middle, high)
    return low


def distinct_in_groups(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """How many distinct numbers each group has, up to the last group."""
    values = values.float()
    order = values.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    return _count_distinct(values[order], groups[order])


def _count_distinct(ordered: torch.Tensor, of_group: torch.Tensor) -> torch.Tensor:
    """The same for numbers in ascending order, group by group."""
    is_new = torch.ones_like(of_group, dtype=torch.bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]) | (of_group[1:] != of_group[:-1])
    return torch.bincount(of_group[is_new])


def scales_for(largest: torch.Tensor, levels: int, dtype: torch.dtype) -> torch.Tensor:
    """The scale of each group whose largest magnitude is this: the smallest s with s · levels not below it (float32).

    Among numbers of 17 significant bits for weights of float32, and powers of two for others: so that s times any whole
    number up to `levels` is a number that the weights can have, and the scale is found again from the weights alone.
    """
    mantissas, exponents = torch.frexp(largest.double() / levels)
    bits = _SCALE_BITS if dtype == torch.float32 else 1
    return (torch.ceil(mantissas * 2.0**bits) * _power_of_two(exponents - bits)).float()


def _power_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """Powers of two (float64), to the bit, for exponents above -1023 and below 1024."""
    return ((exponents.long() + 1023) << 52).view(torch.float64)


def whole_numbers(values: torch.Tensor, groups: torch.Tensor, levels: int, dtype: torch.dtype) -> torch.Tensor:
    """For each weight the nearest whole number times the scale of its group, other than zero (float32).

    Whole numbers are -levels to -1 and 1 to levels, so that a weight that is kept stays one.
    """
    if not values.numel():
        return values.float()
    values = values.float()
    largest = values.new_zeros(int(groups.max()) + 1).scatter_reduce(0, groups, values.abs(), "amax")
    scales = scales_for(largest, levels, dtype)[groups]
    codes = (values / scales).round().clamp(-levels, levels)
    smallest = torch.where(values < 0, -1.0, 1.0)
    return torch.where(codes == 0, smallest, codes) * scales
