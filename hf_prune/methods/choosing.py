"""Which units of one matrix are dropped: exactly so many, those with the lowest scores, the first of equal ones.

What several processes or tensors rank together is chosen in `masking/selection.py`; this is for what a solver holds
whole.
"""

from collections.abc import Iterator

import numpy as np
import torch

from .keys import LOWEST_KEY, order_keys
from .patterns import PATTERNS, Pattern

# Weights that are looked at together where rows do not depend on each other: 1 MiB in float32.
_AT_ONCE = 1 << 18


def drop_lowest(
    scores: torch.Tensor,
    kept: torch.Tensor,
    pattern: Pattern,
    drop: int,
    within_rows: bool = False,
    norm: str = "sum",
) -> torch.Tensor:
    """The mask (out, in) after `drop` more units are dropped, those with the lowest scores.

    Args:
        scores: of each weight (out, in), float32 or int32; of an element-wise criterion, or of a solver. Their memory
            is used: afterwards the values are not what they were.
        kept: the mask before (bool); what is masked stays masked.
        pattern: what is dropped together.
        drop: how many more units are dropped in all. Of equal scores, those of the lower index go first.
        within_rows: whether units compete within their row (of blocks, their row of blocks) alone. Rows then end with
            equally many dropped units, to one, but for those in which more are masked already.
        norm: how the scores of a block's weights are combined: `sum`, `l1` or `l2`.
    """
    counts = row_counts(dropped_units(kept, pattern), drop) if within_rows else np.array([drop])
    return drop_counts(scores, kept, pattern, counts, norm)


