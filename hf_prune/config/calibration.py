"""`CalibrationConfig`: which tokens a model is pruned with, and what the pruned layers are to approximate."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import CalibrationConfigError, PruningConfigError
from .checks import Problem, is_number, is_one_of, numbers_as_floats, problems_of_fields
from .pruning import PruningConfig


@dataclass(frozen=True)
class CalibrationConfig:
    """How a model is pruned from calibration data. Frozen, and validated when it is created.

    A layer with the weights W and the inputs x in the model that is pruned so far gets the weights that minimise, over
    the calibration tokens, `||x W'ᵀ - y||²`, where `y = (1 - dense_weight) x Wᵀ + dense_weight x° Wᵀ + residual_weight
    (h° - h)`. x° are the inputs in the dense model; h is the residual stream that the layer's output is added to, and
    h° that of the dense model; the last term is there only where such a stream was found.

    Args:
        samples: how many windows of text (language models) or texts (other models).
        length: the length of a window in tokens; other models truncate texts there.
        batch_size: how many samples pass through the model together.
        seed: the seed with which texts and windows are chosen.
        damping: how much is added to the diagonal of the layers' second moments, as a share of it: the larger, the
            nearer the weights stay to the dense ones, as few tokens require. Default None: that of the method, such as
            0.1 for `sparsegpt` (0.01 with `dense_weight=0`) and 0.3 for `alps`.
        dense_weight: from 0 (a layer approximates its own output) to 1 (that in the dense model). Above 0 the dense
            model's activations are computed beside the pruned one's. Default 0.75: benchmarks/README.md compares.
        residual_weight: from 0 to 1. Default 0.5; with `dense_weight=0` it must be 0.
        autocast: `bfloat16` or `float16`: the forward passes of a float32 model compute in it, which is faster where
            the processor can; weights, sums and solvers stay in float32. With `bfloat16` on a CPU, the sums are of
            values rounded to it, as the layers read inputs. Default None: as the weights are.
        offload: where the tensors of forward passes wait that are paused before a layer: `cpu`, for a model on an
            accelerator, or `disk`, in a file in the output's folder; then pruned weights of linear layers in a model
            on the CPU, and their masks, are mapped from there, too. The result is the same, bit for bit. Default None:
            they stay on the model's device.
        device: where the model is computed, such as `cuda`, while its weights stay on the CPU: each layer's are copied
            there before all forward passes go through it. For models that the device has no room for. Default None:
            where the weights are.

    Raises:
        CalibrationConfigError: if a value is invalid; it lists all problems.
    """

    samples: int = field(default=128, metadata={"help": "Windows of text."})
    length: int = field(default=2048, metadata={"help": "Length of a window in tokens."})
    batch_size: int = field(default=1, metadata={"help": "Samples that pass through the model together."})
    seed: int = field(default=0, metadata={"help": "Seed of the choice of texts and windows."})
    damping: float | None = field(default=None, metadata={"help": "Share of the diagonal that is added to it."})
    dense_weight: float = field(default=0.75, metadata={"help": "Weight of the dense model's outputs, 0 to 1."})
    residual_weight: float = field(default=0.5, metadata={"help": "Weight of the residual stream's lack, 0 to 1."})
    autocast: str | None = field(default=None, metadata={"help": "bfloat16 or float16, for the forward passes."})
    offload: str | None = field(
        default=None, metadata={"help": "cpu or disk, for what paused forward passes hold; disk for masks, too."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Where to compute, such as cuda, with weights that stay on the CPU."}
    )

    def __post_init__(self) -> None:
        numbers_as_floats(self, "damping", "dense_weight", "residual_weight")
        problems: list[Problem] = []
        for name, usable, expected in (
            *((name, _is_whole(getattr(self, name), least=1), "1 or more") for name in _COUNTS),
            ("seed", _is_whole(self.seed, least=0), "0 or more"),
            ("damping", self.damping is None or _is_between(self.damping, 0, None), "a number above 0, or None"),
            ("dense_weight", _is_between(self.dense_weight, 0, 1), "0 <= dense_weight <= 1"),
            ("residual_weight", _is_between(self.residual_weight, 0, 1), "0 <= residual_weight <= 1"),
            ("autocast", self.autocast is None or is_one_of(self.autocast, _AUTOCAST), "bfloat16, float16 or None"),
            ("offload", self.offload is None or is_one_of(self.offload, _OFFLOAD), "cpu, disk or None"),
            ("device", self.device is None or isinstance(self.device, str), "the name of a device of torch, or None"),
        ):
            if not usable:
                problems.append((name, f"expected {expected}, got {getattr(self, name)!r}"))
        if self.damping == 0:
            problems.append(("damping", "expected a number above 0, or None, got 0.0"))
        if not problems and self.dense_weight == 0 and self.residual_weight > 0:
            problems.append(
                ("residual_weight", f"must be 0 where dense_weight is 0, got {self.residual_weight}: set both or none")
            )
        if problems:
            raise CalibrationConfigError(problems=problems)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CalibrationConfig":
        """Make a configuration from a mapping of fields. Raises CalibrationConfigError for what is none."""
        problems = problems_of_fields(values, cls)
        if problems:
            raise CalibrationConfigError(problems=problems)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON and YAML can hold."""
        return dataclasses.asdict(self)


_AUTOCAST = ("bfloat16", "float16")

_OFFLOAD = ("cpu", "disk")

_COUNTS = ("samples", "length", "batch_size")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_between(value: Any, low: float, high: float | None) -> bool:
    return is_number(value) and low <= value and (high is None or value <= high)


def check_quality(target_quality: Any) -> None:
    """Raise PruningConfigError for what is no share of a quality."""
    if not is_number(target_quality) or not 0 < target_quality < 1:
        raise PruningConfigError("target_quality", f"expected 0 < target_quality < 1, got {target_quality!r}")


def highest_sparsity(config: PruningConfig) -> float:
    """The highest sparsity of a search. Raises PruningConfigError for a configuration that leaves no choice."""
    if config.parsed_pattern.name == "n:m" or not config.sparsity:
        raise PruningConfigError(
            "sparsity",
            "expected a pattern that leaves a choice of sparsities, and the highest that is tried, above 0; got "
            f"{config.sparsity} with the pattern {config.pattern!r}",
        )
    return config.sparsity
