"""Whole experts of a mixture: their fused tensors, and what the router has for each of them."""

import re
from collections.abc import Collection
from dataclasses import replace

from transformers import PreTrainedConfig

from .fields import Path, effect_of, number_fields, section_of, shapes_of
from .model_shapes import ModelShapes
from .neurons import neuron_families
from .units import CoupledUnits, Family, Field, Part, group_parts

# Fields with the number of experts that each token is sent to.
_SENT_TO = re.compile(r".*(experts_per_tok(en)?|top_?k.*)")


def expert_families(shapes: ModelShapes) -> list[Family]:
    """The experts that fields of a configuration count.

    If such a field is doubled, the first dimension of fused tensors is, and with it that of what the router has for
    each expert: rows of its weight, a bias, a buffer of corrections.
    """
    readers = {
        part.name
        for family in (neuron_families(shapes) if shapes.fused else ())
        for group in family.groups
        for part in group.readers
        if part.expert is not None
    }  # the fused tensors that give the outputs of experts
    model_class, config = shapes.model_class, shapes.config
    before = shapes_of(model_class, config, buffers=True)
    found: dict[frozenset[tuple[str, int]], Family] = {}
    for path, value in number_fields(config) if before and readers else ():
        if type(value) is not int:
            continue
        effect = effect_of(model_class, config, {path: 2 * value}, before or {}, buffers=True)
        if effect is None or not effect.only_resizes or set(effect.sizes.values()) != {(value, 2 * value)}:
            continue
        keys = frozenset(effect.sizes)
        if not any((name, 0) in keys for name in readers) or keys in found:
            continue
        parts = {key: Part(*key, ((0, 1),)) for key in effect.sizes}
        groups = group_parts("experts", parts, [key for key in parts if key[0] in readers], dict.fromkeys(parts, value))
        with_buffers = tuple(_with_buffers(group, shapes.before) for group in groups)
        found[keys] = Family("experts", (Field(path, 1),), with_buffers, at_least=_sent_to(config, path, value))
    return list(found.values())


def _with_buffers(group: CoupledUnits, parameters: Collection[str]) -> CoupledUnits:
    """The same group with the parts that are no parameters apart."""
    of_parameters = tuple(part for part in group.parts if part.name in parameters)
    return replace(group, parts=of_parameters, buffers=tuple(part for part in group.parts if part not in of_parameters))


def _sent_to(config: PreTrainedConfig, path: Path, experts: int) -> int:
    """How many experts each token is sent to, by the fields beside the number of experts; 1 if none says so."""
    section = section_of(config, path).to_dict()
    numbers = [value for name, value in section.items() if _SENT_TO.fullmatch(name) and type(value) is int]
    return max((number for number in numbers if 1 <= number <= experts), default=1)
