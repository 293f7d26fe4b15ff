"""The inputs that a model is timed and tried with, made from one batch of its data."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import PruningConfigError


def on_model(batch: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A batch on the model's device and in its precision, without labels (but where a decoder needs them)."""
    needs_labels = getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" not in batch
    inputs: dict[str, Any] = {}
    for name, value in batch.items():
        if "label" in name and not needs_labels:
            continue
        if isinstance(value, torch.Tensor):
            value = value.to(model.device, model.dtype if value.is_floating_point() else None)
        inputs[name] = value
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def rows_of(batch: Mapping[str, Any]) -> int:
    """The number of samples in a batch: the size of the first dimension of its tensors."""
    return max((len(value) for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()), default=0)


def first_rows(batch: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """A batch of the first samples only."""
    number = rows_of(batch)
    return {
        name: value[:rows] if isinstance(value, torch.Tensor) and value.dim() and len(value) == number else value
        for name, value in batch.items()
    }


def inputs_to_time(batch: Mapping[str, Any], batch_size: int | None, length: int | None) -> dict[str, Any]:
    """The sample of median length of a batch without its padding, `batch_size` times, at `length` tokens.

    Without a batch size it is taken once; without a length it keeps its own. A length cuts the tokens, or repeats them.
    Raises PruningConfigError for a length where the inputs are no tokens.
    """
    mask = batch.get("attention_mask")
    tokens = batch.get("input_ids")
    if length is not None and tokens is None:
        raise PruningConfigError(
            "target_length", f"must not be set for a model whose inputs are no tokens (input_ids), got {length}"
        )
    row, start, stop = 0, 0, tokens.shape[1] if tokens is not None else 0
    if mask is not None and mask.dim() == 2 and tokens is not None and mask.shape == tokens.shape:
        lengths = mask.sum(1)
        row = int(lengths.argsort(stable=True)[(len(lengths) - 1) // 2])
        inside = mask[row].nonzero().squeeze(1)
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, mask.shape[1])
    number = rows_of(batch)
    inputs: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == number:
            value = value[row : row + 1]
            if tokens is not None and value.dim() > 1 and value.shape[1] == tokens.shape[1]:
                value = value[:, start:stop]
                if length is not None:
                    value = value[:, torch.arange(length, device=value.device) % (stop - start)]
            value = value.repeat(batch_size or 1, *[1] * (value.dim() - 1))
        inputs[name] = value
    return inputs
