"""Finding the units of a model that can be removed, and the tensors that hang together in each.

Which tensors belong to a unit is found from the shapes that a model has with other values in its configuration (see
`fields`): if `intermediate_size` is doubled, the dimensions that are doubled are those of the neurons.
"""

import importlib.metadata
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import StructureError
from ..model.anatomy import has_adapters, is_experts, is_layer, stacks
from ..model.attention import Attention, find_attention
from ..model.layouts import layout_of
from ..model.names import named_modules_of, plain_model, shape_of
from ..model.per_layer import FIELD, MAY_READ, can_differ, has_overrides
from .experts import expert_families
from .fields import (
    ID_FIELD,
    Effect,
    Path,
    effect_of,
    number_fields,
    overridden,
    overrides_in,
    scaled_overrides,
    section_of,
    shapes_of,
    value_in,
    without_overrides,
)
from .hidden import Sides, hidden_families
from .units import CoupledUnits, Family, Field, Part, common_path, group_parts, nearest_readers


def find_families(model: nn.Module, structure: str) -> list[Family]:
    """All units of a kind in a model that its configuration has a number for.

    Raises StructureError if there are none, if the model is not one of transformers, or if it has adapters.
    """
    plain = checked_model(model)
    families = families_of(plain, structure)
    if not families:
        raise StructureError(
            "structure",
            f"no field of {type(plain.config).__name__} sets the number of {structure} of {type(plain).__name__} alone,"
            f" so a model without some of them could not be opened by from_pretrained; got {structure!r}",
        )
    return families


def checked_model(model: nn.Module) -> PreTrainedModel:
    """The model, if units can be cut out of it; StructureError if it is not one of transformers, or has adapters."""
    plain = plain_model(model)
    if has_adapters(model):
        raise StructureError(
            "structure",
            "must not be set for a model with adapters; merge them first (hf_prune.merge)",
        )
    if not isinstance(plain, PreTrainedModel):
        raise StructureError(
            "structure",
            f"expected a model of transformers, whose configuration can be changed, got {type(plain).__name__}",
        )
    return plain


