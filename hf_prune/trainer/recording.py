"""What a Trainer knows of its run -> the record of the run."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..config.pruning import PruningConfig
from ..errors import CardError
from ..foreign.transformers import commit_of
from ..model.names import plain_model
from ..publish.logs import changed_arguments, metrics_of, not_finite, thin_history
from ..publish.measure import emissions_of, hardware, versions
from ..publish.record import Distillation, Evaluation, Latency, RunRecord, Source
from ..publish.sources import describe_base, describe_dataset, is_hub_name
from ..saved.files import SavedFile
from .distilling import DistillingMixin


@dataclass(frozen=True)
class MeasuredEvaluation:
    """What one evaluation measured: of which weights (their digest), with which prefix, and on what, if known."""

    digest: str
    prefix: str
    values: dict[str, Any]
    samples: int | None
    dataset: Any


@dataclass(frozen=True)
class CardInput:
    """What a person says of a model, beyond what the Trainer knows; the arguments of `Trainer.create_model_card`.

    `dataset_tags` are names of data sets on the Hub, `dataset` how to call them, `dense_metrics` the metrics that the
    dense model had on the same data, as `evaluate` returned them.
    """

    model_name: str | None = None
    license: str | None = None
    language: str | list[str] | None = None
    tags: str | list[str] | None = None
    tasks: str | list[str] | None = None
    finetuned_from: str | None = None
    dataset: str | list[str] | None = None
    dataset_tags: str | list[str] | None = None
    dataset_args: str | list[str] | None = None
    dense_metrics: Mapping[str, float] | None = None

    @property
    def chosen(self) -> dict[str, Any]:
        """What goes into the card's metadata as it was given."""
        values = {"license": self.license, "language": _as_list(self.language), "pipeline_tag": _first(self.tasks)}
        return {name: value for name, value in values.items() if value}


