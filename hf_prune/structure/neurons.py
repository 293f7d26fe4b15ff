"""Neurons of feed-forward networks: what is resized, in layers alone, by another value of a field that counts them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from .fields import Path, number_fields, overridden, overrides_in, section_of
from .model_shapes import ModelShapes
from .units import CoupledUnits, Family, Field, Part, group_parts, nearest_readers


def neuron_families(shapes: ModelShapes) -> list[Family]:
    """The neurons that fields of a configuration count, or whose ratio to the width of the model they set."""
    found = []
    taken: set[tuple[str, int]] = set()
    for path, value in number_fields(shapes.config):
        family = _neurons_of(shapes, path, value)
        if family is None:
            continue
        if not family.dims & taken:
            taken |= family.dims
            found.append(family)
    return found


def _neurons_of(shapes: ModelShapes, path: Path, value: int | float | None) -> Family | None:
    for other in _other_values(value):
        effect = shapes.effect({path: other})
        if effect is not None:
            break
    else:
        return None
    if not effect.only_resizes:
        return None
    readers = [key for key in effect.sizes if shapes.inputs[key[0]] == key[1]]
    differ = path[-1] in overridden(shapes.config, path[:-1])
    if not readers or (len({effect.sizes[key] for key in readers}) != 1 and not differ):
        return None
    old, new = effect.sizes[readers[0]]
    width = getattr(section_of(shapes.globals, path), "hidden_size", None)
    ratio = type(width) is int and not differ and value is not None and old == int(value * width)
    if value is not None and old != value and not ratio and not differ:
        return None  # neither a number of neurons, nor their ratio to the width of the model
    if differ and not {effect.sizes[key][0] for key in readers} <= _numbers_of(shapes, path, value):
        return None  # such as a number of heads: each has several channels
    names = [name for name, _ in effect.sizes]
    if len(set(names)) != len(names) or not all(map(shapes.in_stack, names)):
        return None  # a tensor with both sides, or one outside the layers: a width of the whole model
    if len(readers) == len(effect.sizes):
        return None
    parts = {}
    units = {}
    for key, (before, after) in effect.sizes.items():
        if differ:
            old, new = effect.sizes[nearest_readers(key[0], readers)[0]]
        if before % old or after % new or before // old != after // new:
            return None
        parts[key], units[key] = _fused(shapes, key, old, before // old), old
    groups = tuple(_by_expert(shapes, group_parts("neurons", parts, readers, units)))
    if not groups:
        return None
    stack = shapes.stack_of(path, groups)
    per_unit = value / old if ratio and value is not None else 1
    return Family("neurons", (Field(path, per_unit),), groups, stack=stack, per_layer=differ)


def _numbers_of(shapes: ModelShapes, path: Path, value: int | float | None) -> set[Any]:
    """The values that a field has in the whole model, and in single layers."""
    layers = overrides_in(shapes.config, path[:-1]).values()
    return {value, *(layer[path[-1]] for layer in layers if path[-1] in layer)}


def _fused(shapes: ModelShapes, key: tuple[str, int], units: int, multiple: int) -> Part:
    """A tensor with `multiple` times as many rows (gate and up)."""
    if shapes.interleaved:
        return Part(*key, ((0, multiple),))
    return Part(*key, tuple((block * units, 1) for block in range(multiple)))


def _by_expert(shapes: ModelShapes, groups: Sequence[CoupledUnits]) -> Iterator[CoupledUnits]:
    """The groups; those of fused experts once for each expert, if all of their tensors are of as many experts."""
    for group in groups:
        fused = {name for name in group.names if name in shapes.fused}
        if not fused:
            yield group
            continue
        sizes = {shapes.before[part.name][0] if part.dim > 0 else None for part in group.all_parts}
        experts = sizes.pop()
        for expert in range(experts) if experts is not None and not sizes else ():
            parts, readers = (
                tuple(replace(part, expert=expert) for part in some) for some in (group.parts, group.readers)
            )
            yield CoupledUnits(group.structure, f"{group.path}[{expert}]", group.units, parts, readers)


def _other_values(value: int | float | None) -> list[int | float]:
    """Other values of a field to try: twice as much, which divides what the value divides, then others."""
    if value is None:
        return [8]
    if isinstance(value, float):
        return [2 * value]
    return [2 * value, 3 * value, *([value // 2] if value % 2 == 0 else [])]