def drop_counts(
    scores: torch.Tensor, kept: torch.Tensor, pattern: Pattern, counts: np.ndarray, norm: str = "sum"
) -> torch.Tensor:
    """The same with `counts` units more in each row of units, or, if there is one count, in all rows together."""
    rules = PATTERNS[pattern.name]
    chosen = choose_units(scores, kept, pattern, counts, norm)
    if pattern.name == "unstructured":
        return chosen.logical_not_().logical_and_(kept)
    mask, height = torch.empty_like(kept), pattern.sides[0]
    for rows in _rows(kept, pattern):
        units = chosen[None, rows.start // height : rows.stop // height]
        mask[rows] = rules.drop(units, scores[None, rows], kept[None, rows], pattern)[0]
    return mask


def choose_units(
    scores: torch.Tensor, kept: torch.Tensor, pattern: Pattern, counts: np.ndarray, norm: str = "sum"
) -> torch.Tensor:
    """Flags of the units (rows, columns) that are dropped already, and of those that `drop_counts` drops."""
    dropped = dropped_units(kept, pattern)
    if int(counts.sum()) == dropped.numel() - int(dropped.count_nonzero()):
        return torch.ones_like(dropped)
    if not counts.any():
        return dropped
    rules = PATTERNS[pattern.name]
    parts = [rules.scores(scores[None, rows], kept[None, rows], pattern, norm)[0] for rows in _rows(scores, pattern)]
    keys = order_keys(torch.cat(parts) if len(parts) > 1 else parts[0])
    if len(counts) == 1:
        return _lowest(keys.reshape(-1), dropped.reshape(-1), int(counts[0])).reshape(dropped.shape)
    return _lowest_of_rows(keys, dropped, counts)


def dropped_units(kept: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Flags of the units (rows, columns) of a mask (out, in) that are dropped."""
    parts = [PATTERNS[pattern.name].dropped(kept[None, rows], pattern)[0] for rows in _rows(kept, pattern)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def counts_of(flags: torch.Tensor) -> torch.Tensor:
    """How many flags of each row are set (int64); some rows at a time, as torch copies flags to add them up."""
    return torch.cat([part.sum(1) for part in flags.split(max(_AT_ONCE // 8 // max(flags.shape[1], 1), 1))])


def row_counts(dropped: torch.Tensor, drop: int) -> np.ndarray:
    """How many of `drop` units are dropped in each row, given those that are (rows, columns)."""
    before = counts_of(dropped).cpu().numpy()
    return shares(np.full(len(before), dropped.shape[1]), before[None], np.array([drop]))[0]


def shares(sizes: np.ndarray, dropped: np.ndarray, drop: np.ndarray) -> np.ndarray:
    """How `drop` more units are spread over parts of which all are to have the same share of dropped units.

    Parts in which more are dropped already stay as they are, and the others share the rest. Fractions are rounded by
    largest remainder (the lower index of equal ones), so that the total is exact.

    Args:
        sizes: the number of units of each part (parts).
        dropped: how many of each are dropped already (problems, parts).
        drop: how many more are to be dropped in all (problems), at most as many as there are.

    Returns how many more are dropped in each part (problems, parts).
    """
    sizes = np.broadcast_to(sizes, dropped.shape).astype(np.int64)
    free = np.ones(dropped.shape, dtype=bool)
    while True:
        rest = drop + (dropped * free).sum(1)
        units = (sizes * free).sum(1)
        full = free & (dropped * units[:, None] > rest[:, None] * sizes)
        if not full.any():
            break
        free &= ~full
    wanted = rest[:, None] * sizes * free
    whole, remainder = wanted // np.maximum(units, 1)[:, None], wanted % np.maximum(units, 1)[:, None]
    missing = rest - whole.sum(1)
    rank = np.argsort(np.argsort(-remainder, axis=1, kind="stable"), axis=1, kind="stable")
    return np.where(free, whole + (rank < missing[:, None]) - dropped, 0)


def _lowest(keys: torch.Tensor, dropped: torch.Tensor, count: int) -> torch.Tensor:
    """Flags of what is dropped, and of the `count` lowest of the other keys; of equal keys the first."""
    before = int(dropped.count_nonzero())
    is_fresh = before == 0
    place = before + count
    ranked = keys.clone() if is_fresh else keys.masked_fill(dropped, LOWEST_KEY)
    if keys.device.type == "cpu":  # numpy's partition is several times as fast as torch's kthvalue
        ranked.numpy().partition(place - 1)
        threshold = int(ranked[place - 1])
    else:
        threshold = int(ranked.kthvalue(place).values)
    del ranked
    flags, equal = keys < threshold, keys == threshold
    if not is_fresh:
        competes = dropped.logical_not()
        flags.logical_and_(competes)
        equal.logical_and_(competes)
    missing = count - int(flags.count_nonzero())
    if int(equal.count_nonzero()) > missing:
        equal.logical_and_(equal.cumsum(0, dtype=torch.int32) <= missing)
    return flags.logical_or_(equal).logical_or_(dropped)


def _lowest_of_rows(keys: torch.Tensor, dropped: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
    """The same with as many of each row; the keys are used up."""
    totals = torch.from_numpy(counts).to(keys.device) + counts_of(dropped)
    keys = keys.masked_fill_(dropped, LOWEST_KEY)
    places = (totals.clamp_min(1) - 1)[:, None]
    if keys.device.type == "cpu":
        thresholds = torch.from_numpy(np.sort(keys.numpy(), axis=1)).gather(1, places)
    else:
        thresholds = keys.sort(dim=1).values.gather(1, places)
    flags, equal = keys < thresholds, keys == thresholds
    missing = totals - counts_of(flags)
    if bool((counts_of(equal) > missing).any()):
        equal.logical_and_(equal.cumsum(1, dtype=torch.int32) <= missing[:, None])
    return flags.logical_or_(equal).logical_and_((totals > 0)[:, None])


def _rows(tensor: torch.Tensor, pattern: Pattern) -> Iterator[slice]:
    """Slices of rows that are looked at together; all of them for single weights, which are looked at in place."""
    height, width = tensor.shape
    step = height
    if pattern.name != "unstructured":
        step = max(_AT_ONCE // max(width, 1) // pattern.sides[0], 1) * pattern.sides[0]
    for start in range(0, height, max(step, 1)):
        yield slice(start, min(start + step, height))
