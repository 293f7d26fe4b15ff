"""Which outputs of model and teacher are compared, logits and hidden states, and the distance between them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from ..config.distillation import DistillationConfig
from ..errors import DistillationConfigError, TeacherError
from .losses import binary_divergence, check_states, divergence, hidden_difference, layer_pairs, squared_error


def _logits(whose: str, outputs: Any) -> torch.Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not torch.is_tensor(logits):
        came = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TeacherError("teacher_model", f"expected logits in the outputs of the {whose}, got {came}")
    return logits


def logits_to_compare(outputs: Any, answers: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of model and teacher. Raises TeacherError if one has none, or if their shapes differ."""
    logits, of_teacher = _logits("model", outputs), _logits("teacher", answers)
    if logits.shape != of_teacher.shape:
        raise TeacherError(
            "teacher_model",
            f"expected logits of shape {tuple(logits.shape)}, as the model gives, got {tuple(of_teacher.shape)}",
        )
    return logits, of_teacher


def _kind(logits: torch.Tensor, labels: torch.Tensor, problem: str | None) -> str:
    """The kind of labels, decided as models do: `classes`, `yes_or_no` for each label, or `numbers`."""
    if problem == "regression" or logits.shape[-1] == 1:
        return "numbers"
    return "yes_or_no" if labels.is_floating_point() else "classes"


def distance(
    logits: torch.Tensor,
    of_teacher: torch.Tensor,
    labels: torch.Tensor,
    mask: torch.Tensor,
    temperature: float,
    problem: str | None,
) -> torch.Tensor:
    """The distance between the logits of model and teacher, summed over the items that the mask selects.

    `problem` is the model's `problem_type`. Raises TeacherError if the shape of the labels does not fit the logits.
    """
    kind = _kind(logits, labels, problem)
    expected = logits.shape[:-1] if kind == "classes" else logits.shape
    if mask.shape != expected and mask.numel() != math.prod(expected):
        raise TeacherError(
            "teacher_model",
            f"expected labels of shape {tuple(expected)} for logits of {tuple(logits.shape)}, got {tuple(mask.shape)}",
        )
    if kind == "classes":
        return divergence(logits, of_teacher, mask, temperature)
    mask = mask.reshape(expected)
    if kind == "yes_or_no":
        return binary_divergence(logits, of_teacher, mask, temperature)
    return squared_error(logits, of_teacher, mask)


def states_to_compare(
    config: DistillationConfig, outputs: Mapping[str, Any], answers: Mapping[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The hidden states of model and teacher that are compared, one pair for each layer.

    Raises TeacherError if there are none, and DistillationConfigError if they cannot be compared.
    """
    states, of_teacher = _hidden_states("model", outputs), _hidden_states("teacher", answers)
    pairs = layer_pairs(len(states), len(of_teacher), config.hidden_layers)
    chosen = [states[one] for one, _ in pairs], [of_teacher[other] for _, other in pairs]
    check_states(*chosen)
    return chosen


def _hidden_states(whose: str, outputs: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    for name in ("decoder_hidden_states", "hidden_states"):
        states = outputs.get(name)
        if states:
            return cast(Sequence[torch.Tensor], states)
    raise TeacherError("hidden_weight", f"must be 0: the {whose} returns no hidden states, only {', '.join(outputs)}")


def token_weights(
    states: torch.Tensor, mask: torch.Tensor, items_are_tokens: bool, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The weight of each token of (samples, tokens, width), such that each item counts once.

    Tokens count for their own labels; a label of a whole sample is shared equally by its tokens, without padding.
    """
    samples, tokens = states.shape[:2]
    if items_are_tokens:
        return mask.reshape(samples, tokens, -1).float().sum(-1)
    of_samples = mask.reshape(samples, -1).float().sum(1, keepdim=True)
    if attention_mask is None or attention_mask.shape != (samples, tokens):
        return (of_samples / tokens).expand(samples, tokens)
    seen = attention_mask.float()
    return of_samples * seen / seen.sum(1, keepdim=True).clamp_min(1)


def hidden_distance(
    config: DistillationConfig,
    outputs: Mapping[str, Any],
    answers: Mapping[str, Any],
    mask: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pairs_of: Callable[[int], list[list[int]] | None] = lambda layers: None,
) -> torch.Tensor:
    """The difference of hidden states, summed over items; for encoder-decoders, of the decoder's.

    `pairs_of` gives the pairs that are compared by default, from the number of the teacher's layers.

    Raises what `states_to_compare` does, and DistillationConfigError if a label belongs to several texts.
    """
    if config.hidden_layers is None:
        config = replace(config, hidden_layers=pairs_of(len(_hidden_states("teacher", answers)) - 1))
    states, of_teacher = states_to_compare(config, outputs, answers)
    if len(mask) != len(states[0]):
        raise DistillationConfigError(
            "hidden_weight",
            f"must be 0 if a label belongs to several texts, got {len(mask)} labels for {len(states[0])} texts",
        )
    items_are_tokens = outputs["logits"].dim() == 3
    weights = [token_weights(state, mask, items_are_tokens, attention_mask) for state in states]
    return hidden_difference(states, of_teacher, weights)
