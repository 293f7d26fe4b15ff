"""How long the layers of a model take with fewer units: measured on this machine, one layer at a time.

Layers are timed alone, with the inputs that they get in a forward pass of the model; what is no layer is timed as a
forward pass in which each layer returns at once what it returned before.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import StructureError, first_line
from ..foreign.accelerate import forward_of
from ..foreign.transformers import implementations_of
from ..methods.patterns import count_of
from ..model.anatomy import stacks
from .fields import MISFITS, shapes_of, with_fields
from .latency_table import LatencyTable, LayerTimes
from .shrink import cut_of
from .timing import clock_of, processor_name, time_in_turns
from .units import Family

# Rounds of timing, and after which seconds no more begin.
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 40, 5, 8.0

# How many copies of a layer are called one after another: in a model, each finds the weights of others in the caches.
_COPIES = 3


@dataclass(frozen=True)
class Call:
    """One call of a layer in a forward pass: its arguments, and what it returned."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    output: Any


def layer_paths(model: nn.Module) -> list[str]:
    """The paths of the layers in the outermost repeated stacks of a model, in its order."""
    outermost: list[str] = []
    for path in stacks(model):
        if not any(path.startswith(f"{other}.") for other in outermost):
            outermost.append(path)
    return [f"{path}.{name}" for path in outermost for name, _ in model.get_submodule(path).named_children()]


