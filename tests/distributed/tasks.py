"""What `workers.py` runs on every process at once."""

import contextlib
from fractions import Fraction

import torch
import torch.distributed

from hf_prune import PruningConfig
from hf_prune.allocation import SCOPES, Prunable
from hf_prune.distributed import Holding, total
from hf_prune.plan import make_groups
from hf_prune.ranking import Held, update_masks
from hf_prune.selection import alone
from hf_prune.targets import Target


def masks_of_parts(config, targets, sparsities, parts, sharded=True):
    """The masks of this process's parts after updates to these sparsities.

    `parts` has (weights, mask, region, counted, peers) of each target; a part's weights and mask are flat.
    """
    groups = make_groups(0, PruningConfig(**config), [Target(*target) for target in targets])
    add = total if sharded else alone
    masks = {name: mask.clone() for name, (_, mask, *_) in parts.items()}
    for sparsity in sparsities:
        here = [int((~masks[name]).sum()) * counted for name, (_, _, _, counted, _) in parts.items()]
        masked = dict(zip(parts, add(torch.tensor(here)).tolist(), strict=True))
        held = {
            target.name: Held(
                target=target,
                holding=Holding(parts[target.name][2], sharded, parts[target.name][3], parts[target.name][4]),
                weight=parts[target.name][0],
                mask=masks[target.name],
                masked=masked[target.name],
                counted=parts[target.name][3],
            )
            for group in groups
            for target in group.members
        }

        def pools_of(place, gone, sparsity=sparsity, held=held):
            group = groups[place]
            prunable = [
                Prunable(group.units_of(target), count, target.sides)
                for target, count in zip(group.members, gone, strict=True)
            ]
            return SCOPES[group.scope](prunable, Fraction(str(sparsity)))

        for target, positions in update_masks(groups, held, pools_of, add):
            assert positions is None or not masks[target.name][positions].any()
    return masks


@contextlib.contextmanager
def counted_bytes():
    """How many bytes this process hands to collectives: [calls, bytes]."""
    counted = [0, 0]
    originals = {}

    def count(name, position):
        original = originals[name] = getattr(torch.distributed, name)

        def counting(*arguments, **options):
            counted[0] += 1
            counted[1] += arguments[position].nbytes
            return original(*arguments, **options)

        setattr(torch.distributed, name, counting)

    for name, position in (("all_reduce", 0), ("all_gather", 1), ("all_to_all_single", 1)):
        count(name, position)
    try:
        yield counted
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


def bytes_of_an_update(*arguments):
    """What one run of `masks_of_parts` sends: [calls, bytes]."""
    with counted_bytes() as counted:
        masks_of_parts(*arguments)
    return counted
