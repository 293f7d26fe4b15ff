"""What a Trainer knows of its run -> the record of the run."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .config import PruningConfig
from .describe import (
    changed_arguments,
    describe_base,
    describe_dataset,
    emissions_of,
    hardware,
    input_shapes,
    is_hub_name,
    measure_latency,
    metrics_of,
    thin_history,
    versions,
)
from .record import Evaluation, Latency, RunRecord, Source, saved_files
from .report import weight_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluated:
    """Metrics of the weights after `step` of the `training`-th call of `train`."""

    training: int
    step: int
    metrics: dict[str, float]
    samples: int | None = None
    dataset: Any = None


@dataclass(frozen=True)
class Given:
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


def record_of(
    trainer: Trainer,
    folder: str | Path,
    configs: Sequence[PruningConfig],
    target_sparsity: float | None,
    step: int,
    evaluated: Evaluated | None,
    latency: Latency | None,
    given: Given,
) -> RunRecord:
    """The record of a Trainer's run, for the weights after `step` that it has saved into a folder."""
    args = trainer.args
    dataset = trainer.train_dataset
    return RunRecord(
        name=given.model_name or Path(folder).resolve().name,
        chosen=given.chosen,
        tags=_as_list(given.tags),
        base_model=_base_model(trainer, given),
        pruning=[config.to_dict() for config in configs],
        target_sparsity=target_sparsity,
        steps=step,
        epochs=trainer.state.epoch,
        train_samples=len(dataset) if dataset is not None and hasattr(dataset, "__len__") else None,
        training_arguments=changed_arguments(args),
        seed=args.seed,
        history=thin_history(trainer.state.log_history),
        evaluation=_evaluation(trainer, evaluated, given),
        latency=latency,
        hardware=hardware(args.device, args.world_size),
        emissions=emissions_of(trainer.callback_handler.callbacks),
        versions=versions(),
        weights=saved_files(weight_files(Path(folder))),
    )


def _base_model(trainer: Trainer, given: Given) -> Source | None:
    config = getattr(trainer.accelerator.unwrap_model(trainer.model), "config", None)
    name_or_path = getattr(config, "_name_or_path", None) or given.finetuned_from
    if not name_or_path:
        return None
    revision = getattr(config, "_commit_hash", None)
    source, problem = describe_base(name_or_path, given.finetuned_from, revision)
    if problem is not None and given.license is None:
        logger.warning("The card says nothing of a license: %s. Give one, license=..., or write it there.", problem)
    return source


def _evaluation(trainer: Trainer, evaluated: Evaluated | None, given: Given) -> Evaluation | None:
    if evaluated is None or not evaluated.metrics:
        return None
    metrics = evaluated.metrics
    wanted = (trainer.args.metric_for_best_model or "").removeprefix("eval_")
    not_loss = [name for name in metrics if name != "loss"]
    dense = None
    if given.dense_metrics is not None:
        plain = {name.removeprefix("eval_").removeprefix("test_"): value for name, value in given.dense_metrics.items()}
        known = metrics_of({f"eval_{name}": value for name, value in plain.items()})
        dense = {name: value for name, value in known.items() if name in metrics}
        if not dense:
            raise ValueError(
                f"dense_metrics: expected values of {', '.join(metrics)}, got {', '.join(plain) or 'none'}"
            )
    return Evaluation(
        metrics=metrics,
        main_metric=wanted if wanted in metrics else (not_loss or list(metrics))[0],
        dense_metrics=dense,
        samples=evaluated.samples,
        dataset=_dataset(evaluated.dataset, given),
    )


def _dataset(dataset: Any, given: Given) -> Source | None:
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


def measure_trainer(trainer: Trainer, dense: nn.Module | None = None) -> Latency | None:
    """The latency of a Trainer's evaluation step on the first sample that it evaluates on; None where it has none.

    A dense model to compare with takes turns with the Trainer's own.
    """
    dataset: Any = trainer.eval_dataset
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
        return None
    if not len(dataset) or trainer.args.world_size > 1:
        return None
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator, description="Evaluation")
    batch = trainer._prepare_inputs(collator([dataset[0]]))
    assert trainer.model is not None  # Trainer.__init__ has made sure
    models = [trainer.model] if dense is None else [trainer.model, dense.to(trainer.args.device)]
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.random.fork_rng():
            forwards = [partial(trainer.prediction_step, model, batch, True) for model in models]
            seconds, passes = measure_latency(forwards)
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    shapes = input_shapes(batch)
    return Latency(
        shapes=shapes, passes=passes, seconds=seconds[0], dense_seconds=seconds[1] if dense is not None else None
    )
