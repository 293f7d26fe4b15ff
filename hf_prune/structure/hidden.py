"""The width of a model: the dimensions of its hidden states, with everything that reads or writes them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from ..errors import StructureError
from ..model.per_layer import has_overrides
from .fields import Effect, Path, number_fields, section_of
from .model_shapes import ModelShapes
from .units import CoupledUnits, Family, Field, Part, group_parts


def hidden_families(shapes: ModelShapes) -> list[Family]:
    """The widths that fields of a configuration set.

    If such a field is doubled and the size of heads stays, one dimension of many tensors is doubled: embeddings, norms,
    and the sides of linear layers that read or write hidden states. Where the size of heads cannot be set, the number
    of heads is doubled with the width, and the heads are tied to it. Raises StructureError for a model whose layers
    differ.
    """
    if has_overrides(shapes.config):
        raise StructureError(
            "structure",
            "expected a model all of whose layers have the same widths, to remove hidden dimensions, got one whose "
            "layers differ; remove hidden dimensions first",
        )
    numbers = [(path, value) for path, value in number_fields(shapes.config) if type(value) is int]
    families = (_width_of(shapes, path, value) for path, value in numbers)
    found: list[Family] = []
    for family in families:
        if family is not None:
            [group] = family.groups
            taken = {other.groups[0].path for other in found}
            places = [_place(group.names, depth) for depth in range(1, 4)]
            path = next((place for place in places if place not in taken), ".".join(family.fields[0].path))
            found.append(replace(family, groups=(replace(group, path=path),)))
    return found


def _width_of(shapes: ModelShapes, path: Path, width: int) -> Family | None:
    """The hidden dimensions that a field counts, if it does."""
    config = shapes.config
    for fixed in _sizes_of_heads(config, path):
        keys = _doubled(shapes.effect({path: 2 * width, **fixed}), width, shapes)
        if keys and len({name for name, _ in keys}) == len(keys):  # no tensor is doubled on both sides
            group = _group_of(keys, width, shapes)
            return Family("hidden", (Field(path, 1),), (group,), fixed) if group is not None else None
    heads = getattr(section_of(config, path), "num_attention_heads", None)
    if type(heads) is int and width % heads == 0:
        fields = [
            field
            for field, value in number_fields(config)
            if value == heads and "head" in field[-1] and field[:-1] == path[:-1]
        ]  # all of them: those of encoder and decoder, and of keys and values
        keys = _doubled(shapes.effect({path: 2 * width, **dict.fromkeys(fields, 2 * heads)}), width, shapes)
        return _tied(path, width, fields, heads, keys, shapes)
    return None


def _doubled(effect: Effect | None, value: int, shapes: ModelShapes) -> list[tuple[str, int]]:
    """The dimensions that are doubled, if they are those of hidden states, some of which are not in layers."""
    if effect is None or not effect.only_resizes or set(effect.sizes.values()) != {(value, 2 * value)}:
        return []
    return list(effect.sizes) if any(not shapes.layer_of(name) for name, _ in effect.sizes) else []


def _group_of(keys: Sequence[tuple[str, int]], width: int, shapes: ModelShapes) -> CoupledUnits | None:
    """The hidden dimensions, if some linear layers read them and others write them."""
    parts = [Part(*key, ((0, 1),)) for key in keys]
    readers = tuple(part for part in parts if part.name in shapes.linear and shapes.inputs[part.name] == part.dim)
    others = tuple(part for part in parts if part not in readers)
    if not readers or not any(part.name in shapes.linear for part in others):
        return None
    return CoupledUnits("hidden", _place([name for name, _ in keys], 1), width, others, readers)


def _tied(
    path: Path, width: int, fields: Sequence[Path], heads: int, keys: Sequence[tuple[str, int]], shapes: ModelShapes
) -> Family | None:
    """A width, and the heads of each attention: four square weights of a layer, the last of which reads the others.

    That is so in BERT and models like it. The proof on a twin finds others out.
    """
    square: dict[str, list[str]] = {}
    for name, dim in keys:
        if shapes.layer_of(name) and name in shapes.linear and dim == shapes.inputs[name] and (name, 1 - dim) in keys:
            square.setdefault(shapes.layer_of(name), []).append(name)
    if not square or any(len(names) % 4 for names in square.values()):
        return None
    inside: set[tuple[str, int]] = set()
    groups = []
    for names in square.values():
        for start in range(0, len(names), 4):
            *computing, reading = names[start : start + 4]
            rows = {(name, 1 - (shapes.inputs[name] or 0)) for name in computing}
            rows |= {(f"{name.removesuffix('weight')}bias", 0) for name in computing} & set(keys)
            reader = (reading, shapes.inputs[reading] or 0)
            inside |= {*rows, reader}
            runs = ((0, width // heads),)
            parts = {key: Part(*key, runs) for key in keys if key in rows or key == reader}
            groups += group_parts("heads", parts, [reader], dict.fromkeys(parts, heads))
    group = _group_of([key for key in keys if key not in inside], width, shapes)
    if group is None:
        return None
    tied = Family("heads", tuple(Field(field, 1) for field in fields), tuple(groups))
    return Family("hidden", (Field(path, 1),), (group,), tied=(tied,))


def _place(names: Sequence[str], depth: int) -> str:
    """The path, of so many modules at most, that most of the parameters are under: most often that of the model."""
    paths = Counter(".".join(name.split(".")[:-1][:depth]) for name in names)
    return paths.most_common(1)[0][0]


def _sizes_of_heads(config: PreTrainedConfig, path: Path) -> Iterator[dict[Path, Any]]:
    """Values that keep the size of heads: none, or that of the field for it."""
    yield {}
    section = section_of(config, path)
    width, heads = getattr(section, "hidden_size", None), getattr(section, "num_attention_heads", None)
    size = getattr(section, "head_dim", None)
    if type(size) is not int and type(width) is int and type(heads) is int and heads and width % heads == 0:
        size = width // heads
    if type(size) is int:
        yield {(*path[:-1], "head_dim"): size}
