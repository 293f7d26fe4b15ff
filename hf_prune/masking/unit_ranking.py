"""Ranking units that are removed as a whole, such as neurons and layers: their scores, the masks of all their tensors.

Few numbers describe the units, so every process ranks all of them: what is added up over processes are the numbers of
each unit, not those of weights.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch

from ..engines.regions import Region
from ..methods import scopes
from ..methods.criteria import Piece
from ..methods.unit_criteria import UNIT_CRITERIA, UnitCriterion
from ..structure.units import CoupledUnits, Part
from .groups import Group
from .local import LocalTensor
from .ranking import Change
from .selection import AllReduce
from .solving import solve_readers


def update_units(
    group: Group,
    held: Mapping[str, LocalTensor],
    pools_of: Callable[[list[int]], Sequence[scopes.Pool]],
    all_reduce: AllReduce,
    given: Mapping[str, torch.Tensor],
    biased: Collection[str] = (),
) -> Iterator[Change]:
    """Update the masks of the tensors of a group of units, for this process's shards; every process must call it.

    Args:
        held: the tensors by name.
        pools_of: dropped units of each set of coupled units -> pools, with the units to drop in each.
        all_reduce: adds up numbers of all processes.
        given: the scores by the name of the coupled units, where they are not computed from weights and inputs.
        biased: the names of the tensors that read units and whose layers have a bias.

    Yields each tensor whose mask was updated.
    """
    criterion = UNIT_CRITERIA[group.config.method]
    gone = dropped_units(group, {name: tensor.mask for name, tensor in held.items()}, held, all_reduce)
    scores = given
    if criterion.reads not in ("gradients", "similarity"):
        scores = unit_scores(group.coupled, held, criterion, group.config.pruning_seed, all_reduce)
    changed: dict[str, None] = {}
    for pool in pools_of([int(flags.sum()) for flags in gone]):
        members = [group.coupled[member] for member in pool.members]
        flags = torch.cat([gone[member] for member in pool.members])
        more = pool.count - int(flags.sum())
        if more <= 0:
            continue
        together = len(members) > 1 and group.config.structure != "layers"
        ranked = torch.cat(
            [
                _ranked(scores[units.name], gone[member], criterion, together, group.config.round_to)
                for member, units in zip(pool.members, members, strict=True)
            ]
        )
        flags[ranked.argsort(stable=True)[:more]] = True
        for member, drop in zip(members, flags.split([member.units for member in members]), strict=True):
            for part in member.all_parts:
                mask_units(held[part.name], part, drop)
                changed[part.name] = None
    solved: dict[str, Change] = {}
    if group.config.reconstruction is not None:
        readers = [held[name] for name in group.read_names if name in changed]
        solved = {one.target.name: one for one in solve_readers(group.config.reconstruction, readers, biased)}
    for name in changed:
        yield solved.get(name, Change(held[name].target))


def _ranked(
    scores: torch.Tensor, gone: torch.Tensor, criterion: UnitCriterion, together: bool, round_to: int | None
) -> torch.Tensor:
    """The scores of a layer's units (float32) to rank them by; infinite for those that are gone, or have to stay.

    Where they are ranked `together` with those of other layers, the best one stays, and scores that cannot be compared
    are divided by the norm of all of the layer. With `round_to`, units leave in blocks of so many, see `_in_blocks`.
    """
    norm = scores.norm()
    if together and not criterion.comparable and float(norm) > 0:
        scores = scores / norm
    ranked = scores.float()  # rounded, see `unit_scores`
    if round_to is not None:
        return _in_blocks(ranked, gone, round_to, together)
    ranked[gone] = -torch.inf
    best = len(ranked) - 1 - int(ranked.flip(0).argmax())
    ranked[gone] = torch.inf
    if together:
        ranked[best] = torch.inf
    return ranked


def _in_blocks(scores: torch.Tensor, gone: torch.Tensor, round_to: int, together: bool) -> torch.Tensor:
    """The scores of a layer's units, those of so many that follow one another in their order replaced by the mean.

    If some are gone already, and their number is no multiple, the first block fills it up and leaves first. Where
    layers are ranked `together`, the last block stays.
    """
    ranked = torch.full_like(scores, torch.inf)
    order = scores.argsort(stable=True)
    order = order[~gone[order]]
    first = -int(gone.sum()) % round_to
    ranked[order[:first]] = -torch.inf
    blocks = order[first:].view(-1, round_to)
    ranked[blocks] = scores[blocks].mean(1, keepdim=True)
    if together:
        ranked[blocks[-1:]] = torch.inf
    return ranked


def dropped_units(
    group: Group, kept: Mapping[str, torch.Tensor], held: Mapping[str, LocalTensor], all_reduce: AllReduce
) -> list[torch.Tensor]:
    """For each set of coupled units, which have no kept weight (bool), on all processes together.

    `kept` are flags of the weights of each tensor (flat, of this process's shard).
    """
    if not group.coupled:
        return []
    counts = []
    for units in group.coupled:
        count = torch.zeros(units.units, dtype=torch.int64)
        for part in units.all_parts:
            count += unit_sums(kept[part.name], held[part.name], part, units.units)
        counts.append(count)
    sizes = [units.units for units in group.coupled]
    return [there == 0 for there in all_reduce(torch.cat(counts)).split(sizes)]


def unit_scores(
    coupled: Sequence[CoupledUnits],
    held: Mapping[str, LocalTensor],
    criterion: UnitCriterion,
    seed: int,
    all_reduce: AllReduce,
) -> dict[str, torch.Tensor]:
    """The scores of units (float64, on the CPU) by the name of the coupled units; every process must call it.

    Every process gets the same. Sums of shards may differ from those of whole tensors in the last bits of float64.
    """
    sums = []
    for units in coupled:
        total = torch.zeros(units.units, dtype=torch.float64)
        for part in units.readers if criterion.of_readers else units.all_parts:
            tensor = held[part.name]
            if tensor.counted:
                piece = Piece(
                    part.name,
                    seed=seed,
                    index_of=tensor.holding.region.indices,
                    statistic=tensor.statistic(criterion.reads),
                )
                assert criterion.weigh is not None
                total += unit_sums(criterion.weigh(tensor.weight, piece), tensor, part, units.units)
        sums.append(total)
    scores = all_reduce(torch.cat(sums)).abs().split([units.units for units in coupled])
    return {units.name: score for units, score in zip(coupled, scores, strict=True)}


def unit_sums(values: torch.Tensor, held: LocalTensor, part: Part, units: int) -> torch.Tensor:
    """The sum of a tensor's values in each unit (float64, or int64 for flags; on the CPU), in this process's shard."""
    kind = torch.int64 if values.dtype == torch.bool else torch.float64
    total = torch.zeros(units + 1, dtype=kind)  # the last place is for weights of no unit
    ids = _unit_ids(held.holding.region, held.target.shape, part, units)
    if ids.dim() > 1:  # a box: only one dimension matters
        box = values.view(held.holding.region.size)
        if part.expert is not None:
            place = part.expert - held.holding.region.start[0]
            if not 0 <= place < box.shape[0]:
                return total[:-1]
            box, ids = box[place], ids[0]
        dim = part.dim - (part.expert is not None)
        others = [other for other in range(box.dim()) if other != dim]
        sums = box.sum(others, dtype=kind) if others else box.to(kind)
        total.index_add_(0, ids.reshape(-1), sums.cpu())
    else:
        total.index_add_(0, ids, values.to(kind).cpu())
    return total[:-1]


def mask_units(held: LocalTensor, part: Part, drop: torch.Tensor) -> None:
    """Set the mask of a tensor to False where its weights belong to dropped units (bool)."""
    region = held.holding.region
    flags = torch.cat([drop, torch.zeros(1, dtype=torch.bool)])
    ids = _unit_ids(region, held.target.shape, part, len(drop))
    gone = flags[ids].to(held.mask.device)
    if ids.dim() == 1:
        held.mask.logical_and_(~gone)
        return
    box = held.mask.view(region.size)
    if part.expert is not None:
        place = part.expert - region.start[0]
        if 0 <= place < box.shape[0]:
            box[place].logical_and_(~gone[0])
        return
    box.logical_and_(~gone)


def _unit_ids(region: Region, shape: tuple[int, ...], part: Part, units: int) -> torch.Tensor:
    """The unit that each weight of a shard belongs to (int64); `units` for those of none.

    For a box of the tensor the result has as many dimensions as the tensor, of size 1 but for that of the units; and
    the expert is left to the caller. For a range of the flattened tensor it is flat, with the expert.
    """
    of_index = torch.full((shape[part.dim],), units, dtype=torch.int64)
    for start, width in part.runs:
        of_index[start : start + units * width] = torch.arange(units).repeat_interleave(width)
    if region.shape == shape and len(shape) > 1:
        start, size = region.start[part.dim], region.size[part.dim]
        sides = [1] * len(shape)
        sides[part.dim] = size
        return of_index[start : start + size].view(sides)
    coordinates = torch.unravel_index(region.indices(torch.arange(region.weights)), shape)
    ids = of_index[coordinates[part.dim]]
    return ids if part.expert is None else torch.where(coordinates[0] == part.expert, ids, units)