def families_of(model: PreTrainedModel, structure: str, interleaved: bool = False) -> list[Family]:
    """The same for a plain model; none where there are none.

    The shapes do not say in which order the parts of a fused tensor lie. By default gate and up are taken to be two
    blocks of neurons, and query, key and value to lie together for each head; if `interleaved`, the other way.
    """
    finder = _Finder(model, interleaved)
    find = {
        "neurons": finder.neurons,
        "heads": finder.heads,
        "layers": finder.layers,
        "experts": finder.experts,
        "hidden": finder.hidden,
    }
    return find[structure]()


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

    Raises StructureError if a family loses some of its groups: the configuration has one number for all of them.
    """
    selected = []
    for family in families:
        groups = [
            group
            for group in family.groups
            if (targets is None or _matches_any(targets, group)) and not _matches_any(exclude, group)
        ]
        if groups and len(groups) < len(family.groups):
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


class _Finder:
    """Looks for the fields of a model's configuration that count units."""

    def __init__(self, model: PreTrainedModel, interleaved: bool):
        self._class, self._config, self._interleaved = type(model), model.config, interleaved
        self._model, self._globals = model, without_overrides(model.config)
        before = shapes_of(self._class, self._config)
        if before is None:
            raise StructureError(
                "structure", f"{self._class.__name__} cannot be built from its configuration alone; prune weights"
            )
        self._before = before
        check_as_built(model, before)
        modules = named_modules_of(model, self._before.keys())
        self._inputs = {}  # parameter -> the dimension of its inputs; None where it has none
        for name, module in modules.items():
            is_bias = is_experts(module) and len(self._before[name]) < 3  # a row for each expert
            self._inputs[name] = None if is_bias else _input_dim(layout_of(module, len(self._before[name])))
        self._experts = {
            name for name, module in modules.items() if layout_of(module, len(self._before[name])).startswith("experts")
        }
        self._readers = {name for name, module in modules.items() if is_layer(module) and name.endswith("weight")}
        self._stacks = stacks(model)
        self._depths = {stack: len(list(model.get_submodule(stack).children())) for stack in self._stacks}

    def effect(self, values: Mapping[Path, Any]) -> Effect | None:
        """The effect of other values, also of the layers' own ones, in the same proportion."""
        return effect_of(self._class, self._config, {**scaled_overrides(self._config, values), **values}, self._before)

    def _stack_of(self, path: Path, groups: Sequence[CoupledUnits]) -> str:
        """The outermost stack of as many layers as the configuration counts that has all of these groups, or none."""
        depth = getattr(section_of(self._globals, path), "num_hidden_layers", None)
        found = [
            stack
            for stack, layers in self._depths.items()
            if layers == depth and all(f"{group.path}.".startswith(f"{stack}.") for group in groups)
        ]
        return min(found, key=len, default="")

    def _in_stack(self, name: str) -> bool:
        return any(name.startswith(f"{stack}.") for stack in self._stacks)

    # ---- Neurons ----

    def neurons(self) -> list[Family]:
        found = []
        taken: set[tuple[str, int]] = set()
        for path, value in number_fields(self._config):
            family = self._neurons_of(path, value)
            if family is None:
                continue
            if not family.dims & taken:
                taken |= family.dims
                found.append(family)
        return found

    def _neurons_of(self, path: Path, value: int | float | None) -> Family | None:
        for other in _other_values(value):
            effect = self.effect({path: other})
            if effect is not None:
                break
        else:
            return None
        if not effect.only_resizes:
            return None
        readers = [key for key in effect.sizes if self._inputs[key[0]] == key[1]]
        differ = path[-1] in overridden(self._config, path[:-1])
        if not readers or (len({effect.sizes[key] for key in readers}) != 1 and not differ):
            return None
        old, new = effect.sizes[readers[0]]
        width = getattr(section_of(self._globals, path), "hidden_size", None)
        ratio = type(width) is int and not differ and value is not None and old == int(value * width)
        if value is not None and old != value and not ratio and not differ:
            return None  # neither a number of neurons, nor their ratio to the width of the model
        names = [name for name, _ in effect.sizes]
        if len(set(names)) != len(names) or not all(map(self._in_stack, names)):
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
            parts[key], units[key] = self._fused(key, old, before // old), old
        groups = tuple(self._by_expert(group_parts("neurons", parts, readers, units)))
        if not groups:
            return None
        stack = self._stack_of(path, groups)
        per_unit = value / old if ratio and value is not None else 1
        return Family("neurons", (Field(path, per_unit),), groups, stack=stack, per_layer=differ)

    def _fused(self, key: tuple[str, int], units: int, multiple: int) -> Part:
        """A tensor with `multiple` times as many rows (gate and up)."""
        if self._interleaved:
            return Part(*key, ((0, multiple),))
        return Part(*key, tuple((block * units, 1) for block in range(multiple)))

    def _by_expert(self, groups: Sequence[CoupledUnits]) -> Iterator[CoupledUnits]:
        """The groups; those of fused experts once for each expert, if all of their tensors are of as many experts."""
        for group in groups:
            fused = {name for name in group.names if name in self._experts}
            if not fused:
                yield group
                continue
            sizes = {self._before[part.name][0] if part.dim > 0 else None for part in group.all_parts}
            experts = sizes.pop()
            for expert in range(experts) if experts is not None and not sizes else ():
                parts, readers = (
                    tuple(replace(part, expert=expert) for part in some) for some in (group.parts, group.readers)
                )
                yield CoupledUnits(group.structure, f"{group.path}[{expert}]", group.units, parts, readers)

    # ---- Experts ----

    def experts(self) -> list[Family]:
        readers = {
            part.name
            for family in (self.neurons() if self._experts else ())
            for group in family.groups
            for part in group.readers
            if part.expert is not None
        }
        return expert_families(self._class, self._config, readers)

    # ---- Hidden dimensions ----

    def hidden(self) -> list[Family]:
        if has_overrides(self._config):
            raise StructureError(
                "structure",
                "expected a model all of whose layers have the same widths, to remove hidden dimensions, got one whose "
                "layers differ; remove hidden dimensions first",
            )
        layers = {name: self._layer_of(name) for name in self._before}
        return hidden_families(self._config, self.effect, Sides(self._inputs, self._readers, layers))

    def _layer_of(self, name: str) -> str:
        """The path of the innermost layer of a stack that a parameter is in; empty if it is in none."""
        inside = max((stack for stack in self._stacks if name.startswith(f"{stack}.")), key=len, default=None)
        return "" if inside is None else f"{inside}.{name.removeprefix(f'{inside}.').partition('.')[0]}"

    # ---- Heads ----

    def heads(self) -> list[Family]:
        found: list[Family] = []
        taken: set[tuple[str, int]] = set()
        for path, value in sorted(number_fields(self._config), key=lambda pair: "head" not in pair[0][-1]):
            section = section_of(self._globals, path)
            if path[-1] == "head_dim" or any(path in [one.path for one in other.fields] for other in found):
                continue
            if "head" not in path[-1] and any(path[:-1] == other.fields[0].path[:-1] for other in found):
                continue  # the same value by chance, such as a number of experts, or the size of a kernel
            if type(value) is int and value == getattr(section, "num_attention_heads", None):
                family = self._heads_of(path, value, section) or self._heads_without_size(path, value, section)
                dims = family.dims if family is not None else set()
                if family is not None and not dims & taken:
                    taken |= dims
                    found.append(family)
        return found

    def _heads_of(self, path: Path, heads: int, section: PreTrainedConfig) -> Family | None:
        """The heads that a field counts, with a field of key-value heads if there is one, and the size of a head."""
        content = section.to_dict()
        size = content.get("head_dim") or _quotient(getattr(section, "hidden_size", None), heads)
        fixed = {(*path[:-1], "head_dim"): size} if size is not None else {}
        others = [
            (*path[:-1], name)
            for name, value in sorted(content.items(), key=lambda pair: "head" not in pair[0])
            if type(value) is int and value == getattr(section, "num_key_value_heads", None) and name != path[-1]
            if not ID_FIELD.fullmatch(name)
        ]
        for other in [*others, None]:
            for extra in ({}, fixed):
                family = self._heads_with(path, heads, other, extra)
                if family is not None:
                    return family
        return None

    def _heads_with(self, path: Path, heads: int, other: Path | None, fixed: Mapping[Path, Any]) -> Family | None:
        shared = heads
        if other is not None:
            shared = value_in(self._config, other)
        if heads % shared:
            return None
        for factor in (2, 3, 0.5):
            if shared * factor != int(shared * factor):
                continue
            values = {path: int(heads * factor), **fixed}
            if other is not None:
                values[other] = int(shared * factor)
            effect = self.effect(values)
            if effect is not None:
                break
        else:
            return None
        if not effect.only_resizes:
            return None
        readers = [key for key in effect.sizes if self._inputs[key[0]] == key[1] and self._in_stack(key[0])]
        names = [name for name, _ in effect.sizes]
        if not readers or len(set(names)) != len(names) or len(readers) == len(names):
            return None
        differ = path[-1] in overridden(self._config, path[:-1])
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
            parts[key], units[key] = self._of_heads(key, old, before // old, unit), old
        width = getattr(section_of(self._globals, path), "hidden_size", None)
        if any(effect.sizes[reader][0] == heads * width for reader in readers if type(width) is int):
            return None  # another field of this value: the ratio of the neurons to the width of the model
        groups = tuple(group_parts("heads", parts, readers, units))
        fields = [Field(path, heads // shared)]
        if other is not None:
            fields.append(Field(other, 1))
        return Family("heads", tuple(fields), groups, fixed, self._stack_of(path, groups), per_layer=differ)

    def _heads_without_size(self, path: Path, heads: int, section: PreTrainedConfig) -> Family | None:
        """Heads whose size no field sets: layers with fewer are built by `model.per_layer`."""
        width = getattr(section, "hidden_size", None)
        size = section.to_dict().get("head_dim") or _quotient(width, heads)
        counts = getattr(section, "attribute_map", {}).get("num_attention_heads", "num_attention_heads")
        if path[-1] != counts or type(width) is not int or size is None or not can_differ():
            return None
        if getattr(section, "is_encoder_decoder", False):
            return None  # two stacks, whose layers have the same indices
        depth = getattr(section, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
        paths = {family.fields[0].path: family.stack for family in self.layers()}
        stack = paths.get((*path[:-1], depth))
        if stack is None:
            return None
        own = overrides_in(self._config, path[:-1])
        groups = []
        for index in range(self._depths[stack]):
            here = own.get(index, {}).get(counts, heads)
            layer = self._model.get_submodule(f"{stack}.{index}")
            found = find_attention(layer, here, here * size, width)
            groups += [self._attention_units(f"{stack}.{index}", attention, here, size) for attention in found]
        if not groups:
            return None
        fixed = {(*path[:-1], "head_dim"): size}
        fewer = {**fixed, (*path[:-1], FIELD): {**own, 0: {**own.get(0, {}), counts: 1}}}
        if effect_of(self._class, self._config, fewer, self._before) is None:  # the model reads it beside its layers
            fixed[*path[:-1], MAY_READ] = True
        return Family("heads", (Field(path, 1),), tuple(groups), fixed, stack, per_layer=True, needs_per_layer=True)

    def _attention_units(self, layer: str, attention: Attention, heads: int, size: int) -> CoupledUnits:
        parts = []
        for writer in attention.writers:
            for name in (f"{layer}.{writer}.weight", f"{layer}.{writer}.bias"):
                if name in self._before:
                    dim = 1 - (self._inputs[name] or 0) if len(self._before[name]) == 2 else 0
                    multiple = self._before[name][dim] // (heads * size)
                    runs = tuple((block * heads * size, size) for block in range(multiple))
                    parts.append(Part(name, dim, ((0, multiple * size),) if self._interleaved else runs))
        reader = f"{layer}.{attention.reader}.weight"
        readers = (Part(reader, self._inputs[reader] or 0, ((0, size),)),)
        path = common_path(*(part.name for part in (*parts, *readers)))
        return CoupledUnits("heads", path, heads, tuple(parts), readers)

    def _of_heads(self, key: tuple[str, int], units: int, width: int, of_queries: int) -> Part:
        """A tensor with so many rows for each unit; more than those of the queries are keys and values (fused)."""
        if not self._interleaved or width <= of_queries or (width - of_queries) % 2:
            return Part(*key, ((0, width),))
        of_keys = (width - of_queries) // 2
        return Part(*key, ((0, of_queries), (units * of_queries, of_keys), (units * (of_queries + of_keys), of_keys)))

    # ---- Layers ----

    def layers(self) -> list[Family]:
        found: list[Family] = []
        for path, value in number_fields(self._config):
            if type(value) is int and value in self._depths.values():
                lists = tuple(_lists_of(self._config, path, value))
                values = {path: value - 1, **{one: value_in(self._config, one)[:-1] for one in lists}}
                own = overrides_in(self._config, path[:-1])
                if own:
                    values[*path[:-1], FIELD] = {index: one for index, one in own.items() if index < value - 1}
                effect = self.effect(values)
                family = self._layers_of(path, value, lists, effect) if effect is not None else None
                if family is not None and not any(family.stack == other.stack for other in found):
                    found.append(family)
        return found

    def _layers_of(self, path: Path, depth: int, lists: tuple[Path, ...], effect: Effect) -> Family | None:
        """The stack that loses exactly its last layer, if that is the effect of a field."""
        if effect.added or effect.sizes or not effect.removed:
            return None
        for stack, layers in self._depths.items():
            last = f"{stack}.{depth - 1}."
            in_last = {name for name in self._before if name.startswith(last)}
            if layers == depth and in_last and in_last == effect.removed:
                groups = tuple(self._layer(f"{stack}.{index}") for index in range(depth))
                return Family("layers", (Field(path, 1),), groups, stack=stack, lists=lists)
        return None

    def _layer(self, path: str) -> CoupledUnits:
        """A layer as one unit: the weights of its linear layers, and their biases."""
        weights = [name for name in self._before if name.startswith(f"{path}.") and self._inputs[name] is not None]
        owners = dict.fromkeys(name.rpartition(".")[0] for name in weights)
        biases = [f"{owner}.bias" for owner in owners if f"{owner}.bias" in self._before]
        parts = {name: Part(name, 0, ((0, self._before[name][0]),)) for name in (*weights, *biases)}
        readers = tuple(parts[name] for name in weights)
        return CoupledUnits("layers", path, 1, tuple(parts[name] for name in biases), readers)


def check_as_built(model: PreTrainedModel, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StructureError for a model with other tensors than its class builds; `from_pretrained` opens none such."""
    found = {name: shape_of(parameter) for name, parameter in model.named_parameters()}
    other = next((name for name in (*expected, *found) if expected.get(name) != found.get(name)), None)
    if other is not None:
        got = f"{other} of shape {found[other]}" if other in found else f"no {other}"
        built = f"one of shape {expected[other]}" if other in expected else "none"
        raise StructureError(
            "structure",
            f"expected a model as {type(model).__name__} builds it from its configuration, or from_pretrained could "
            f"not open a smaller one; got {got}, where it builds {built}",
        )


def embedding_names(model: PreTrainedModel) -> list[str]:
    """The names of the input embeddings, and of the output embeddings where they are others; none for other inputs."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:  # classes that embed no tokens raise one or the other, by what transformers guesses of their parts
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return []
    found = [names.get(id(getattr(module, "weight", None))) for module in modules]
    return list(dict.fromkeys(name for name in found if name is not None)) if found[0] is not None else []


def _lists_of(config: PreTrainedConfig, path: Path, length: int) -> Iterator[Path]:
    """The fields beside a number of layers that are lists with an entry for each layer."""
    section: Any = config.to_dict()
    for name in path[:-1]:
        section = section[name]
    for name, value in section.items():
        if isinstance(value, list) and len(value) == length:
            yield (*path[:-1], name)


def _quotient(number: Any, divisor: int) -> int | None:
    return number // divisor if type(number) is int and number % divisor == 0 else None


def _other_values(value: int | float | None) -> list[int | float]:
    """Other values of a field to try: twice as much, which divides what the value divides, then others."""
    if value is None:
        return [8]
    if isinstance(value, float):
        return [2 * value]
    return [2 * value, 3 * value, *([value // 2] if value % 2 == 0 else [])]


def _input_dim(layout: str) -> int | None:
    """The dimension of the inputs of a tensor of this layout."""
    return {"matrix": 1, "transposed": 0, "convolution": 1, "experts": 2, "experts_transposed": 1}.get(layout)
