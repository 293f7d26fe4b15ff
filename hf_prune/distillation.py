"""Distillation: what a model loses for not answering as its teacher does.

Every function gives a sum over items, which are what the task's own loss is a mean over (samples, tokens that have a
label), so that batches may be split over micro-batches and processes: the sums are divided by the items of all.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .messages import ProblemsError, nearest

# Elements of a chunk of logits in float32: what is computed of it at once stays small beside the logits.
_CHUNK = 2**22

IGNORED = -100  # the label of what no loss is computed of


class DistillationConfigError(ProblemsError):
    """All that is wrong with a `DistillationConfig`; `problems` has a line each: the field, what is allowed, what came.

    It is raised in training, too, for layers that model and teacher do not have.
    """


@dataclass(frozen=True)
class DistillationConfig:
    """How much a model is to answer as its teacher does. Frozen, and checked whole when it is made.

    The loss is `(1 - weight) * task + weight * T^2 * KL(teacher || model) + hidden_weight * hidden`, where both
    distributions are softmaxes of logits divided by the temperature T (Hinton et al., arXiv 1503.02531), and `hidden`
    is the squared difference of hidden states relative to the teacher's, averaged over layers and tokens (SquareHead,
    arXiv 2310.06927, but relative for each token and not over a batch, so that batches may be split).

    Args:
        temperature: T, more than 0.
        weight: the share of the teacher's answers in the loss, from 0 to 1; at 1 the task's own loss is left out.
        hidden_weight: what the difference of hidden states is multiplied by; 0 or more. Default 0: not computed.
        hidden_layers: pairs of layers to compare, `[of the model, of the teacher]`, 0 is the embeddings' output and
            negative numbers count from the last. Default None: every layer with that of the same number.

    Raises:
        DistillationConfigError: lists every problem at once.
    """

    temperature: float = field(default=2.0, metadata={"help": "What logits are divided by, more than 0."})
    weight: float = field(default=0.5, metadata={"help": "Share of the teacher's answers in the loss, 0 to 1."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Factor of the difference of hidden states."})
    hidden_layers: list[list[int]] | None = field(default=None, metadata={"help": "Pairs: of the model, the teacher."})

    def __post_init__(self) -> None:
        problems = []
        for name in ("temperature", "weight", "hidden_weight"):
            if _is_finite(getattr(self, name)):
                object.__setattr__(self, name, float(getattr(self, name)))
        for name, usable, expected in (
            ("temperature", _is_finite(self.temperature) and self.temperature > 0, "a number above 0"),
            ("weight", _is_finite(self.weight) and 0 <= self.weight <= 1, "0 <= weight <= 1"),
            ("hidden_weight", _is_finite(self.hidden_weight) and self.hidden_weight >= 0, "0 or more"),
            ("hidden_layers", _are_pairs(self.hidden_layers), "pairs of layers such as [[6, 12]], or None"),
        ):
            if not usable:
                problems.append(f"{name}: expected {expected}, got {getattr(self, name)!r}")
        if not problems and self.weight == 0 and self.hidden_weight == 0:
            problems.append("weight: expected more than 0 where hidden_weight is 0, for nothing would be distilled")
        if not problems and self.hidden_layers is not None and self.hidden_weight == 0:
            problems.append("hidden_layers: expected none where hidden_weight is 0")
        if problems:
            raise DistillationConfigError(problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillationConfig":
        """A configuration from a mapping of fields; an unknown one is a DistillationConfigError, with the nearest."""
        allowed = [entry.name for entry in dataclasses.fields(cls)]
        unknown = [f"{name}: unknown field{nearest(name, allowed)}" for name in values if name not in allowed]
        if unknown:
            raise DistillationConfigError(unknown)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON and YAML can hold."""
        return dataclasses.asdict(self)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond what a float can hold
        return False


def _are_pairs(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(layer) is int for layer in pair)
        for pair in value
    )


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
                [
                    f"hidden_layers: expected pairs, for the model has {layers - 1} layers and the teacher "
                    f"{teacher_layers - 1}, got None"
                ]
            )
        return [(layer, layer) for layer in range(layers)]
    for one, other in given:
        if not -layers <= one < layers or not -teacher_layers <= other < teacher_layers:
            raise DistillationConfigError(
                [
                    f"hidden_layers: expected layers of the model up to {layers - 1} and of the teacher up to "
                    f"{teacher_layers - 1}, got {[one, other]}"
                ]
            )
    return [(one, other) for one, other in given]


def check_states(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> None:
    """Raise DistillationConfigError for hidden states, a pair a layer, that cannot be compared token by token."""
    for one, other in zip(student, teacher, strict=True):
        if one.dim() != 3:
            raise DistillationConfigError(
                [
                    "hidden_weight: expected 0 for hidden states that are not (samples, tokens, width), got "
                    f"{tuple(one.shape)}"
                ]
            )
        if one.shape != other.shape:
            raise DistillationConfigError(
                [
                    f"hidden_weight: expected 0 for hidden states of different shapes, {tuple(one.shape)} of the model "
                    f"and {tuple(other.shape)} of the teacher"
                ]
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
