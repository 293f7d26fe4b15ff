"""Whole layers: a stack that loses exactly its last one by a smaller value of the field that counts them."""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

from ..model.per_layer import FIELD
from .fields import Effect, Path, number_fields, overrides_in, value_in
from .model_shapes import ModelShapes
from .units import CoupledUnits, Family, Field, Part


def layer_families(shapes: ModelShapes) -> list[Family]:
    """The stacks of layers that fields of a configuration count."""
    found: list[Family] = []
    for path, value in number_fields(shapes.config):
        if type(value) is int and value in shapes.depths.values():
            lists = tuple(_lists_of(shapes.config, path, value))
            values = {path: value - 1, **{one: value_in(shapes.config, one)[:-1] for one in lists}}
            own = overrides_in(shapes.config, path[:-1])
            if own:
                values[*path[:-1], FIELD] = {index: one for index, one in own.items() if index < value - 1}
            effect = shapes.effect(values)
            family = _layers_of(shapes, path, value, lists, effect) if effect is not None else None
            if family is not None and not any(family.stack == other.stack for other in found):
                found.append(family)
    return found


def _layers_of(shapes: ModelShapes, path: Path, depth: int, lists: tuple[Path, ...], effect: Effect) -> Family | None:
    """The stack that loses exactly its last layer, if that is the effect of a field."""
    if effect.added or effect.sizes or not effect.removed:
        return None
    for stack, layers in shapes.depths.items():
        last = f"{stack}.{depth - 1}."
        in_last = {name for name in shapes.before if name.startswith(last)}
        if layers == depth and in_last and in_last == effect.removed:
            groups = tuple(_layer(shapes, f"{stack}.{index}") for index in range(depth))
            return Family("layers", (Field(path, 1),), groups, stack=stack, lists=lists)
    return None


def _layer(shapes: ModelShapes, path: str) -> CoupledUnits:
    """A layer as one unit: the weights of its linear layers, and their biases."""
    weights = [name for name in shapes.before if name.startswith(f"{path}.") and shapes.inputs[name] is not None]
    owners = dict.fromkeys(name.rpartition(".")[0] for name in weights)
    biases = [f"{owner}.bias" for owner in owners if f"{owner}.bias" in shapes.before]
    parts = {name: Part(name, 0, ((0, shapes.before[name][0]),)) for name in (*weights, *biases)}
    readers = tuple(parts[name] for name in weights)
    return CoupledUnits("layers", path, 1, tuple(parts[name] for name in biases), readers)


def _lists_of(config: PreTrainedConfig, path: Path, length: int) -> Iterator[Path]:
    """The fields beside a number of layers that are lists with an entry for each layer."""
    section: Any = config.to_dict()
    for name in path[:-1]:
        section = section[name]
    for name, value in section.items():
        if isinstance(value, list) and len(value) == length:
            yield (*path[:-1], name)
