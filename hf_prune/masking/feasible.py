"""Whether a model can be built without as many units as a configuration asks for."""

import torch
from transformers import PreTrainedModel

from ..config.pruning import PruningConfig
from ..errors import StructureError
from ..foreign.transformers import computes_experts_together
from ..methods.patterns import count_of
from ..structure.shrink import cut_of, misfit
from ..structure.units import Family

# PyTorch's grouped matrix product needs rows of a multiple of so many bytes.
_ROW_BYTES = 16


def check_what_is_left(family: Family, config: PruningConfig, model: PreTrainedModel) -> None:
    """Raise StructureError if too few units would be left, or a number that the model's class cannot be built with."""
    assert config.sparsity is not None
    if family.structure == "layers":
        return
    units = family.groups[0].units
    left = units - count_of(config.sparsity, units)
    if 1 < family.at_least > left:
        raise StructureError(
            "sparsity",
            f"expected at least {family.at_least} of {units} {family.structure} to be left, as many as each token is "
            f"sent to, got {config.sparsity}, which leaves {left}",
        )
    if computes_experts_together(model.config):
        _check_rows(family, left, config.sparsity, model)
    dropped = {}
    for group in (group for one in family.with_tied for group in one.groups):
        dropped[group.name] = torch.arange(group.units) < count_of(config.sparsity, group.units)
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


def _check_rows(family: Family, left: int, sparsity: float, model: PreTrainedModel) -> None:
    """Raise StructureError if the rows of fused experts would not be of as many bytes as their product needs."""
    parts = [part for group in family.groups for part in group.all_parts if part.expert is not None]
    if family.structure != "neurons" or not parts:
        return
    each = _ROW_BYTES // model.get_parameter(parts[0].name).element_size()
    if left % each:
        raise StructureError(
            "sparsity",
            f"expected a number of neurons that {each} divides, as these experts are computed in one grouped matrix "
            f"product, got {sparsity}, which leaves {left} of {family.groups[0].units}; choose another share, or load "
            "the model with experts_implementation='eager'",
        )
