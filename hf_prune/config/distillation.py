"""`DistillationConfig`: the weights of the distillation losses, and the layers that are compared."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DistillationConfigError
from .checks import Problem, is_number, numbers_as_floats, problems_of_fields


def check_width(config: "DistillationConfig | None", structures: Iterable[str | None]) -> None:
    """Raise DistillationConfigError for hidden states that are compared with a teacher's where some are removed."""
    if config is not None and config.hidden_weight and "hidden" in structures:
        raise DistillationConfigError(
            "hidden_weight",
            "must be 0 where structure='hidden' removes dimensions of the hidden states, as the teacher keeps its own, "
            f"got {config.hidden_weight}",
        )


@dataclass(frozen=True)
class DistillationConfig:
    """How a model is trained to match a teacher. Frozen, and validated when it is created.

    The loss is `(1 - weight) * task + weight * T^2 * KL(teacher || model) + hidden_weight * hidden`, where both
    distributions are softmaxes of logits divided by the temperature T (Hinton et al., arXiv 1503.02531), and `hidden`
    is the squared difference of hidden states relative to the teacher's, averaged over layers and tokens (SquareHead,
    arXiv 2310.06927, but relative per token instead of per batch, so that batches may be split).

    Args:
        temperature: the temperature T, greater than 0.
        weight: the weight of the teacher's outputs in the loss, from 0 to 1; at 1 the task loss is not used.
        hidden_weight: the weight of the hidden-state loss; 0 or more. Default 0: not computed.
        hidden_layers: pairs of layers to compare, `[model layer, teacher layer]`; 0 is the output of the embeddings,
            and negative numbers count from the last layer. Default None: each layer with the teacher's layer of the
            same number.

    Raises:
        DistillationConfigError: if a value is invalid; it lists all problems.
    """

    temperature: float = field(default=2.0, metadata={"help": "Divisor of the logits, greater than 0."})
    weight: float = field(default=0.5, metadata={"help": "Weight of the teacher's outputs in the loss, 0 to 1."})
    hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the hidden-state loss."})
    hidden_layers: list[list[int]] | None = field(default=None, metadata={"help": "Pairs of model and teacher layers."})

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
            problems.append(("weight", "must be greater than 0 if hidden_weight is 0, or nothing is distilled"))
        if not problems and self.hidden_layers is not None and self.hidden_weight == 0:
            problems.append(("hidden_layers", "must not be set if hidden_weight is 0, which compares no layers"))
        if problems:
            raise DistillationConfigError(problems=problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DistillationConfig":
        """Make a configuration from a mapping of fields. Raises DistillationConfigError for what is none."""
        problems = problems_of_fields(values, cls)
        if problems:
            raise DistillationConfigError(problems=problems)
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
