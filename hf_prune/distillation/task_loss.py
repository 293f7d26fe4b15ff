"""What a task's loss does with labels and with the number of items: asked of the loss itself, for no model tells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .losses import IGNORED

# The loss of labels, divided by so many items; None where it is not told a number.
LossOf = Callable[[torch.Tensor, Any], torch.Tensor]


@dataclass(frozen=True)
class TaskLoss:
    """What a loss does.

    Attributes:
        shifts_labels: labels stand at the token itself, and are compared with the logits of the token before.
        divides_by_items: it is a sum divided by the items that it is told, not a mean of its own.
    """

    shifts_labels: bool = False
    divides_by_items: bool = False


def ask_loss(loss_of: LossOf, labels: torch.Tensor, items: Any, of_tokens: bool) -> TaskLoss | None:
    """Find out what a loss does, by two to five calls of it.

    A loss that shifts labels never looks at the first of a text, so a batch where only that has one is to it as a
    batch without any; where only the second has one, it is not. Terms that know no labels, such as those that balance
    experts, are in all of them and change nothing.

    Args:
        loss_of: the loss of one batch; the same for the same arguments.
        labels: those of the batch.
        items: what the loss is told to divide by, or None.
        of_tokens: whether each token has a label, so that they may be shifted.

    Returns: None if this batch cannot tell, because its loss is zero or not finite, or labels do not count.
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
    """Labels of which only those of one token of each text are left; where it has none, a label of the batch."""
    one = labels[:, token]
    kept = torch.full_like(labels, IGNORED)
    kept[:, token] = torch.where(one == IGNORED, labels.max(), one)
    return kept


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two losses are equal but for rounding; that of no items may be 0 / 0."""
    return bool(torch.isclose(one.float(), other.float(), rtol=1e-4, atol=0, equal_nan=True))
