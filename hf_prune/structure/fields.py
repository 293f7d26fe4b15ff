"""Which fields of a configuration set which dimensions of a model's tensors: found by building it with other values.

Nothing is assumed about the names of modules or fields, except of those that transformers documents for every model
(`num_attention_heads`, `num_key_value_heads`, `hidden_size`, `head_dim`).
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..foreign.transformers import keep_implementations
from ..model.limits import few_modules
from ..model.per_layer import FIELD

# The place of a field in a configuration, such as ("text_config", "intermediate_size").
Path = tuple[str, ...]

# What constructors of configurations and models raise for values that do not fit together.
MISFITS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError),
    *(RuntimeError, TypeError, ValueError, StrictDataclassError),
)


_T = TypeVar("_T")

# What was found last, by the class, the content of the configuration, and what else it depends on: every structure, and
# the twin that its removal is tried on, asks for much of the same.
_shapes: dict[Any, dict[str, tuple[int, ...]] | None] = {}
_effects: dict[Any, "Effect | None"] = {}
_MOST_SHAPES, _MOST_EFFECTS = 32, 2048

# Fields that hold ids of tokens: as numbers, lists of them, or values of a mapping.
ID_FIELD = re.compile(r".+_token_ids?|.+_token_index|(begin_)?suppress_tokens|(bad|force)_words_ids|.+_to_id")


@dataclass(frozen=True)
class Effect:
    """What other values of fields change: tensors with other shapes, and tensors that are there or not.

    `sizes` maps (parameter name, dimension) to its sizes before and after.
    """

    sizes: Mapping[tuple[str, int], tuple[int, int]]
    added: frozenset[str]
    removed: frozenset[str]

    @property
    def only_resizes(self) -> bool:
        """Whether the same tensors are there, and some have another size."""
        return bool(self.sizes) and not self.added and not self.removed


def with_fields(config: PreTrainedConfig, values: Mapping[Path, Any]) -> PreTrainedConfig:
    """A configuration with other values of some fields, as it would be read from a `config.json` that has them."""
    content = copy.deepcopy(config.to_dict())
    for path, value in values.items():
        section = content
        for name in path[:-1]:
            section = section[name]
        section[path[-1]] = value
    changed = type(config).from_dict(content)
    keep_implementations(changed, config)
    return changed


def value_in(config: PreTrainedConfig, path: Path) -> Any:
    """The value of a field, as in `config.json`; None if there is none."""
    section: Any = config.to_dict()
    for name in path:
        section = section.get(name) if isinstance(section, dict) else None
    return section


def overrides_in(config: PreTrainedConfig, section: Path) -> dict[int, dict[str, Any]]:
    """The values that single layers have in place of those of a part of a configuration, by the index of the layer."""
    content = value_in(config, (*section, FIELD)) or {}
    return {int(index): dict(values) for index, values in content.items()}


def overridden(config: PreTrainedConfig, section: Path) -> set[str]:
    """The names of the fields of a part of a configuration that have other values in some layers."""
    return {name for values in overrides_in(config, section).values() for name in values}


def scaled_overrides(config: PreTrainedConfig, values: Mapping[Path, Any]) -> dict[Path, Any]:
    """The field with the values of single layers, for other values of the whole model: changed in proportion."""
    scaled = {}
    for section in {path[:-1] for path in values}:
        overrides = overrides_in(config, section)
        for layer in overrides.values():
            for name in layer.keys() & {path[-1] for path in values if path[:-1] == section}:
                new, old = values[*section, name], value_in(config, (*section, name))
                if layer[name] is not None:
                    layer[name] = int(layer[name] * (new / old if old else 2))
        if overrides:
            scaled[*section, FIELD] = overrides
    return scaled


def without_overrides(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with the same values for all layers."""

    def strip(section: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in section.items() if name != FIELD}
        return {name: strip(value) if isinstance(value, dict) else value for name, value in kept.items()}

    stripped = type(config).from_dict(strip(copy.deepcopy(config.to_dict())))
    keep_implementations(stripped, config)
    return stripped


def number_fields(config: PreTrainedConfig) -> Iterator[tuple[Path, int | float | None]]:
    """The fields, of parts too, that are whole numbers of 2 or more, ratios above 1, or unset; no ids of tokens."""

    def walk(section: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, int | float | None]]:
        for name, value in section.items():
            if isinstance(value, dict) and isinstance(_get(config, (*path, name)), PreTrainedConfig):
                yield from walk(value, (*path, name))
            elif ID_FIELD.fullmatch(name):
                continue
            elif value is None or (type(value) in (int, float) and value > 1):
                yield (*path, name), value

    yield from walk(config.to_dict(), ())


def _get(config: Any, path: Path) -> Any:
    for name in path:
        config = getattr(config, name, None)
    return config


def section_of(config: PreTrainedConfig, path: Path) -> PreTrainedConfig:
    """The configuration, or the part of it, that has a field."""
    section = _get(config, path[:-1])
    assert isinstance(section, PreTrainedConfig)
    return section


def shapes_of(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: bool = False
) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a model's parameters by name, without allocating them; None if it cannot be built.

    With `buffers`, those of its saved buffers too.
    """
    key = (model_class, _content(config), buffers)
    found = _remembered(_shapes, _MOST_SHAPES, key, lambda: _built_shapes(model_class, config, buffers))
    return None if found is None else dict(found)


def _content(config: PreTrainedConfig) -> str:
    return repr(config.to_dict())


def _remembered(memory: dict[Any, _T], most: int, key: Any, compute: Callable[[], _T]) -> _T:
    """What is remembered under a key, or else what is computed; the oldest is forgotten."""
    if key not in memory:
        while len(memory) >= most:
            del memory[next(iter(memory))]
        memory[key] = compute()
    return memory[key]


def _built_shapes(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, buffers: bool
) -> dict[str, tuple[int, ...]] | None:
    try:
        with torch.device("meta"), few_modules():
            model = model_class(config)
    except MISFITS:
        return None
    tensors = {**dict(model.named_parameters()), **(saved_buffers(model) if buffers else {})}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def saved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that are saved with a model's weights, by name."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def effect_of(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    values: Mapping[Path, Any],
    before: Mapping[str, tuple[int, ...]],
    buffers: bool = False,
) -> Effect | None:
    """What these values change in the shapes `before`, see `shapes_of`; None if the model cannot be built with them."""
    key = (model_class, _content(config), repr(values), buffers)
    return _remembered(_effects, _MOST_EFFECTS, key, lambda: _effect_of(model_class, config, values, before, buffers))


def _effect_of(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    values: Mapping[Path, Any],
    before: Mapping[str, tuple[int, ...]],
    buffers: bool,
) -> Effect | None:
    try:
        changed = with_fields(config, values)
    except MISFITS:
        return None
    after = _built_shapes(model_class, changed, buffers)
    if after is None:
        return None
    sizes = {}
    for name in before:  # in the model's order, the same on every process
        if name not in after:
            continue
        if len(before[name]) != len(after[name]):
            return None
        for dim, (old, new) in enumerate(zip(before[name], after[name], strict=True)):
            if old != new:
                sizes[name, dim] = (old, new)
    return Effect(sizes, frozenset(after.keys() - before.keys()), frozenset(before.keys() - after.keys()))
