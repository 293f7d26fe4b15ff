"""The loss and the perplexity of a causal language model on windows of tokens."""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

_LARGEST_EXPONENT = 709.0  # beyond it, exp overflows


def perplexity(model: PreTrainedModel, windows: torch.Tensor, batch_size: int = 1) -> float:
    """`exp` of `mean_loss`; infinity where that is beyond what a float's `exp` can hold."""
    mean = mean_loss(model, windows, batch_size)
    return math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf


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
    total, tokens = 0.0, 0
    try:
        for rows in windows.split(batch_size):
            rows = rows.to(model.device)
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
            rows = rows.to(logits.device)
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
            tokens += rows[:, 1:].numel()
    finally:
        model.train(was_training)
    return total / max(tokens, 1)
