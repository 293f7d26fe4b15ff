"""Distillation: what a model loses for not answering as its teacher does.

Every function gives a sum over items, which are what the task's own loss is a mean over (samples, tokens that have a
label), so that batches may be split over micro-batches and processes: the sums are divided by the items of all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import DistillationConfigError

# Elements of a chunk of logits in float32: what is computed of it at once stays small beside the logits.
_CHUNK = 2**22

IGNORED = -100  # the label of what no loss is computed of


# ---- Which items count ----


def item_mask(labels: torch.Tensor, shifted: bool) -> torch.Tensor:
    """Which items have a label, in the shape of the labels.

    With `shifted`, labels stand at the token itself and not at the one before, whose logits are to tell it, as causal
    language models take them: the mask is of the tokens before.
    """
    labelled = labels != IGNORED
    if not shifted:
        return labelled
    return torch.cat([labelled[..., 1:], torch.zeros_like(labelled[..., :1])], dim=-1)


# ---- Answers ----


def divergence(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sum of `T^2 KL(teacher || student)` over the rows that a mask has.

    Logits are (rows..., classes), of any floating type, the mask is (rows...); computed in float32. Beside the logits,
    one tensor of their size is kept for the backward pass: their gradient, `T (softmax(student / T) -
    softmax(teacher / T))`. T^2 keeps its size from one temperature to another (arXiv 1503.02531, section 2).
    """
    classes = student.shape[-1]
    total: torch.Tensor = _Divergence.apply(
        student.reshape(-1, classes), teacher.reshape(-1, classes), mask.reshape(-1), temperature
    )
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        rows = max(_CHUNK // max(student.shape[-1], 1), 1)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            log_student = (student[part].float() / temperature).log_softmax(-1)
            log_teacher = (teacher[part].float() / temperature).log_softmax(-1)
            of_teacher = log_teacher.exp()
            # What the teacher rules out counts as nothing, even where the model rules it out, too.
            of_rows = torch.where(of_teacher > 0, of_teacher * (log_teacher - log_student), 0).sum(-1)
            total += of_rows.masked_fill(~mask[part], 0).sum()
            difference = (log_student.exp_() - of_teacher).mul_(temperature)
            gradient[part] = difference.masked_fill_(~mask[part, None], 0)
        ctx.save_for_backward(gradient)
        return total * temperature**2

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * outer[0]).to(gradient.dtype), None, None, None


def binary_divergence(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The same for labels that are yes or no each by itself: the sum over the labels that a mask has."""
    of_student, of_teacher = student.float() / temperature, teacher.float() / temperature
    goal = of_teacher.sigmoid()
    entropy = nn.functional.binary_cross_entropy_with_logits(of_teacher, goal, reduction="none")
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(of_student, goal, reduction="none")
    return (cross_entropy - entropy).masked_fill(~mask, 0).sum() * temperature**2


def squared_error(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """For regression: the sum of squared differences over the values that a mask has. It knows no temperature."""
    return (student.float() - teacher.float()).square().masked_fill(~mask, 0).sum()


# ---- Hidden states ----


def layer_pairs(layers: int, teacher_layers: int, given: Sequence[Sequence[int]] | None) -> list[tuple[int, int]]:
    """The pairs of hidden states to compare, of so many that model and teacher have.

    Raises DistillationConfigError for layers that are not there, or where none are given and the numbers differ.
    """
    if given is None:
        if layers != teacher_layers:
            raise DistillationConfigError(
                "hidden_layers",
                f"expected pairs, for the model has {layers - 1} layers and the teacher {teacher_layers - 1}, got None",
            )
        return [(layer, layer) for layer in range(layers)]
    for one, other in given:
        if not -layers <= one < layers or not -teacher_layers <= other < teacher_layers:
            raise DistillationConfigError(
                "hidden_layers",
                f"expected layers of the model up to {layers - 1} and of the teacher up to "
                f"{teacher_layers - 1}, got {[one, other]}",
            )
    return [(one, other) for one, other in given]


def check_states(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> None:
    """Raise DistillationConfigError for hidden states, a pair a layer, that cannot be compared token by token."""
    for one, other in zip(student, teacher, strict=True):
        if one.dim() != 3:
            raise DistillationConfigError(
                "hidden_weight",
                f"expected 0 for hidden states that are not (samples, tokens, width), got {tuple(one.shape)}",
            )
        if one.shape != other.shape:
            raise DistillationConfigError(
                "hidden_weight",
                f"expected 0 for hidden states of different shapes, {tuple(one.shape)} of the model "
                f"and {tuple(other.shape)} of the teacher",
            )


def hidden_difference(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The sum over tokens of `|student - teacher|^2 / |teacher|^2`, times their weights, averaged over layers.

    Each sequence has a tensor a layer: hidden states are (samples, tokens, width), weights (samples, tokens). Tokens
    of weight 0 do not count, even if they are not finite.
    """
    total = torch.zeros((), dtype=torch.float32, device=student[0].device)
    for one, other, weight in zip(student, teacher, weights, strict=True):
        of_teacher = other.float()
        relative = (one.float() - of_teacher).square().sum(-1) / of_teacher.square().sum(-1).clamp_min(1e-12)
        total = total + torch.where(weight > 0, relative * weight, 0).sum()
    return total / len(student)
