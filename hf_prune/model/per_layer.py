"""Models whose layers have different widths: each layer is built from the values that the configuration has for it.

Configurations of transformers (5.15 and later) have a field for such values, `per_layer_config`; most of its models do
not read it yet, and raise an error. `teach` makes a model's class read it: the layer of index i is built from
`config.per_layer_config[i]`. Classes that read it themselves are left alone, and nothing is done for other models.
"""

import copy
import functools
import importlib
import inspect
import re
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..foreign.transformers import GradientCheckpointingLayer
from .attention import has_shape, resize_heads

FIELD = "per_layer_config"

# Without it, a configuration refuses to read a field that some layers have other values of.
MAY_READ = "allow_global_per_layer_attribute_access"

# Names of the arguments that tell a layer its index.
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "idx")

# Classes of layers that no base class marks: `nn.ModuleList([MPNetLayer(config) for ...`.
_LISTED = re.compile(r"nn\.ModuleList\(\s*\[\s*(\w+)\(")

_taught: set[str] = set()  # names of modules
_obeys: dict[type, bool] = {}  # layer class -> whether `head_dim` sets the size of a head

# For layers that are not told their index: how many were built, by the configuration and the class.
_built: "weakref.WeakValueDictionary[int, PreTrainedConfig]" = weakref.WeakValueDictionary()
_numbers: dict[tuple[int, type], int] = {}


def can_differ() -> bool:
    """Whether configurations of the installed transformers have values per layer."""
    return hasattr(PreTrainedConfig, FIELD)


def has_overrides(config: PreTrainedConfig) -> bool:
    """Whether some layers have other values than the configuration, or in a part of it."""
    return bool(_parts_with_overrides(config))


def _parts_with_overrides(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configuration and its parts, such as that of the text in a model for images, that have values for layers."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    return [part for part in parts if getattr(part, "is_heterogeneous", False) and part.to_dict().get(FIELD)]


def reads_overrides(config_class: type) -> bool:
    """Whether the model classes of a configuration read `per_layer_config` themselves."""
    name = _modeling_module(config_class)
    return name is None or FIELD in inspect.getsource(importlib.import_module(name))


def needs_import(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration, or of a part of it, opens only after `import hf_prune`."""
    return any(not reads_overrides(type(part)) for part in _parts_with_overrides(config))


def teach(config: PreTrainedConfig) -> None:
    """Make the layers of a configuration's model classes read `per_layer_config`, from now on, in this process."""
    name = _modeling_module(type(config))
    if name is None or name in _taught:
        return
    _taught.add(name)
    if reads_overrides(type(config)):
        return
    module = importlib.import_module(name)
    listed = set(_LISTED.findall(inspect.getsource(module)))
    for layer_class in list(vars(module).values()):
        if not isinstance(layer_class, type) or layer_class.__module__ != name or "__init__" not in vars(layer_class):
            continue
        if issubclass(layer_class, GradientCheckpointingLayer) or layer_class.__name__ in listed:
            setattr(layer_class, "__init__", _reading(vars(layer_class)["__init__"]))  # noqa: B010 (for mypy)


def _modeling_module(config_class: type) -> str | None:
    """The module of transformers with the model classes of a configuration."""
    package, _, module = config_class.__module__.rpartition(".")
    if not package.startswith("transformers.") or not module.startswith("configuration_"):
        return None
    name = f"{package}.modeling_{module.removeprefix('configuration_')}"
    return name if importlib.util.find_spec(name) is not None else None


def _reading(build: Callable[..., None]) -> Callable[..., None]:
    """The constructor of a layer, given the values of this layer in place of the whole configuration."""
    signature = inspect.signature(build)

    @functools.wraps(build)
    def build_from_own_values(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        name = next((name for name, value in given.arguments.items() if _differs(value)), None)
        if name is None:
            build(self, *args, **kwargs)
            return
        config = given.arguments[name]
        index = next((given.arguments[one] for one in _INDEX_NAMES if type(given.arguments.get(one)) is int), None)
        if index is None:
            index = _count(config, type(self))
        if index >= config.num_hidden_layers:  # of another stack, such as convolutions before the layers
            build(self, *args, **kwargs)
            return

        def build_from(values: PreTrainedConfig, module: nn.Module) -> nn.Module:
            rest = {key: value for key, value in given.arguments.items() if key not in (name, "self")}
            bound = inspect.BoundArguments(signature, {})
            for key in signature.parameters:
                if key == "self" or key == name or key in rest:
                    bound.arguments[key] = module if key == "self" else values if key == name else rest[key]
            build(*bound.args, **bound.kwargs)
            return module

        try:
            _build_layer(self, config, config.per_layer_config[index], build_from)
        except Exception:
            _numbers.pop((id(config), type(self)), None)  # the next model is counted anew
            raise

    return build_from_own_values


def _differs(value: Any) -> bool:
    return isinstance(value, PreTrainedConfig) and value.is_heterogeneous


def _count(config: PreTrainedConfig, layer_class: type) -> int:
    """The index of the next layer of a model, whose layers are built in order."""
    if _built.get(id(config)) is not config:
        _built[id(config)] = config
        for key in [key for key in _numbers if key[0] == id(config)]:
            del _numbers[key]
    number = _numbers.get((id(config), layer_class), 0)
    _numbers[id(config), layer_class] = number + 1
    return number % config.num_hidden_layers


def _build_layer(
    layer: nn.Module,
    config: PreTrainedConfig,
    own: PreTrainedConfig,
    build_from: Callable[[PreTrainedConfig, nn.Module], nn.Module],
) -> None:
    """Build a layer from its own values; where its class has no size of a head, with heads of the same size."""
    whole = _globals_of(config)
    heads, left = whole.num_attention_heads, getattr(own, "num_attention_heads", None)
    size = getattr(own, "head_dim", None)
    if left is None or left == heads or size is None or _obeys_head_dim(type(layer), whole, build_from):
        build_from(own, layer)
        return
    with_all = copy.copy(own)
    with_all.num_attention_heads = heads
    build_from(with_all, layer)
    resize_heads(layer, heads, heads * size, left)
    for module in layer.modules():
        for name, value in list(vars(module).items()):
            if value is with_all:
                setattr(module, name, own)


def _globals_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration without the values of single layers."""
    whole = copy.copy(config)
    whole.per_layer_config = None
    return whole


def _obeys_head_dim(
    layer_class: type[nn.Module],
    whole: PreTrainedConfig,
    build_from: Callable[[PreTrainedConfig, nn.Module], nn.Module],
) -> bool:
    """Whether the field `head_dim` sets the size of a head in a layer class: then its constructor needs no help."""
    if layer_class not in _obeys:
        wider = copy.copy(whole)
        wider.head_dim = 2 * whole.head_dim
        with torch.device("meta"):
            one, other = (build_from(values, layer_class.__new__(layer_class)) for values in (whole, wider))
        _obeys[layer_class] = not has_shape(one, other)
    return _obeys[layer_class]
