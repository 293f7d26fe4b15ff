"""Finding the units of a model that can be removed, and the tensors that hang together in each.

Which tensors belong to a unit is found from the shapes that a model has with other values in its configuration (see
`fields`): if `intermediate_size` is doubled, the dimensions that are doubled are those of the neurons.
"""

import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel

from ..config.pruning import PruningConfig
from ..errors import StructureError
from ..model.anatomy import has_adapters
from ..model.names import plain_model
from ..model.per_layer import can_differ
from .experts import expert_families
from .heads import head_families
from .hidden import hidden_families
from .layers import layer_families
from .model_shapes import ModelShapes
from .neurons import neuron_families
from .units import CoupledUnits, Family, words_for

# All units of a kind; none where there are none.
_FINDERS: dict[str, Callable[[ModelShapes], list[Family]]] = {
    "neurons": neuron_families,
    "heads": head_families,
    "layers": layer_families,
    "experts": expert_families,
    "hidden": hidden_families,
}


# What to do where a structure cannot be removed.
OTHER_STRUCTURES = "remove another structure: docs/architectures.md says which can be removed from each class"


def find_families(model: nn.Module, structure: str) -> list[Family]:
    """All units of a kind in a model that its configuration has a number for.

    Raises StructureError if there are none, if the model is not one of transformers, or if it has adapters.
    """
    plain = checked_model(model)
    families = families_of(plain, structure)
    if not families:
        raise StructureError(
            "structure",
            f"no field of {type(plain.config).__name__} sets the number of {words_for(structure)} of "
            f"{type(plain).__name__} alone, so a model without some of them could not be opened by from_pretrained; "
            f"got {structure!r}; {OTHER_STRUCTURES}",
        )
    return families


def checked_model(model: nn.Module, field: str = "structure") -> PreTrainedModel:
    """The model, if units can be cut out of it; StructureError if it is not one of transformers, or has adapters.

    `field` is what asks for it.
    """
    if not isinstance(model, nn.Module):
        raise StructureError(field, f"expected a model of transformers, got {type(model).__name__}")
    plain = plain_model(model)
    if has_adapters(model):
        raise StructureError(
            field,
            "must not be set for a model with adapters; merge them first (hf_prune.merge)",
        )
    if not isinstance(plain, PreTrainedModel):
        raise StructureError(
            field,
            f"expected a model of transformers, whose configuration can be changed, got {type(plain).__name__}",
        )
    return plain


def families_of(model: PreTrainedModel, structure: str, interleaved: bool = False) -> list[Family]:
    """The same for a plain model, with fused tensors as `ModelShapes` describes; none where there are none."""
    return _FINDERS[structure](ModelShapes(model, interleaved))


def with_own_widths(families: Sequence[Family], section: str) -> list[Family]:
    """The families, each of whose layers may keep another number of units.

    Raises StructureError if a configuration cannot say so; `section` names what asks for it.
    """
    for family in families:
        if not can_differ():
            version = importlib.metadata.version("transformers")
            raise StructureError(
                section,
                f"expected transformers 5.15 or later for {family.structure} that differ from layer to layer, got "
                f"{version}; update it, or prune as many in each layer (scope='layer')",
            )
        if not family.stack:
            raise StructureError(
                section,
                f"expected one stack of layers with {family.structure} that the configuration counts, for values per "
                f"layer are by its index, got {family.groups[0].name} and others; prune as many in each layer "
                "(scope='layer')",
            )
    return [replace(family, per_layer=True) for family in families]


def select_groups(families: Sequence[Family], targets: Sequence[str] | None, exclude: Sequence[str]) -> list[Family]:
    """The families with only those groups of which an expression matches a tensor, without the excluded ones.

    Layers that are not selected are counted, but stay. Raises StructureError if another family loses some of its
    groups: the configuration has one number for all of them.
    """
    selected = []
    for family in families:
        groups = [
            group
            for group in family.groups
            if (targets is None or _matches_any(targets, group)) and not _matches_any(exclude, group)
        ]
        if groups and family.structure == "layers":
            kept = [index for index, group in enumerate(family.groups) if group not in groups]
            family = replace(family, fixed_layers=tuple(sorted({*family.fixed_layers, *kept})))
        elif groups and len(groups) < len(family.groups):
            left = next(group.name for group in family.groups if group not in groups)
            raise StructureError(
                "targets",
                f"expected all layers with {family.structure} of the same size or none, as the model's configuration "
                f"has one number for them, got only some: not {left}",
            )
        if groups:
            selected.append(family)
    return selected


def _matches_any(expressions: Sequence[str], group: CoupledUnits) -> bool:
    return any(re.fullmatch(expression, name) for expression in expressions for name in group.names)


def own_share(config: PruningConfig, group: CoupledUnits) -> float | None:
    """What the first override that matches a tensor of a group says of its sparsity; None if none does."""
    overrides = config.overrides if isinstance(config.overrides, dict) else {}
    return next((share for expression, share in overrides.items() if _matches_any([expression], group)), None)
