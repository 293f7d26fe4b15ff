"""How a task's loss treats labels and the number of items, found out by calling it, as models do not say."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .losses import IGNORED

# The loss for labels, given the number of items to divide by, or None.
LossOf = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class TaskLoss:
    """How a loss treats labels and the number of items.

    Attributes:
        shifts_labels: the label at a position is compared with the logits at the position before.
        divides_by_items: it is a sum divided by the number of items that it is given, not a mean of its own.
    """

    shifts_labels: bool = False
    divides_by_items: bool = False


def ask_loss(loss_of: LossOf, labels: torch.Tensor, items: Any, of_tokens: bool) -> TaskLoss | None:
    """Find out how a loss treats labels and the number of items, with two to five calls of it.

    A loss that shifts labels ignores the first label of a text: a batch with labels at the first position alone has
    the loss of a batch without labels, a batch with labels at the second position has not. Terms that do not depend on
    labels, such as those that balance experts, are the same in all calls.

    Args:
        loss_of: the loss of one batch; deterministic.
        labels: the labels of the batch.
        items: the number that the loss is given to divide by, or None.
        of_tokens: whether each token has a label, so that they may be shifted.

    Returns: None if this batch does not show it: its loss is zero, not finite, or does not depend on the labels.
    """
    loss = loss_of(labels, items).detach()
    if not bool(torch.isfinite(loss)) or float(loss) == 0:
        return None
    divides = items is not None and not _alike(loss, loss_of(labels, 2 * items))
    if not of_tokens or labels.shape[1] < 2:
        return TaskLoss(shifts_labels=False, divides_by_items=divides)
    few = None if items is None else len(labels)
    without = loss_of(torch.full_like(labels, IGNORED), few)
    if not _alike(loss_of(_only_label(labels, 0), few), without):
        return TaskLoss(shifts_labels=False, divides_by_items=divides)
    if not _alike(loss_of(_only_label(labels, 1), few), without):
        return TaskLoss(shifts_labels=True, divides_by_items=divides)
    return None


def _only_label(labels: torch.Tensor, token: int) -> torch.Tensor:
    """Labels at one position of each text only; where it has none, the largest label of the batch."""
    one = labels[:, token]
    kept = torch.full_like(labels, IGNORED)
    kept[:, token] = torch.where(one == IGNORED, labels.max(), one)
    return kept


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two losses are equal up to rounding; without any label a loss may be NaN (0 / 0)."""
    return bool(torch.isclose(one.float(), other.float(), rtol=1e-4, atol=0, equal_nan=True))
