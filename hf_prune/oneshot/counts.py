"""How many units of each tensor one-shot pruning drops, from the configuration and the zeros that are there."""

from collections.abc import Mapping, Sequence

import torch

from ..masking.groups import Group
from ..methods.patterns import PATTERNS
from ..methods.scopes import Seen
from ..model.layouts import as_matrices


def counts_of(
    groups: Sequence[Group],
    weights: Mapping[str, torch.Tensor],
    seen: Mapping[str, Sequence[Seen]] | None = None,
    blocks: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """How many units of each tensor are dropped at the end, those that are zero already included.

    Args:
        groups: the tensors, and with what scope and sparsity.
        weights: parameter name -> weights.
        seen: parameter name -> what a scope that reads it sees of the dense model, see `seen.see_dense`.
        blocks: parameter name -> the layer of the model's stack that it is in.
    """
    seen, blocks = seen or {}, blocks or {}
    counts: dict[str, int] = {}
    for group in groups:  # scopes that rank tensors together are refused, see `check_arguments`
        names = [target.name for target in group.members]
        dropped = [_dropped(group, as_matrices(weights[one.name], one.layout)) for one in group.members]
        matrices = [seen.get(name, ()) for name in names]
        of_members = [blocks.get(name, "") for name in names]
        found = group.final_counts(dropped, matrices, of_members, list(map(_norms, matrices)))
        counts.update(zip(names, found, strict=True))
    return counts


def _norms(seen: Sequence[Seen]) -> torch.Tensor | None:
    """The root of the mean squares of the inputs, of a tensor that is one matrix."""
    return seen[0].squares.sqrt() if len(seen) == 1 else None


def _dropped(group: Group, matrices: torch.Tensor) -> int:
    if matrices.is_meta:  # of a model without weights, which is taken as dense
        return 0
    return int(PATTERNS[group.pattern.name].dropped(matrices != 0, group.pattern).sum())


def split_count(count: int, parts: int) -> list[int]:
    """A count as nearly equal whole numbers that add up to it: the units to drop in each expert of a tensor."""
    return [count * (index + 1) // parts - count * index // parts for index in range(parts)]
