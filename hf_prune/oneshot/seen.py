"""What scopes see of the dense model: how large each layer's inputs are, and the loss's gradients at its outputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import CalibrationError
from ..masking.collectors import with_gradient
from ..methods.scopes import Seen
from ..structure.batches import on_model, rows_of
from .fused import FusedProducts, Routed
from .layers import Layer, inputs_of_part, matrix_of
from .settings import set_for_streaming
from .tokens import IGNORED, Position, kept_of_routed, kept_rows, kept_tokens
from .windows import Batch, is_causal

# How many samples are enough: sums over tokens differ little from one window of text to another.
SAMPLES = 8


@dataclass
class _Sums:
    """Sums over the tokens that a matrix got."""

    tokens: int = 0
    squares: torch.Tensor | None = None
    gradients: torch.Tensor | None = None


def see_dense(
    model: PreTrainedModel,
    layers: Sequence[Layer],
    batches: Sequence[Batch],
    positions: Mapping[str, Position | None],
    gradients: bool,
) -> dict[str, list[Seen]]:
    """Run the model on the first samples, and see each matrix of these layers.

    Returns, by the name of the tensor, its matrices (views) in their order. Tensors whose layer was not called are left
    out; of an expert without tokens all sums are zero.

    Args:
        model: the dense model; nothing of it is changed.
        layers: what is seen.
        batches: as many of these are used as have `SAMPLES` samples.
        positions: name of the tensor -> where the tokens are in its layer's input, to leave padding out.
        gradients: also run backward from the loss, of which the batches need labels. Those of a causal language model
            are the tokens themselves.

    Raises CalibrationError where gradients are asked for and a batch has no labels.
    """
    sums = {(layer, part): _Sums() for layer in layers for part in range(layer.parts)}
    current: dict[str, torch.Tensor] = {}

    def add_inputs(layer: Layer, part: int, rows: torch.Tensor, kept: torch.Tensor | None) -> None:
        rows = rows.detach() if kept is None else rows.detach()[kept.to(rows.device)]
        one = sums[layer, part]
        one.tokens += len(rows)
        one.squares = _added(one.squares, rows.float().square().sum(0))

    def add_gradient(layer: Layer, part: int, rows: torch.Tensor) -> None:
        one = sums[layer, part]
        one.gradients = _added(one.gradients, rows.float().reshape(-1, rows.shape[-1]).square().sum(0))

    def before(layer: Layer) -> Callable[..., None]:
        def see(module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
            seen = next(value for value in (*arguments, *options.values()) if torch.is_tensor(value))
            for part in range(layer.parts):
                rows = inputs_of_part(layer, part, seen)
                add_inputs(
                    layer, part, rows, kept_rows(positions.get(layer.target.name), seen.shape, len(rows), current)
                )

        return see

    def after(layer: Layer) -> Callable[..., torch.Tensor]:
        def see(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
            output = with_gradient(output)
            output.register_hook(note)
            return output

        def note(gradient: torch.Tensor) -> None:
            if layer.kind == "convolution":
                gradient = gradient.unsqueeze(0) if gradient.dim() == len(layer.target.shape) - 1 else gradient
                gradient = gradient.flatten(2).transpose(1, 2)
            for part, columns in enumerate(gradient.chunk(layer.parts, dim=-1)):
                add_gradient(layer, part, columns)

        return see

    def see_fused(layer: Layer, parts: Sequence[int], rows: Sequence[torch.Tensor], routed: Routed | None) -> None:
        for part, of_part in zip(parts, rows, strict=True):
            kept = (
                None
                if routed is None
                else kept_of_routed(positions.get(layer.target.name), routed.indices, routed.total, current)
            )
            add_inputs(layer, part, of_part, kept)

    def see_product(layer: Layer, parts: Sequence[int], product: torch.Tensor) -> torch.Tensor:
        def note(gradient: torch.Tensor) -> None:
            for part, rows in zip(parts, gradient if len(parts) > 1 else (gradient,), strict=True):
                add_gradient(layer, part, rows)

        product = with_gradient(product)
        product.register_hook(note)
        return product

    fused = [layer for layer in layers if layer.kind == "experts"]
    with ExitStack() as stack:
        stack.enter_context(set_for_streaming(model))
        stack.enter_context(_frozen(model))
        for layer in layers:
            for module in layer.modules if layer.kind in ("linear", "convolution") else ():
                stack.callback(module.register_forward_pre_hook(before(layer), with_kwargs=True).remove)
                if gradients:
                    stack.callback(module.register_forward_hook(after(layer)).remove)
        for batch in _first(batches):
            current.clear()
            current.update(kept_tokens(model, batch))
            with torch.set_grad_enabled(gradients), _deterministic(), torch.autocast(model.device.type, enabled=False):
                with FusedProducts(fused, see_fused, see_product if gradients else None):
                    outputs = _loss(model, batch) if gradients else model(**on_model(batch, model))
                if gradients:
                    outputs.backward()
    return {
        layer.target.name: [_as_seen(layer, part, sums[layer, part], gradients) for part in range(layer.parts)]
        for layer in layers
        if any(sums[layer, part].squares is not None for part in range(layer.parts))
    }


def _as_seen(layer: Layer, part: int, sums: _Sums, gradients: bool) -> Seen:
    weight = matrix_of(layer, part)
    squares = torch.zeros(weight.shape[1]) if sums.squares is None else sums.squares / max(sums.tokens, 1)
    at_outputs = torch.zeros(weight.shape[0]) if sums.gradients is None else sums.gradients
    return Seen(
        weight=weight,
        kept=weight != 0,
        squares=squares.float().to(weight.device),
        gradients=at_outputs.float().to(weight.device)[:, None] if gradients else None,
    )


def _added(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more.double() if total is None else total + more


def _first(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The first batches, until there are enough samples."""
    samples = 0
    for batch in batches:
        if samples >= SAMPLES:
            return
        samples += rows_of(batch)
        yield batch


def check_labels(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Raise CalibrationError where a batch that is looked at gives no loss."""
    for batch in _first(batches):
        _labels(model, batch)


def _labels(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The labels of a batch; of a causal language model, the tokens themselves, without padding."""
    labels = batch.get("labels")
    if labels is None and is_causal(model) and torch.is_tensor(batch.get("input_ids")):
        labels = batch["input_ids"]
        if torch.is_tensor(batch.get("attention_mask")) and batch["attention_mask"].shape == labels.shape:
            labels = labels.masked_fill(batch["attention_mask"] == 0, IGNORED)
    if not torch.is_tensor(labels):
        raise CalibrationError(
            "data",
            "expected batches with labels for the scope 'sensitivity', which needs the loss of the model, got "
            f"{', '.join(batch) or 'none'}; pass labels, or use the scope 'layer' or 'owl'",
        )
    return labels


def _loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """The sum of the losses of all labels, so that each counts the same."""
    labels = _labels(model, batch)
    loss = model(**{**on_model(batch, model), "labels": labels.to(model.device)}).loss
    return loss * int((labels != IGNORED).sum())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter gets a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _deterministic() -> Iterator[None]:
    """The same sums each time, where operations have a way to them."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