def record_calls(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, list[Call]]:
    """The calls of each layer in a forward pass, by the layer's path; layers that are not called have none.

    Raises StructureError if the model does not run with these inputs.
    """
    calls: dict[str, list[Call]] = {path: [] for path in layer_paths(model)}

    def note(path: str, module: nn.Module, arguments: Any, options: Any, output: Any) -> None:
        calls[path].append(Call(arguments, options, output))

    hooks = [model.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True) for path in calls]
    try:
        with torch.no_grad():
            forward_of(model)(**inputs)
    except MISFITS as error:
        shapes = {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        raise StructureError(
            "structure",
            f"{type(model).__name__} does not run with inputs of the shapes {shapes}: {first_line(error)}; for a "
            "target, target_length and target_batch_size say which are tried",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes, and the state of random numbers, are restored."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad(), torch.random.fork_rng():
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _returning(model: nn.Module, calls: Mapping[str, Sequence[Call]]) -> Iterator[None]:
    """Layers return what they returned before, without computing it."""
    layers = {path: model.get_submodule(path) for path, made in calls.items() if made}
    before = {path: layer.__dict__["forward"] for path, layer in layers.items() if "forward" in layer.__dict__}
    for path, layer in layers.items():
        layer.forward = _replaying(calls[path])
    try:
        yield
    finally:
        for path, layer in layers.items():
            del layer.forward
            if path in before:
                layer.forward = before[path]


def _replaying(calls: Sequence[Call]) -> Callable[..., Any]:
    made = 0

    def forward(*arguments: Any, **options: Any) -> Any:
        nonlocal made
        made += 1
        return calls[(made - 1) % len(calls)].output

    return forward


def dropped_of(families: Sequence[Family], share: float) -> dict[str, torch.Tensor]:
    """Flags (bool) of a share of the units of each group, by its name; of layers, of the last ones of each stack.

    One unit of each group stays, and one layer of each stack.
    """
    dropped: dict[str, torch.Tensor] = {}
    for family in families:
        if family.structure == "layers":
            most = len(family.removable) - (not family.fixed_layers)
            number = min(count_of(share, len(family.groups)), most)
            gone = {layer.name for layer in family.removable[len(family.removable) - number :]}
            dropped |= {layer.name: torch.tensor([layer.name in gone]) for layer in family.groups}
        else:
            for group in family.groups:
                dropped[group.name] = torch.arange(group.units) < min(count_of(share, group.units), group.units - 1)
    return dropped


def can_be_built(model: PreTrainedModel, families: Sequence[Family], share: float) -> bool:
    """Whether the model's class can be built without a share of the units."""
    try:
        config = cut_of(families, dropped_of(families, share)).config(model.config)
    except MISFITS:
        return False
    return shapes_of(type(model), config) is not None


def measure_layers(
    model: PreTrainedModel,
    families: Mapping[str, Sequence[Family]],
    shares: Mapping[str, Sequence[float]],
    inputs: Mapping[str, Any],
) -> LatencyTable:
    """Time a forward pass of a model, and each of its layers with shares of its units removed.

    Args:
        families: structure (`neurons`, `heads`) -> its units.
        shares: structure -> the shares of its units to time a layer without.
        inputs: what the model is called with.

    Layers of the same class and shapes are timed once. Every call is timed in turns with the others, and the least time
    counts; on a CPU with one thread it is that of the thread. Raises StructureError if the model does not run.
    """
    calls = {path: made for path, made in record_calls(model, inputs).items() if made}
    kinds: dict[Any, list[str]] = {}
    for path in calls:
        kinds.setdefault(_kind_of(model.get_submodule(path)), []).append(path)
    whole = partial(forward_of(model), **inputs)
    timed: dict[Any, Callable[[], Any]] = {"whole": whole, "rest": partial(_without_layers, model, calls, whole)}
    parameters: dict[Any, int] = {}
    often_timed: dict[Any, int] = {}
    for kind, paths in kinds.items():
        path = paths[min(1, len(paths) - 1)]  # the first layer may get other inputs than the others
        call = calls[path][0]
        layers = {(): model.get_submodule(path)} | {
            (structure, share): _smaller_layer(model, path, families[structure], share)
            for structure, some in shares.items()
            for share in some
            if any(f"{group.path}.".startswith(f"{path}.") for one in families[structure] for group in one.groups)
        }
        for what, layer in layers.items():
            copies = [layer, *(copy.deepcopy(layer) for _ in range(min(len(paths), _COPIES) - 1))]
            timed[kind, what] = partial(_call_all, copies, call)
            often_timed[kind, what] = len(copies)
            parameters[kind, what] = sum(parameter.numel() for parameter in layer.parameters())
    clock = clock_of(model.device)
    times = time_in_turns(list(timed.values()), _ROUNDS, _SECONDS, _LEAST_ROUNDS, clock)
    least = {what: min(taken) / often_timed.get(what, 1) for what, taken in zip(timed, times, strict=True)}

    found = {}
    for kind, paths in kinds.items():
        for path in paths:
            often = len(calls[path])
            with_share: dict[str, dict[float, tuple[float, int]]] = {}
            for key in parameters:
                if key[0] == kind and key[1]:  # not the whole layer
                    structure, share = key[1]
                    with_share.setdefault(structure, {})[share] = (least[key] * often, parameters[key])
            found[path] = LayerTimes(least[kind, ()] * often, parameters[kind, ()], with_share)
    table = LatencyTable(
        conditions_of(model, inputs),
        least["whole"],
        least["rest"],
        sum(parameter.numel() for parameter in model.parameters()),
        {path: found[path] for path in calls},
    )
    return _as_in_the_model(table)


def _as_in_the_model(table: LatencyTable) -> LatencyTable:
    """The table with times of layers that add up to that of the model: alone, layers may be faster or slower."""
    alone = sum(layer.seconds for layer in table.layers.values())
    factor = max(table.seconds - table.rest_seconds, 0.5 * alone) / alone
    scaled = {
        path: LayerTimes(
            layer.seconds * factor,
            layer.parameters,
            {
                structure: {share: (seconds * factor, number) for share, (seconds, number) in some.items()}
                for structure, some in layer.with_share.items()
            },
        )
        for path, layer in table.layers.items()
    }
    rest = max(table.seconds - alone * factor, 0.0)
    return replace(table, rest_seconds=rest, layers=scaled)


def _without_layers(model: nn.Module, calls: Mapping[str, Sequence[Call]], forward: Callable[[], Any]) -> None:
    """Call the forward pass of a model whose layers return what they returned before."""
    with _returning(model, calls):
        forward()


def _call_all(layers: Sequence[nn.Module], call: Call) -> None:
    for layer in layers:
        layer(*call.arguments, **call.options)


def _kind_of(layer: nn.Module) -> tuple[Any, ...]:
    return (type(layer), *((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters()))


def _smaller_layer(model: PreTrainedModel, path: str, families: Sequence[Family], share: float) -> nn.Module:
    """A layer as the model's class builds it without a share of its units, with weights of no meaning."""
    config = cut_of(families, dropped_of(families, share)).config(model.config)
    with torch.device("meta"):
        skeleton = type(model)(config)
    layer = skeleton.get_submodule(path).to(model.dtype).to_empty(device=model.device).eval()
    buffers = dict(model.get_submodule(path).named_buffers())
    for parameter in layer.parameters():
        parameter.normal_(0, 0.02)
    for name, buffer in layer.named_buffers():
        like = buffers.get(name)
        buffer.copy_(like) if like is not None and like.shape == buffer.shape else buffer.zero_()
    return layer


def build_with(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the same class, device and precision with another configuration, and new weights."""
    with torch.random.fork_rng(), torch.device(model.device):
        return nn.Module.to(type(model)(config), model.dtype).eval()


def build_again(skeleton: PreTrainedModel, dtype: str, device: torch.device) -> PreTrainedModel:
    """A model like one without weights, with new ones, in a precision such as `float32`."""
    with torch.random.fork_rng(), torch.device(device):
        return nn.Module.to(type(skeleton)(skeleton.config), getattr(torch, dtype)).eval()


def build_dense(model: PreTrainedModel, fields: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the sizes that one had before something was removed from it, with new weights.

    `fields` are the values that its configuration had, by the names of the fields.
    """
    values = {tuple(name.split(".")): before for name, before in fields.items()}
    return build_with(model, with_fields(model.config, values))


def time_models(models: Sequence[PreTrainedModel], inputs: Mapping[str, Any]) -> list[float]:
    """The least seconds of a forward pass of each of several models on one device, in turns."""
    for model in models:
        assert model.device == models[0].device
    clock = clock_of(models[0].device)
    with torch.no_grad():
        times = time_in_turns(
            [partial(forward_of(model), **inputs) for model in models], _ROUNDS, _SECONDS / 2, _LEAST_ROUNDS, clock
        )
    return [min(taken) for taken in times]


def conditions_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a latency table holds for, as plain values."""
    device = model.device
    return {
        "processor": processor_name(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "inputs": {name: list(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)},
        "model": type(model).__name__,
        **{name.removeprefix("_"): value for name, value in implementations_of(model.config).items()},
        "parameters": [list(parameter.shape) for parameter in model.parameters()],
    }
