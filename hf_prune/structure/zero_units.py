"""Cutting out of a model at hand the neurons and heads that are zero."""

import logging
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import StructureError, first_line
from ..model.names import named_parameters
from ..model.per_layer import has_overrides
from .coupled import checked_model, families_of, with_own_widths
from .proof import proven
from .shrink import cut_of, in_fewest_values, shrink_model
from .units import CoupledUnits, Family

logger = logging.getLogger(__name__)


def shrink(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, per_layer: bool = False) -> nn.Module:
    """Cut the neurons and heads all of whose weights are zero out of a model of transformers, in place.

    Returns the same model, smaller and faster, with the same outputs up to rounding; its configuration opens it with a
    plain `from_pretrained`. As a configuration has one number for all layers, each keeps as many units as the one with
    the most. If `per_layer`, each layer keeps its own number, heads of models like BERT can be cut out too, and the
    model that is saved opens only after `import hf_prune` (with transformers 5.15 or later), unless all layers keep as
    many. The moments in the
    optimizer's state are cut with the weights. Layers leave no zeros that could be told from others; `Pruner.shrink`
    and `PruningTrainer` remove them. Units that cannot be removed from the model stay. A warning says so if nothing was
    cut out.

    Raises StructureError if the model is not one of transformers, or what `shrink_model` raises.
    """
    plain = checked_model(model)
    families: list[Family] = []
    dropped: dict[str, torch.Tensor] = {}
    parameters = dict(named_parameters(model))
    for structure in ("neurons", "heads"):
        for family in _removable(plain, structure, per_layer):
            gone = {group.name: _zero_units(group, parameters) for group in family.groups}
            if (any if family.per_layer else all)(bool(flags.any()) for flags in gone.values()):
                families.append(family)
                dropped.update(gone)
    if families:
        shrink_model(plain, in_fewest_values(cut_of(families, dropped), plain), optimizer)
    else:
        logger.warning(
            "Nothing was cut out: %s.",
            "no layer has neurons or heads all of whose weights are zero"
            if per_layer
            else "not every layer has neurons or heads that are zero; per_layer=True cuts each layer by itself",
        )
    return model


def _removable(model: PreTrainedModel, structure: str, per_layer: bool) -> list[Family]:
    """The families of units whose removal was tried; none where it changes more than the size."""
    found = families_of(model, structure)
    if not has_overrides(model.config):
        found = [family for family in found if per_layer or not family.needs_per_layer]
    try:
        return proven(with_own_widths(found, "per_layer") if per_layer else found, model)
    except StructureError as error:
        logger.warning("%s; they stay.", first_line(error).removeprefix("structure: "))
        return []


def _zero_units(group: CoupledUnits, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """Which units of a group have no weight that is not zero (bool)."""
    kept = torch.zeros(group.units, dtype=torch.bool)
    for part in group.all_parts:
        weight, dim = parameters[part.name].detach(), part.dim
        if part.expert is not None:
            weight, dim = weight[part.expert], dim - 1
        others = [other for other in range(weight.dim()) if other != dim]
        nonzero = (weight != 0).sum(others).cpu() if others else (weight != 0).cpu()
        of_units = [nonzero[start : start + group.units * width].view(group.units, -1) for start, width in part.runs]
        kept |= torch.cat(of_units, dim=1).any(dim=1)
    return ~kept
