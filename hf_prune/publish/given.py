"""What a model's author says for its card: the base model, metrics that were measured elsewhere, their data set."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.checks import is_number, is_real
from ..config.safe_json import read_json
from ..errors import CardError, one_line
from ..saved.model import SavedModel
from .logs import metrics_of, not_finite
from .record import Evaluation, RunRecord, describe_methods, load_record, save_record
from .sources import describe_base, describe_name
from .sparsity_json import check_weights
from .tasks import main_metric, task_of

# The prefixes of metrics in the files of example scripts, in the order in which they are reported.
_PARTS = ("eval", "test", "predict")

# What is in such files beside metrics: names with these prefixes, and these names.
_OF_TRAINING, _COUNTS = ("train_",), ("epoch", "total_flos", "step")


def read_metrics(file: str | os.PathLike, architecture: str | None) -> list[Evaluation]:
    """The metrics in a JSON file of name -> number, as the Trainer's `save_metrics` writes it, or a loop of one's own.

    Each prefix (`eval_`, `test_`, `predict_`) is an evaluation; a name without one belongs to the first of them.
    `architecture` is the model's class, which determines the main metric. Raises CardError for any other file.
    """
    values = _read_object(Path(file))
    found = [part for part in _PARTS if any(name.startswith(f"{part}_") for name in values)]
    parts: dict[str, dict[str, Any]] = {part: {} for part in found or [""]}
    for name, value in values.items():
        if name in _COUNTS or name.startswith(_OF_TRAINING):
            continue
        if not is_real(value):
            raise CardError("--metrics", f"{file}: expected a number as {name}, got {value!r}")
        part = next((part for part in found if name.startswith(f"{part}_")), None)
        first = next(iter(parts))
        parts[part or first][name if part else f"{first}_{name}"] = value
    made = [_evaluation(part, of_part, architecture, Path(file).name) for part, of_part in parts.items()]
    known = [one for one in made if one is not None]
    if not known:
        raise CardError("--metrics", f"{file}: expected at least one metric with a finite number, found none")
    return known


def _read_object(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file, finite=False)  # a metric may be NaN
    except (OSError, ValueError) as error:
        why = one_line(error)
        raise CardError("--metrics", f"{file}: expected JSON, got a file that cannot be read: {why}") from error
    if not isinstance(values, dict):
        raise CardError("--metrics", f"{file}: expected a JSON object of name -> number, got {type(values).__name__}")
    return values


def _evaluation(part: str, values: Mapping[str, Any], architecture: str | None, file: str) -> Evaluation | None:
    metrics = metrics_of(values, part)
    if not metrics:
        return None
    samples = values.get(f"{part}_samples")
    return Evaluation(
        metrics=metrics,
        main_metric=main_metric(task_of(architecture), metrics),
        part=part,
        given_in=file,
        not_finite=not_finite(values, part),
        samples=int(samples) if is_number(samples) else None,
    )


def add_to_record(
    folder: str | os.PathLike, base_model: str | None, evaluations: list[Evaluation], dataset: str | None
) -> str | None:
    """Add what the author says to the record of a saved model, or write one; returns why a license is unknown, or None.

    Evaluations replace those of the same data (`part`); `dataset` is the data set of these evaluations, or, without
    any, of all that the record has, or else of the training. Raises StaleRecordError, before anything is written, if
    the record belongs to other weights, CardError for an empty name, and as `load_record` does.
    """
    for option, name in (("--base-model", base_model), ("--dataset", dataset)):
        if name is not None and not name.strip():
            raise CardError(option, f"expected a name, got {name!r}")
    saved = SavedModel.of(folder)
    record = load_record(saved)
    check_weights(saved, record)
    if record is None:
        pruning = [config.to_dict() for config in saved.pruning_configs]
        record = RunRecord(
            name=saved.folder.resolve().name,
            pruning=pruning,
            methods=describe_methods(saved.pruning_configs),
            weights=saved.hashes,
        )
    problem = None
    changes: dict[str, Any] = {}
    if base_model is not None:
        source, problem = describe_base(base_model)
        others = {key: value for key, value in record.chosen.items() if key != "base_model"}
        chosen = others | ({"base_model": source.hub_name} if source.hub_name else {})
        changes |= {"base_model": source, "chosen": chosen}
    stated = evaluations or record.evaluations
    if dataset is not None:
        source = describe_name(dataset)
        stated = [one.model_copy(update={"dataset": source}) for one in stated]
        changes |= {} if stated else {"training_data": source}
    parts = {one.part for one in stated}
    changes["evaluations"] = [*stated, *(one for one in record.evaluations if one.part not in parts)]
    save_record(saved, record.model_copy(update=changes))
    return problem
