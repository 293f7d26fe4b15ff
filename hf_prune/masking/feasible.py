"""Whether a model can be built without as many units as a configuration asks for."""

import torch
from transformers import PreTrainedModel

from ..config.pruning import PruningConfig
from ..errors import StructureError
from ..methods.patterns import count_of
from ..structure.coupled import own_share
from ..structure.rows import row_divisor
from ..structure.shrink import cut_of, misfit
from ..structure.units import Family


def check_what_is_left(family: Family, config: PruningConfig, model: PreTrainedModel) -> None:
    """Raise StructureError if too few units would be left, or a number that the model's class cannot be built with."""
    assert config.sparsity is not None
    if family.structure == "layers":
        return
    divisor = row_divisor(family, model)
    if divisor > 1 and config.scope == "global":
        raise StructureError(
            "scope",
            f"expected 'layer' for the neurons of experts that are computed in one grouped matrix product, which takes "
            f"multiples of {divisor} alone, got 'global'; or load the model with experts_implementation='eager'",
        )
    dropped = {}
    for group in (group for one in family.with_tied for group in one.groups):
        own = own_share(config, group)
        sparsity = config.sparsity if own is None else own
        number = count_of(sparsity, group.units)
        dropped[group.name] = torch.arange(group.units) < number
        if group in family.groups:
            _check_number(family, sparsity, group.units, group.units - number, divisor)
    why = misfit(model, cut_of(family.with_tied, dropped))
    if why is not None:
        numbers = " and ".join(
            f"{len(gone) - int(gone.sum())} of {len(gone)} {one.structure}"
            for one in family.with_tied
            if (gone := dropped[one.groups[0].name]) is not None
        )
        raise StructureError(
            "sparsity",
            f"expected a share of {family.structure} without which {type(model).__name__} can be built, got "
            f"{config.sparsity}, which leaves {numbers} ({why})",
        )


def _check_number(family: Family, sparsity: float, units: int, left: int, divisor: int) -> None:
    """Raise StructureError for a number of units of a layer that cannot be left."""
    if 1 < family.at_least > left:
        raise StructureError(
            "sparsity",
            f"expected at least {family.at_least} of {units} {family.structure} to be left, as many as each token is "
            f"sent to, got {sparsity}, which leaves {left}",
        )
    if left % divisor:
        raise StructureError(
            "sparsity",
            f"expected a number of neurons that {divisor} divides, as these experts are computed in one grouped matrix "
            f"product, got {sparsity}, which leaves {left} of {units}; choose another share, or load the model "
            "with experts_implementation='eager'",
        )
