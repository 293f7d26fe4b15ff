"""How much a model's outputs change without a layer, or without some units of one: measured on a batch, untrained.

The change is relative and squared: `|f(x) - f'(x)|² / |f(x)|²`, the mean over the model's outputs. For a whole layer it
is measured at the outputs. For units of a layer it is measured where the layer ends, and multiplied by what the same
layer's removal shows to become of such a change at the outputs; so that each needs one pass of the layer only.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..foreign.accelerate import forward_of
from ..methods.patterns import count_of
from .batches import first_rows, rows_of
from .latency import Call, layer_paths, record_calls
from .skipping import skip
from .units import CoupledUnits, Family, Part

# Of the processor, for all forward passes together; with more, fewer samples are used.
_SECONDS = 15.0


@dataclass(frozen=True)
class LayerChanges:
    """The change without a layer (None where it cannot be left out), and by structure without shares of its units."""

    removal: float | None
    with_share: dict[str, dict[float, float]]


def measure_changes(
    model: PreTrainedModel,
    families: Mapping[str, Sequence[Family]],
    shares: Mapping[str, Sequence[float]],
    inputs: Mapping[str, Any],
) -> dict[str, LayerChanges]:
    """The changes of each layer that is called, by its path.

    Args:
        families: structure (`neurons`, `heads`) -> its units.
        shares: structure -> the shares of its units that are left out: those that add least to the squared outputs of
            the linear layers that read them, if units are taken to be uncorrelated.
        inputs: a batch of samples; only the first are used if all would take long.
    """
    passes = len(layer_paths(model)) + sum(map(len, shares.values())) + 2
    began = time.perf_counter()
    _outputs_of(model, inputs)
    taken = (time.perf_counter() - began) * passes
    rows = rows_of(inputs)
    if taken > _SECONDS:
        inputs = first_rows(inputs, max(int(rows * _SECONDS / taken), 1))
    groups = {structure: [group for one in some for group in one.groups] for structure, some in families.items()}
    with _reading_inputs(model, [group for some in groups.values() for group in some]) as squares:
        calls = {path: made for path, made in record_calls(model, inputs).items() if made}
    outputs = _outputs_of(model, inputs)
    found = {}
    for path, made in calls.items():
        layer, ending = model.get_submodule(path), _hidden_out(made[0])
        removal, squared = _without_layer(model, layer, inputs, outputs, made[0])
        scale = removal / squared if removal is not None and squared else 1 / max(_squared(ending), 1e-30)
        with_share: dict[str, dict[float, float]] = {}
        for structure, some in groups.items():
            inside = [group for group in some if f"{group.path}.".startswith(f"{path}.")]
            if inside:
                with_share[structure] = {
                    share: scale * _squared(_hidden_without(model, layer, made[0], inside, share, squares) - ending)
                    for share in shares[structure]
                }
        found[path] = LayerChanges(removal, with_share)
    return found


def _outputs_of(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The floating-point outputs, without those of single layers and without the loss."""
    outputs = forward_of(model)(**inputs)
    found = outputs.values() if isinstance(outputs, Mapping) else [outputs]
    return [
        value.float()
        for value in found
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim()
    ]


def _squared(values: torch.Tensor) -> float:
    return float(values.float().square().sum())


def _change(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> float:
    changes = [_squared(one - other) / max(_squared(one), 1e-30) for one, other in zip(before, after, strict=True)]
    return sum(changes) / max(len(changes), 1)


def _hidden_in(call: Call) -> Any:
    return call.arguments[0] if call.arguments else call.options.get("hidden_states")


def _hidden_out(call: Call) -> torch.Tensor:
    return call.output if isinstance(call.output, torch.Tensor) else call.output[0]


def _without_layer(
    model: PreTrainedModel,
    layer: nn.Module,
    inputs: Mapping[str, Any],
    outputs: Sequence[torch.Tensor],
    call: Call,
) -> tuple[float | None, float]:
    """The change of the outputs without a layer, and the squared change where it ends; None if it cannot be skipped."""
    entering, ending = _hidden_in(call), _hidden_out(call)
    if not isinstance(entering, torch.Tensor) or entering.shape != ending.shape:
        return None, 0.0
    handle = skip(layer)
    try:
        return _change(outputs, _outputs_of(model, inputs)), _squared(ending - entering)
    finally:
        handle.remove()


def _hidden_without(
    model: PreTrainedModel,
    layer: nn.Module,
    call: Call,
    groups: Sequence[CoupledUnits],
    share: float,
    squares: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """What a layer returns without a share of the units of these groups, those with the lowest scores."""
    readers = {part.name: model.get_parameter(part.name) for group in groups for part in group.readers}
    before = {name: parameter.detach().clone() for name, parameter in readers.items()}
    try:
        for group in groups:
            dropped = _scores_of(group, readers, squares).argsort(stable=True)[: count_of(share, group.units)]
            for part in group.readers:
                weight, dim = _weight_of(readers[part.name], part)
                weight.index_fill_(dim, part.indices(dropped).to(weight.device), 0)
        return _hidden_out(Call((), {}, layer(*call.arguments, **call.options)))
    finally:
        for name, parameter in readers.items():
            parameter.copy_(before[name])


def _weight_of(parameter: nn.Parameter, part: Part) -> tuple[torch.Tensor, int]:
    """The tensor that a part lies in, and the dimension: of fused experts, that of one expert."""
    if part.expert is None:
        return parameter, part.dim
    return parameter[part.expert], part.dim - 1


def _scores_of(
    group: CoupledUnits, readers: Mapping[str, nn.Parameter], squares: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """`sum over inputs i of a unit of |x_i|² |w_i|²`; without inputs, the squared norm of its weights."""
    scores = torch.zeros(group.units, dtype=torch.float64)
    for part in group.readers:
        weight, dim = _weight_of(readers[part.name], part)
        others = [other for other in range(weight.dim()) if other != dim]
        norms = weight.detach().double().square().sum(others).cpu()
        if part.name in squares and part.expert is None:
            norms = norms * squares[part.name]
        for start, width in part.runs:
            scores += norms[start : start + group.units * width].view(group.units, width).sum(1)
    return scores


@contextmanager
def _reading_inputs(model: nn.Module, groups: Sequence[CoupledUnits]) -> Iterator[dict[str, torch.Tensor]]:
    """By the name of a weight that reads units, the squared norm of each of its inputs (float64, on the CPU)."""
    squares: dict[str, torch.Tensor] = {}

    def note(name: str, features: int, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        entering = arguments[0] if arguments else None
        if isinstance(entering, torch.Tensor) and entering.shape[-1] == features:
            found = entering.double().reshape(-1, features).square().sum(0).cpu()
            squares[name] = squares[name] + found if name in squares else found

    hooks = []
    for part in {part.name: part for group in groups for part in group.readers}.values():
        owner, _, kind = part.name.rpartition(".")
        weight = model.get_parameter(part.name)
        if kind == "weight" and weight.dim() == 2:
            features = weight.shape[part.dim]
            hooks.append(model.get_submodule(owner).register_forward_pre_hook(partial(note, part.name, features)))
    try:
        yield squares
    finally:
        for hook in hooks:
            hook.remove()
