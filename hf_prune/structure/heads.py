"""Heads of attention, and groups of heads that share keys and values: by the fields that count them."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from ..model.attention import Attention, find_attention
from ..model.per_layer import FIELD, MAY_READ, can_differ
from .fields import ID_FIELD, Path, effect_of, number_fields, overridden, overrides_in, section_of, value_in
from .layers import layer_families
from .model_shapes import ModelShapes
from .units import CoupledUnits, Family, Field, Part, common_path, group_parts, nearest_readers


def head_families(shapes: ModelShapes) -> list[Family]:
    """The heads that fields of a configuration count."""
    found: list[Family] = []
    taken: set[tuple[str, int]] = set()
    for path, value in sorted(number_fields(shapes.config), key=lambda pair: "head" not in pair[0][-1]):
        section = section_of(shapes.globals, path)
        if path[-1] == "head_dim" or any(path in [one.path for one in other.fields] for other in found):
            continue
        if "head" not in path[-1] and any(path[:-1] == other.fields[0].path[:-1] for other in found):
            continue  # the same value by chance, such as a number of experts, or the size of a kernel
        if type(value) is int and value == getattr(section, "num_attention_heads", None):
            family = _heads_of(shapes, path, value, section)
            if family is None or _leaves_layers_out(shapes, family):
                family = _heads_without_size(shapes, path, value, section) or family
            dims = family.dims if family is not None else set()
            if family is not None and not dims & taken:
                taken |= dims
                found.append(family)
    return found


def _leaves_layers_out(shapes: ModelShapes, family: Family) -> bool:
    """Whether some layers have numbers of their own, and others are not found: the class does not read it by itself."""
    path = family.fields[0].path
    is_counted = any(path[-1] in own for own in overrides_in(shapes.config, path[:-1]).values())
    return is_counted and len(family.groups) < shapes.depths.get(family.stack, 0)


def _heads_of(shapes: ModelShapes, path: Path, heads: int, section: PreTrainedConfig) -> Family | None:
    """The heads that a field counts, with a field of key-value heads if there is one, and the size of a head."""
    size = _size_of_head(section, heads)
    fixed = {(*path[:-1], "head_dim"): size} if size is not None else {}
    others = [
        (*path[:-1], name)
        for name, value in sorted(section.to_dict().items(), key=lambda pair: "head" not in pair[0])
        if type(value) is int and value == getattr(section, "num_key_value_heads", None) and name != path[-1]
        if not ID_FIELD.fullmatch(name)
    ]
    for other in [*others, None]:
        for extra in ({}, fixed):
            family = _heads_with(shapes, path, heads, other, extra)
            if family is not None:
                return family
    return None


def _heads_with(
    shapes: ModelShapes, path: Path, heads: int, other: Path | None, fixed: Mapping[Path, Any]
) -> Family | None:
    shared = heads
    if other is not None:
        shared = value_in(shapes.config, other)
    if heads % shared:
        return None
    for factor in (2, 3, 0.5):
        if shared * factor != int(shared * factor):
            continue
        values = {path: int(heads * factor), **fixed}
        if other is not None:
            values[other] = int(shared * factor)
        effect = shapes.effect(values)
        if effect is not None:
            break
    else:
        return None
    if not effect.only_resizes:
        return None
    readers = [key for key in effect.sizes if shapes.inputs[key[0]] == key[1] and shapes.in_stack(key[0])]
    names = [name for name, _ in effect.sizes]
    if not readers or len(set(names)) != len(names) or len(readers) == len(names):
        return None
    differ = path[-1] in overridden(shapes.config, path[:-1])
    size = fixed.get((*path[:-1], "head_dim")) if differ else None
    if differ and size is None:
        return None
    unit = effect.sizes[readers[0]][0] // shared if size is None else size * heads // shared
    parts = {}
    units = {}
    for key, (before, after) in effect.sizes.items():
        old, new = shared, int(shared * factor)
        if differ:
            old, new = (of_all // unit for of_all in effect.sizes[nearest_readers(key[0], readers)[0]])
        if not old or not new or before % old or after % new or before // old != after // new:
            return None
        parts[key], units[key] = _of_heads(shapes, key, old, before // old, unit), old
    width = getattr(section_of(shapes.globals, path), "hidden_size", None)
    if any(effect.sizes[reader][0] == heads * width for reader in readers if type(width) is int):
        return None  # another field of this value: the ratio of the neurons to the width of the model
    groups = tuple(group_parts("heads", parts, readers, units))
    fields = [Field(path, heads // shared)]
    if other is not None:
        fields.append(Field(other, 1))
    return Family("heads", tuple(fields), groups, fixed, shapes.stack_of(path, groups), per_layer=differ)


def _heads_without_size(shapes: ModelShapes, path: Path, heads: int, section: PreTrainedConfig) -> Family | None:
    """Heads whose size no field sets: layers with fewer are built by `model.per_layer`."""
    width = getattr(section, "hidden_size", None)
    size = _size_of_head(section, heads)
    counts = getattr(section, "attribute_map", {}).get("num_attention_heads", "num_attention_heads")
    if path[-1] != counts or type(width) is not int or size is None or not can_differ():
        return None
    if getattr(section, "is_encoder_decoder", False):
        return None  # two stacks, whose layers have the same indices
    depth = getattr(section, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    paths = {family.fields[0].path: family.stack for family in layer_families(shapes)}
    stack = paths.get((*path[:-1], depth))
    if stack is None:
        return None
    own = overrides_in(shapes.config, path[:-1])
    groups = []
    for index in range(shapes.depths[stack]):
        here = own.get(index, {}).get(counts, heads)
        layer = shapes.model.get_submodule(f"{stack}.{index}")
        found = find_attention(layer, here, here * size, width)
        groups += [_attention_units(shapes, f"{stack}.{index}", attention, here, size) for attention in found]
    if not groups:
        return None
    fixed = {(*path[:-1], "head_dim"): size}
    fewer = {**fixed, (*path[:-1], FIELD): {**own, 0: {**own.get(0, {}), counts: 1}}}
    read_by_layers_alone = effect_of(shapes.model_class, shapes.config, fewer, shapes.before) is not None
    if not read_by_layers_alone:
        fixed[*path[:-1], MAY_READ] = True
    return Family("heads", (Field(path, 1),), tuple(groups), fixed, stack, per_layer=True, needs_per_layer=True)


def _attention_units(shapes: ModelShapes, layer: str, attention: Attention, heads: int, size: int) -> CoupledUnits:
    parts = []
    for writer in attention.writers:
        for name in (f"{layer}.{writer}.weight", f"{layer}.{writer}.bias"):
            if name in shapes.before:
                dim = 1 - (shapes.inputs[name] or 0) if len(shapes.before[name]) == 2 else 0
                multiple = shapes.before[name][dim] // (heads * size)
                runs = tuple((block * heads * size, size) for block in range(multiple))
                parts.append(Part(name, dim, ((0, multiple * size),) if shapes.interleaved else runs))
    reader = f"{layer}.{attention.reader}.weight"
    readers = (Part(reader, shapes.inputs[reader] or 0, ((0, size),)),)
    path = common_path(*(part.name for part in (*parts, *readers)))
    return CoupledUnits("heads", path, heads, tuple(parts), readers)


def _of_heads(shapes: ModelShapes, key: tuple[str, int], units: int, width: int, of_queries: int) -> Part:
    """A tensor with so many rows for each unit; more than those of the queries are keys and values (fused)."""
    if not shapes.interleaved or width <= of_queries or (width - of_queries) % 2:
        return Part(*key, ((0, width),))
    of_keys = (width - of_queries) // 2
    return Part(*key, ((0, of_queries), (units * of_queries, of_keys), (units * (of_queries + of_keys), of_keys)))


def _size_of_head(section: PreTrainedConfig, heads: int) -> int | None:
    """The size of a head: that of the field for it, or the width of the model by the number of heads."""
    width = getattr(section, "hidden_size", None)
    quotient = width // heads if type(width) is int and width % heads == 0 else None
    return section.to_dict().get("head_dim") or quotient
