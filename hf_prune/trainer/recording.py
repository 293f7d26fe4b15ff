"""`record_of`: the record of a run, from what a Trainer knows."""

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
from ..publish.logs import MeasuredEvaluation, changed_arguments, metrics_of, not_finite, thin_history
from ..publish.measure import emissions_of, hardware, versions
from ..publish.record import Cost, Distillation, Evaluation, RunRecord, Source, describe_methods
from ..publish.sources import describe_base, describe_dataset, is_hub_name, shown_name
from ..publish.tasks import HUB_TASKS, main_metric, task_of
from ..saved.files import SavedFile
from .distilling import DistillingMixin


@dataclass(frozen=True)
class CardInput:
    """What the user says about a model: the arguments of `Trainer.create_model_card`, and `dense_metrics`.

    `dataset_tags` are names of data sets on the Hub, `dataset` their display names, `dense_metrics` the metrics of the
    dense model on the same data, as `evaluate` returned them.
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
        """What goes unchanged into the card's metadata: as `pipeline_tag` the first of the tasks that the Hub has."""
        task = next((task for task in _as_list(self.tasks) if task in HUB_TASKS), None)
        values = {"license": self.license, "language": _as_list(self.language), "pipeline_tag": task}
        return {name: value for name, value in values.items() if value}


def said_in(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The values for `CardInput` in the arguments of a class's `create_model_card`, or by the names of its fields.

    What such a class takes as `**kwargs` is ignored. Raises TypeError for other arguments.
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
    costs: Sequence[Cost],
    given: CardInput,
) -> RunRecord:
    """The record of a Trainer's run, for the weights after step `kept_step`, saved in the files `weights`.

    If the Trainer has not trained, the record has nothing about training and pruning.
    """
    record = RunRecord(
        name=given.model_name or Path(str(trainer.args.output_dir)).resolve().name,
        chosen=given.chosen,
        tags=list(dict.fromkeys([*_as_list(given.tags), *_tags_of(trainer)])),
        base_model=_base_model(trainer, given),
        evaluations=make_evaluations(evaluated, given, _task(trainer, given), trainer.args.metric_for_best_model),
        costs=list(costs),
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
            "methods": describe_methods(configs),
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


def _task(trainer: Trainer, given: CardInput) -> str | None:
    """The task of a Trainer's model: as chosen, or else that of its class."""
    chosen: str | None = given.chosen.get("pipeline_tag")
    return chosen or task_of(type(trainer.accelerator.unwrap_model(trainer.model)).__name__.removeprefix("FSDP"))


def _distillation(trainer: Trainer) -> Distillation | None:
    """How a Trainer distilled, and from which model: its name, or for a given model object that of its base."""
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
    """The tags of a model (`add_model_tags`), such as a Trainer class adds."""
    return _as_list(getattr(trainer.accelerator.unwrap_model(trainer.model), "model_tags", None))


def make_evaluations(
    evaluated: Sequence[MeasuredEvaluation], given: CardInput, task: str | None, wanted: str | None
) -> list[Evaluation]:
    """The last evaluation with each prefix, `eval` first, except those on training data.

    `wanted` is the metric that the best model was chosen by. Raises CardError if `dense_metrics` has no metric of any
    evaluation.
    """
    with_metrics = [one for one in evaluated if metrics_of(one.values, one.prefix)]
    last = {one.prefix: one for one in with_metrics if not one.prefix.startswith("train")}
    prefixes = sorted(last, key=lambda prefix: prefix != "eval")
    made = [_evaluation(last[prefix], given, task, wanted) for prefix in prefixes]
    if made and given.dense_metrics is not None and not any(one.dense_metrics for one in made):
        expected = ", ".join(f"{one.part}_{name}" for one in made for name in one.metrics)
        came = ", ".join(given.dense_metrics) or "none"
        raise CardError("dense_metrics", f"expected values of {expected}, as evaluate() returns them, got {came}")
    return made


def _evaluation(one: MeasuredEvaluation, given: CardInput, task: str | None, wanted: str | None) -> Evaluation:
    metrics = metrics_of(one.values, one.prefix)
    dense = given.dense_metrics or {}
    unprefixed = {f"{one.prefix}_{name}": value for name, value in dense.items()}
    dense_metrics = metrics_of(unprefixed, one.prefix) | metrics_of(dense, one.prefix)
    return Evaluation(
        metrics=metrics,
        main_metric=main_metric(task, metrics, (wanted or "").removeprefix(f"{one.prefix}_").removeprefix("eval_")),
        part=one.prefix,
        not_finite=not_finite(one.values, one.prefix),
        dense_metrics={name: dense_metrics[name] for name in metrics if name in dense_metrics} or None,
        samples=one.samples,
        dataset=_dataset(one.dataset, given),
    )


def _dataset(dataset: Any, given: CardInput) -> Source | None:
    """The evaluation data set, as the user described it, or else from its own metadata."""
    hub_name, name = _first(given.dataset_tags), _first(given.dataset)
    known = describe_dataset(dataset)
    if hub_name is None and name is None:
        return known
    split = str(dataset.split) if getattr(dataset, "split", None) is not None else None
    return Source(
        name=shown_name(str(name or hub_name)),
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
