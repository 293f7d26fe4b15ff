"""The loss and the perplexity of a causal language model on windows of tokens."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..model.targets import find_targets
from .lockstep import Lockstep
from .offload import Store

_LARGEST_EXPONENT = 709.0  # beyond it, exp overflows


def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch_size: int = 1) -> float:
    """`exp` of `mean_loss`; infinity where that is beyond what a float's `exp` can hold."""
    return _perplexity_of(mean_loss(model, windows, batch_size))


def streamed_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: int,
    device: torch.device,
    store: Callable[[], Store] | None = None,
) -> float:
    """The same of a model whose weights stay where they are, and which is computed on a device, see `Onload`.

    All windows go through the model together, from layer to layer, so that its weights are copied once. `store` says
    where those wait that are paused, as in `Lockstep`.
    """
    parts = windows.split(batch_size)
    losses: dict[int, float] = {}

    def add(index: int, dense: bool, output: Any) -> None:
        losses[index] = _loss(output.logits, parts[index])

    batches = [{"input_ids": rows} for rows in parts]
    for _ in Lockstep(model, batches, find_targets(model), on_output=add, device=device, store=store):
        pass
    return _perplexity_of(sum(losses[index] for index in range(len(parts))) / _tokens(windows))


@torch.no_grad()
def mean_loss(model: PreTrainedModel, windows: torch.Tensor, batch_size: int = 1) -> float:
    """The mean negative log-likelihood of each token after the first of its window.

    Args:
        model: a causal language model; it is evaluated as it is, in the precision of its weights.
        windows: token ids (windows, length), int64.
        batch_size: how many windows are computed together.
    """
    was_training = model.training
    model.eval()
    total = 0.0
    try:
        for rows in windows.split(batch_size):
            total += _loss(model(input_ids=rows.to(model.device), use_cache=False).logits, rows)
    finally:
        model.train(was_training)
    return total / _tokens(windows)


def _loss(logits: torch.Tensor, rows: torch.Tensor) -> float:
    """The sum over the tokens of some windows."""
    logits, wanted = logits[:, :-1].float(), rows[:, 1:].to(logits.device)
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))


def _tokens(windows: torch.Tensor) -> int:
    return max(windows[:, 1:].numel(), 1)


def _perplexity_of(mean: float) -> float:
    return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf
