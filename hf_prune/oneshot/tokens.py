"""Which tokens of a micro-batch count: those that are no padding and, in a causal language model, that have a loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

IGNORED = -100  # the label of a token without a loss


@dataclass(frozen=True)
class Position:
    """Where the tokens of a batch are in a layer's input.

    `side` is `input` or `decoder`. `order` is `rows` (samples, tokens, ...), `columns` (tokens, samples, ...), `flat`
    (samples · tokens, ...) or `channels` (samples, channels, tokens).
    """

    side: str
    order: str


def kept_tokens(model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Side -> which tokens count, bool (samples, tokens); a side without tokens is left out.

    Padding does not, by `attention_mask` and `decoder_attention_mask`. Nor do positions without a loss: position t of a
    causal language model whose label t + 1 is -100, and position t of a decoder whose label t is.
    """
    sides: dict[str, torch.Tensor] = {}
    for side, prefix in (("input", ""), ("decoder", "decoder_")):
        mask, tokens = batch.get(f"{prefix}attention_mask"), batch.get(f"{prefix}input_ids")
        if torch.is_tensor(mask) and mask.dim() == 2 and (tokens is None or tokens.shape == mask.shape):
            sides[side] = mask != 0
        elif torch.is_tensor(tokens) and tokens.dim() == 2:
            sides[side] = torch.ones_like(tokens, dtype=torch.bool)
    labels = batch.get("labels")
    if not torch.is_tensor(labels) or labels.dim() != 2 or labels.is_floating_point():
        return sides
    has_loss = labels != IGNORED
    if getattr(model.config, "is_encoder_decoder", False):
        if sides.get("decoder", has_loss).shape == has_loss.shape:
            sides["decoder"] = sides["decoder"] & has_loss if "decoder" in sides else has_loss
    elif model.can_generate() and "input" in sides and sides["input"].shape == has_loss.shape:
        sides["input"] = sides["input"] & torch.cat([has_loss[:, 1:], torch.zeros_like(has_loss[:, :1])], 1)
    return sides


def locate(shape: torch.Size, is_convolution: bool, sides: Mapping[str, torch.Tensor]) -> Position | None:
    """Where the tokens are in an input of this shape, or None where no side has such a number of them."""
    for side, kept in sides.items():
        samples, tokens = kept.shape
        if is_convolution:
            if len(shape) == 3 and (shape[0], shape[2]) == (samples, tokens):
                return Position(side, "channels")
        elif len(shape) > 2 and shape[:2] == (samples, tokens):
            return Position(side, "rows")
        elif len(shape) == 2 and shape[0] == samples * tokens:
            return Position(side, "flat")
        elif len(shape) > 2 and shape[:2] == (tokens, samples):
            return Position(side, "columns")
    return None


def kept_rows(
    position: Position | None, shape: torch.Size, rows: int, sides: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """Which of the rows that an input of this shape becomes count, bool (rows); None if all do."""
    if position is None or position.side not in sides:
        return None
    kept = sides[position.side]
    if bool(kept.all()) or locate(shape, position.order == "channels", {position.side: kept}) is None:
        return None
    if position.order == "columns":
        kept = kept.t()
    if position.order == "channels":  # a row for each position of the output, which may have more of them, or fewer
        positions = rows // len(kept)
        beyond = positions - kept.shape[1]
        return _with_more(kept, beyond).reshape(-1) if beyond >= 0 else None
    kept = kept.reshape(-1)
    return kept.repeat_interleave(rows // len(kept))


def _with_more(kept: torch.Tensor, beyond: int) -> torch.Tensor:
    """With this many columns more, in which nothing counts."""
    return torch.nn.functional.pad(kept, (0, beyond))


def kept_of_routed(
    position: Position | None, indices: torch.Tensor | None, total: int, sides: Mapping[str, torch.Tensor]
) -> torch.Tensor | None:
    """Which of the tokens that an expert gets count, by their indices among all; None if all do."""
    kept = sides.get(position.side) if position is not None else None
    if kept is None or kept.numel() != total or bool(kept.all()):
        return None
    kept = kept.reshape(-1)
    return kept if indices is None else kept.to(indices.device)[indices]