def said_in(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a person says of a model in the arguments of a class's `create_model_card`, or by the names of `CardInput`.

    What such a class takes without a name of its own (`**kwargs`) says nothing. Raises TypeError for other arguments.
    """
    known = {field.name for field in fields(CardInput)} - signature.parameters.keys()
    said = {name: value for name, value in kwargs.items() if name in known}
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in known}).arguments
    named = {
        name: value
        for name, value in bound.items()
        if signature.parameters[name].kind is not inspect.Parameter.VAR_KEYWORD
    }
    return said | named


def record_of(
    trainer: Trainer,
    weights: dict[str, SavedFile],
    configs: Sequence[PruningConfig],
    target_sparsity: float | None,
    kept_step: int,
    evaluated: Sequence[MeasuredEvaluation],
    latency: Latency | None,
    given: CardInput,
) -> RunRecord:
    """The record of a Trainer's run, for the weights after `kept_step`, which it has saved in the files `weights`.

    Of a Trainer that did not train, it says nothing of training and pruning.
    """
    record = RunRecord(
        name=given.model_name or Path(str(trainer.args.output_dir)).resolve().name,
        chosen=given.chosen,
        tags=list(dict.fromkeys([*_as_list(given.tags), *_tags_of(trainer)])),
        base_model=_base_model(trainer, given),
        evaluations=make_evaluations(evaluated, given, trainer.args.metric_for_best_model),
        latency=latency,
        hardware=hardware(trainer.args.device, trainer.args.world_size),
        versions=versions(),
        weights=weights,
    )
    if trainer.state.global_step == 0:
        return record
    dataset = trainer.train_dataset
    return record.model_copy(
        update={
            "pruning": [config.to_dict() for config in configs],
            "target_sparsity": target_sparsity,
            "distillation": _distillation(trainer),
            "steps": trainer.state.global_step,
            "kept_step": kept_step,
            "epochs": trainer.state.epoch,
            "train_samples": len(dataset) if dataset is not None and hasattr(dataset, "__len__") else None,
            "training_data": describe_dataset(dataset),
            "training_arguments": changed_arguments(trainer.args),
            "seed": trainer.args.seed,
            "history": thin_history(trainer.state.log_history),
            "emissions": emissions_of(trainer.callback_handler.callbacks),
        }
    )


def _base_model(trainer: Trainer, given: CardInput) -> Source | None:
    config = getattr(trainer.accelerator.unwrap_model(trainer.model), "config", None)
    name_or_path = getattr(config, "name_or_path", None) or given.finetuned_from
    if not name_or_path:
        return None
    revision = commit_of(config)
    return describe_base(name_or_path, given.finetuned_from, revision)[0]


def _distillation(trainer: Trainer) -> Distillation | None:
    """How a Trainer distilled, and from which model: by the name it was opened with, or what it was made from."""
    if not isinstance(trainer, DistillingMixin) or trainer.teacher is None or trainer.distillation is None:
        return None
    of_teacher = getattr(plain_model(trainer.teacher), "config", None)
    known = getattr(of_teacher, "name_or_path", None)
    source = describe_base(known, None, commit_of(of_teacher))[0] if known else None
    opened = trainer.teacher_name is not None
    return Distillation(
        teacher=source if opened else None, teacher_base=None if opened else source, **trainer.distillation.to_dict()
    )


def _tags_of(trainer: Trainer) -> list[str]:
    """The tags that were put on a model (`add_model_tags`), by a Trainer class for one."""
    return _as_list(getattr(trainer.accelerator.unwrap_model(trainer.model), "model_tags", None))


def make_evaluations(evaluated: Sequence[MeasuredEvaluation], given: CardInput, wanted: str | None) -> list[Evaluation]:
    """The last evaluation with each prefix: `eval` first, none of the training data.

    `wanted` is the metric that counts most, where it is there. Raises CardError for dense metrics that are not among
    those of any evaluation.
    """
    with_metrics = [one for one in evaluated if metrics_of(one.values, one.prefix)]
    last = {one.prefix: one for one in with_metrics if not one.prefix.startswith("train")}
    made = [_evaluation(last[prefix], given, wanted) for prefix in sorted(last, key=lambda prefix: prefix != "eval")]
    if made and given.dense_metrics is not None and not any(one.dense_metrics for one in made):
        expected = ", ".join(f"{one.part}_{name}" for one in made for name in one.metrics)
        came = ", ".join(given.dense_metrics) or "none"
        raise CardError("dense_metrics", f"expected values of {expected}, as evaluate() returns them, got {came}")
    return made


def _evaluation(one: MeasuredEvaluation, given: CardInput, wanted: str | None) -> Evaluation:
    metrics = metrics_of(one.values, one.prefix)
    dense = given.dense_metrics or {}
    unprefixed = {f"{one.prefix}_{name}": value for name, value in dense.items()}
    dense_metrics = metrics_of(unprefixed, one.prefix) | metrics_of(dense, one.prefix)
    main = (wanted or "").removeprefix(f"{one.prefix}_").removeprefix("eval_")
    others = [name for name in metrics if name != "loss"]
    return Evaluation(
        metrics=metrics,
        main_metric=main if main in metrics else (others or list(metrics))[0],
        part=one.prefix,
        not_finite=not_finite(one.values, one.prefix),
        dense_metrics={name: dense_metrics[name] for name in metrics if name in dense_metrics} or None,
        samples=one.samples,
        dataset=_dataset(one.dataset, given),
    )


def _dataset(dataset: Any, given: CardInput) -> Source | None:
    """The data set that was evaluated on, as it was given, or else as it knows itself."""
    hub_name, name = _first(given.dataset_tags), _first(given.dataset)
    known = describe_dataset(dataset)
    if hub_name is None and name is None:
        return known
    split = str(dataset.split) if getattr(dataset, "split", None) is not None else None
    return Source(
        name=str(name or hub_name),
        hub_name=hub_name if is_hub_name(hub_name) else None,
        revision=known.revision if known is not None and known.hub_name == hub_name else None,
        config=_first(given.dataset_args),
        split=split,
    )


def _as_list(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)


def _first(value: str | Sequence[str] | None) -> str | None:
    return next(iter(_as_list(value)), None)
