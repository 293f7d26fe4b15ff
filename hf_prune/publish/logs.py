"""What a card shows of a Trainer's logs and arguments."""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from ..config.checks import is_number, is_real
from ..methods.penalties import PENALTIES
from .redact import is_plain, without_tokens

# The most training entries of the log that are kept; evaluations are all kept.
_LOGGED_STEPS = 1000

# What a Trainer logs with an evaluation beside its metrics.
_NOT_METRICS = (
    *("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "jit_compilation_time"),
    *("epoch", "step", "samples", "num_input_tokens_seen", "mem_cpu_alloc_delta", "mem_cpu_peaked_delta"),
    *("mem_gpu_alloc_delta", "mem_gpu_peaked_delta"),
)

# Arguments that do not affect the trained model.
_NOT_REPRODUCED = (
    *("output_dir", "logging_dir", "run_name", "project", "report_to", "trackio_space_id"),
    *("disable_tqdm", "log_level", "log_level_replica", "do_train", "do_eval", "do_predict"),
)


# ---- What a Trainer logged ----


@dataclass(frozen=True)
class MeasuredEvaluation:
    """The metrics of one evaluation, with a digest of the weights, the metric prefix, and the data, if known."""

    digest: str
    prefix: str
    values: dict[str, Any]
    samples: int | None
    dataset: Any


def metrics_of(values: Mapping[str, Any], prefix: str = "eval") -> dict[str, float]:
    """The metrics among what a Trainer logs of an evaluation, without prefix and timings: finite numbers only."""
    metrics = {}
    for key, value in values.items():
        name = key.removeprefix(f"{prefix}_")
        if name != key and name not in _NOT_METRICS and is_number(value):
            metrics[name] = float(value)
    return metrics


def not_finite(values: Mapping[str, Any], prefix: str = "eval") -> list[str]:
    """The names of metrics, without the prefix, that are NaN or infinite."""
    bad = [key for key, value in values.items() if is_real(value) and not is_number(value)]
    return [key.removeprefix(f"{prefix}_") for key in bad if key.startswith(f"{prefix}_")]


def thin_history(log_history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Steps, sparsities, losses and evaluation metrics of a log; if it is very long, every n-th training entry."""
    terms = ("task_loss", "distillation_loss", "hidden_loss", *(f"{name}_penalty" for name in PENALTIES))
    wanted = ("step", "loss", *terms, "sparsity", "target_sparsity")
    entries = []
    for entry in log_history:
        kept = {name: float(entry[name]) for name in wanted if name in entry and is_number(entry[name])}
        kept |= {f"eval_{name}": value for name, value in metrics_of(entry).items()}
        if "step" in kept and ("loss" in kept or any(name.startswith("eval_") for name in kept)):
            entries.append(kept)
    training = [index for index, entry in enumerate(entries) if not any(name.startswith("eval_") for name in entry)]
    every = math.ceil(len(training) / _LOGGED_STEPS) or 1
    dropped = set(training) - set(training[::every]) - set(training[-1:])
    return [entry for index, entry in enumerate(entries) if index not in dropped]


# ---- What a run was made with ----


def changed_arguments(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that differ from the defaults, as plain values; no paths, tokens, or names on the Hub."""
    changed = {}
    for field in dataclasses.fields(args):
        name = field.name
        private = name.startswith(("_", "hub_", "push_to_hub")) or name in _NOT_REPRODUCED
        if not field.init or private:
            continue
        value, default = _as_plain(getattr(args, name)), _as_plain(_default_of(field))
        if value != default and not (_says_nothing(value) and _says_nothing(default)) and is_plain(value):
            changed[name] = value
    return without_tokens(changed)


def _says_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _default_of(field: dataclasses.Field) -> Any:
    # A second object of TrainingArguments would tell, but making one resets accelerate's state.
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default if field.default is not dataclasses.MISSING else None


def _as_plain(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value
