"""`DistillationConfig`: how much a teacher counts, and where it is listened to."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DistillationConfigError
from .checks import Problem, is_number, numbers_as_floats, unknown_fields


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
        problems: list[Problem] = []
        numbers_as_floats(self, "temperature", "weight", "hidden_weight")
        for name, usable, expected in (
            ("temperature", is_number(self.temperature) and self.temperature > 0, "a number above 0"),
            ("weight", is_number(self.weight) and 0 <= self.weight <= 1, "0 <= weight <= 1"),
            ("hidden_weight", is_number(self.hidden_weight) and self.hidden_weight >= 0, "0 or more"),
            ("hidden_layers", _are_pairs(self.hidden_layers), "pairs of layers such as [[6, 12]], or None"),
        ):
            if not usable:
                problems.append((name, f"expected {expected}, got {getattr(self, name)!r}"))
        if not problems and self.weight == 0 and self.hidden_weight == 0:
            problems.append(("weight", "expected more than 0 where hidden_weight is 0, for nothing would be distilled"))
        if not problems and self.hidden_layers is not None and self.hidden_weight == 0:
            problems.append(("hidden_layers", "expected none where hidden_weight is 0"))
        if problems:
            raise DistillationConfigError(problems=problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillationConfig":
        """A configuration from a mapping of fields; an unknown one is a DistillationConfigError, with the nearest."""
        unknown = unknown_fields(values, cls)
        if unknown:
            raise DistillationConfigError(problems=unknown)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON and YAML can hold."""
        return dataclasses.asdict(self)


def _are_pairs(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, (list, tuple)) or not value:
        return False
    return all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(layer) is int for layer in pair)
        for pair in value
    )
