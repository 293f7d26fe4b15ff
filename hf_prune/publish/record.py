"""The record of a run, `run_record.json` beside a saved model: what cannot be read from the weights."""

import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..config.pruning import PruningConfig, SavedConfig
from ..config.safe_json import read_json
from ..errors import RecordError, one_line
from ..methods.table import method_of
from ..saved.files import SavedFile, write_file

RECORD_NAME = "run_record.json"

FORMAT_VERSION = 1


class Frozen(BaseModel):
    """A frozen model of plain values, validated when it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


AnyFrozen = TypeVar("AnyFrozen", bound=Frozen)


class Source(Frozen):
    """The base model or a data set of a run. `name` is shown; `hub_name` is its name on the Hub, if it has one.

    `revision`, `config` and `split` are those of `datasets`; `rows` describes which rows of a data set were used.
    """

    name: str
    hub_name: str | None = None
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    rows: str | None = None
    license: str | None = None
    languages: list[str] = []


class Evaluation(Frozen):
    """Metrics of the saved model on one data set of `samples` samples, and those of the dense model, if measured.

    `main_metric` is None if none of the metrics is one that is usually reported. `part` is the Trainer's name of the
    data (`eval`, `test`, `eval_news`); `not_finite` are NaN or infinite metrics; `given_in` is the file of metrics that
    the model's author measured, not the Trainer. For a model that was pruned at once, `base_metrics` are those of the
    model before any training, where the dense model is one that was trained, and `at_once_metrics` those of the pruned
    model before it was trained on.
    """

    metrics: dict[str, float]
    main_metric: str | None = None
    part: str = "eval"
    given_in: str | None = None
    not_finite: list[str] = []
    dense_metrics: dict[str, float] | None = None
    base_metrics: dict[str, float] | None = None
    at_once_metrics: dict[str, float] | None = None
    samples: int | None = None
    dataset: Source | None = None

    @model_validator(mode="after")
    def _main_metric_is_one(self) -> "Evaluation":
        if self.main_metric is not None and self.main_metric not in self.metrics:
            raise ValueError(f"main_metric: expected one of {', '.join(self.metrics)}, got {self.main_metric!r}")
        return self


class Distillation(Frozen):
    """The teacher, if it has a name, and the fields of a `DistillationConfig`.

    `teacher_base` is the base of a teacher that was given as a model object, and may have been trained since.
    """

    teacher: Source | None = None
    teacher_base: Source | None = None
    temperature: float
    weight: float
    hidden_weight: float = 0.0
    hidden_layers: list[list[int]] | None = None


class PassCost(Frozen):
    """What a forward pass of one model costs.

    `seconds` is the median of several, `quartiles` are the first and the third. `flops` are the floating-point
    operations that torch's FlopCounterMode counts. `memory_bytes` are those of the parameters and buffers, and the most
    that the pass held beside them at a time.
    """

    seconds: float
    quartiles: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    flops: int | None = None
    memory_bytes: int | None = None


class Cost(Frozen):
    """What a forward pass on one batch of these input shapes costs, with the saved model and with the dense one.

    Both were timed in turns, `passes` times. `dense_is_new` says that the dense model was built for it, with the
    original sizes and new weights.
    """

    shapes: dict[str, list[int]]
    passes: int
    model: PassCost
    dense: PassCost | None = None
    dense_is_new: bool = False

    @property
    def samples(self) -> int:
        """How many samples the batch has."""
        return next((shape[0] for shape in self.shapes.values() if shape), 1)

    @property
    def speedup(self) -> float | None:
        """How many times as fast as the dense model; None if that was not timed."""
        return self.dense.seconds / self.model.seconds if self.dense is not None and self.model.seconds > 0 else None


class Sample(Frozen):
    """The texts that were generated for a prompt."""

    prompt: str
    pruned: str
    dense: str | None = None


class Generation(Frozen):
    """The texts that the saved and the dense model generated for the same prompts, and their new tokens per second."""

    samples: list[Sample]
    tokens_per_second: float
    dense_tokens_per_second: float | None = None


class RemovedTokens(Frozen):
    """How many tokens a tokenizer had and has, and the parameters of the model, in bytes too, that left with them."""

    before: int
    after: int
    parameters: int
    bytes: int


class Calibration(Frozen):
    """The data that a model was pruned from at once, and the settings: see `CalibrationConfig`.

    `tokens` are those that counted: no padding, and none without a loss. `length` is that of a window of text, in
    tokens; None where texts have lengths of their own. `notes` say what was pruned otherwise, or not.
    """

    dataset: Source | None = None
    samples: int
    length: int | None = None
    tokens: int
    seed: int | None = None
    damping: float | None = None
    dense_weight: float = 0.0
    residual_weight: float = 0.0
    notes: list[str] = []


class Method(Frozen):
    """What a method prunes, in words, and its BibTeX entry."""

    words: str
    paper: str | None = None


class Hardware(Frozen):
    """The machine of the run. `threads` are those of torch on the CPU."""

    processor: str
    cores: int
    threads: int
    accelerator: str | None = None
    processes: int = 1


class Emissions(Frozen):
    """The emissions of the training by codecarbon: kilograms of CO2 equivalent, for the electricity of a country."""

    kilograms: float
    kilowatt_hours: float
    country: str | None
    seconds: float


class RunRecord(Frozen):
    """What a card says that cannot be read from the weights. `weights` are the files that the measurements belong to.

    `steps` is the number of trained steps; the weights are those of `kept_step`, which differs if the best model was
    loaded at the end. `calibration` is that of a model that was pruned at once; `dense_steps` is then for how many
    steps it was trained before. The first of `evaluations` is the main one. `methods` are those of `pruning`, which
    another package may have brought.

    `chosen` is metadata that a user set for the card: license, language, pipeline_tag, base_model; `tags` are more
    tags.
    """

    format_version: int = FORMAT_VERSION
    name: str
    chosen: dict[str, Any] = {}
    tags: list[str] = []
    base_model: Source | None = None
    pruning: list[dict[str, Any]] = []
    methods: dict[str, Method] = {}
    target_sparsity: float | None = None
    calibration: Calibration | None = None
    dense_steps: int | None = None
    distillation: Distillation | None = None
    steps: int | None = None
    kept_step: int | None = None
    epochs: float | None = None
    train_samples: int | None = None
    training_data: Source | None = None
    training_arguments: dict[str, Any] = {}
    seed: int | None = None
    recipe: dict[str, Any] | None = None
    history: list[dict[str, float]] = []
    evaluations: list[Evaluation] = []
    costs: list[Cost] = []
    generation: Generation | None = None
    removed_tokens: RemovedTokens | None = None
    hardware: Hardware | None = None
    emissions: Emissions | None = None
    versions: dict[str, str] = {}
    weights: dict[str, SavedFile] = {}

    @property
    def evaluation(self) -> Evaluation | None:
        """The main evaluation."""
        return self.evaluations[0] if self.evaluations else None

    @model_validator(mode="before")
    @classmethod
    def _with_costs(cls, content: Any) -> Any:
        """Records had `latency`, of one batch, before they had `costs`."""
        if not isinstance(content, dict) or "latency" not in content:
            return content
        latency = content["latency"]
        costs = [] if latency is None else [_cost_of(latency)]
        return {name: value for name, value in content.items() if name != "latency"} | {"costs": costs}

    @field_validator("pruning")
    @classmethod
    def _complete(cls, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [SavedConfig.from_dict(config).to_dict() for config in configs]

    @field_validator("history")
    @classmethod
    def _with_steps(cls, history: list[dict[str, float]]) -> list[dict[str, float]]:
        if not all("step" in entry for entry in history):
            raise ValueError("history: expected a step in every entry")
        return history


def _cost_of(latency: Any) -> Any:
    """The fields of a `Cost`, from those that a latency had: `shapes`, `passes`, `seconds` and `dense_seconds`."""
    if not isinstance(latency, dict):
        return latency
    cost = {name: value for name, value in latency.items() if name not in ("seconds", "dense_seconds")}
    dense = latency.get("dense_seconds")
    return cost | {
        "model": {"seconds": latency.get("seconds")},
        "dense": {"seconds": dense} if dense is not None else None,
    }


def describe_methods(configs: Sequence[PruningConfig]) -> dict[str, Method]:
    """The methods of configurations that are known here, by name."""
    entries = {config.method: method_of(config.method, config.structure) for config in configs}
    return {name: Method(words=one.words, paper=one.paper) for name, one in entries.items() if one is not None}


def save_record(folder: str | os.PathLike, record: RunRecord) -> None:
    """Write `run_record.json` into the folder."""
    write_frozen(Path(folder, RECORD_NAME), record)


def load_record(folder: str | os.PathLike) -> RunRecord | None:
    """The record in a folder, or None if there is none. Raises RecordError, naming the file, if it cannot be used."""
    return read_frozen(Path(folder, RECORD_NAME), RunRecord, FORMAT_VERSION, "the record of a run")


def dense_beside(folder: Path, record: RunRecord | None) -> Path | None:
    """Where a run has saved the dense model that it trained, beside the pruned one; None if its record does not say so.

    `record` is that of the pruned model in `folder`.
    """
    if record is None or record.recipe is None or record.recipe.get("dense", {}) is None:
        return None
    dense = folder.resolve().parent / "dense"
    return dense if folder.resolve().name == "model" and (dense / "config.json").is_file() else None


def write_frozen(path: Path, content: Frozen) -> None:
    """Write plain values as JSON."""
    text = json.dumps(content.model_dump(), indent=1, allow_nan=False, ensure_ascii=False)
    text = re.sub("[\ud800-\udfff]", " ", text)  # halves of pairs of surrogates, which UTF-8 cannot hold
    write_file(path, f"{text}\n".encode())


def read_frozen(path: Path, kind: type[AnyFrozen], version: int, what: str) -> AnyFrozen | None:
    """What `write_frozen` has written; None if there is no such file.

    Raises RecordError, which names the file and says `what` was expected there, if it cannot be used.
    """
    try:
        content = read_json(path)
        found = content.get("format_version", version)
        if found == version:
            return kind.model_validate(content)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        why = "; ".join(f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors())
        raise RecordError(f"{path}: expected {what}, got a file that cannot be used: {why}") from error
    except (ValueError, AttributeError) as error:
        raise RecordError(f"{path}: expected {what}, got a file that cannot be read: {one_line(error)}") from error
    raise RecordError(f"{path}: expected format version {version}, got {found!r}; a newer hf-prune may read it")


_LOWER_IS_BETTER = ("loss", "perplexity", "wer", "cer", "mae", "mse", "rmse")


def lower_is_better(name: str) -> bool:
    """Whether lower values of a metric are better: a loss, `perplexity`, `wer`, `cer`, `mae`, `mse` or `rmse`."""
    return name in _LOWER_IS_BETTER or name.endswith("_loss")


def recovery(name: str, dense: float, pruned: float) -> float | None:
    """The share of a metric that the pruned model keeps: pruned / dense, or dense / pruned where lower is better.

    None where the quotient is meaningless: for a value that is zero, negative, NaN or infinite.
    """
    if not math.isfinite(dense) or not math.isfinite(pruned):
        return None
    if dense <= 0 or pruned < 0 or (pruned == 0 and lower_is_better(name)):
        return None
    return dense / pruned if lower_is_better(name) else pruned / dense
