"""The result of a run, and its record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, Trainer

from ..config.checks import is_number
from ..config.pruning import PruningConfig
from ..foreign.transformers import commit_of
from ..oneshot.pruned import Pruned
from ..publish.card import write_card
from ..publish.push import PushResult
from ..publish.record import (
    Cost,
    Evaluation,
    Generation,
    RunRecord,
    Source,
    describe_methods,
    recovery,
    save_record,
)
from ..publish.redact import without_paths, without_tokens
from ..publish.sources import describe_base
from ..saved.model import SavedModel
from ..saved.report import Report
from ..trainer.latency import measure_trainer
from ..trainer.recording import CardInput, record_of
from .data import source_of
from .names import resolve_name
from .one_shot import describe_calibration
from .prepare import Prepared
from .schema import Recipe
from .tasks import Scores, TextGeneration

Say = Callable[[str], None]


@dataclass
class AtOnce:
    """What is known of a model that is pruned at once, as the run goes on.

    Attributes:
        base: the metrics of the model before any training and pruning; None where it has new weights.
        dense_steps: for how many steps the dense run has trained.
        pruned: what was pruned.
        scores: the metrics of the pruned model before it is trained on; None if it is not.
    """

    base: Scores | None = None
    dense_steps: int | None = None
    pruned: Pruned | None = None
    scores: Scores | None = None


@dataclass(frozen=True)
class AllScores:
    """The metrics of all models of a run on the test split, and on the validation split where they were measured."""

    pruned: Scores
    dense: Scores | None
    run: AtOnce | None
    validation: dict[str, float] | None = None
    dense_validation: dict[str, float] | None = None

    @property
    def base(self) -> Scores | None:
        """Those of the model before training; None where it is the dense model."""
        return self.run.base if self.run is not None and self.run.base is not self.dense else None

    @property
    def at_once(self) -> Scores | None:
        """Those of the pruned model before it was trained on."""
        return self.run.scores if self.run is not None else None

    @property
    def of_validation(self) -> dict[str, dict[str, float] | None] | None:
        """Those on the validation split, by model; None if they were not measured."""
        return None if self.validation is None else {"dense": self.dense_validation, "pruned": self.validation}

    def of_group(self, group: str) -> dict[str, dict[str, float] | None]:
        """Those of a group of the test split, by model; of the models before training where they were measured."""
        found = {"dense": self.dense[group] if self.dense is not None else None, "pruned": self.pruned[group]}
        more = {"base": self.base, "at_once": self.at_once}
        return found | {model: scores[group] for model, scores in more.items() if scores is not None}


@dataclass(frozen=True)
class RunResult:
    """The result of a recipe: metrics on the test split, by name; `dense` is None without a dense run.

    `groups` has the same for each group of the test split; `generation` the texts that both models wrote; `costs` what
    a forward pass of both costs, on one sample and on several. `parameters` and `file_bytes` have the numbers of
    parameters and the sizes of the weight files of both models, `dense` and `pruned`; `vocabulary` their numbers of
    tokens, if the recipe has unused ones removed.

    `base` has the metrics of the model before any training, and `at_once` those of the pruned model before it was
    trained on, for recipes with a calibration; None where they are not measured, or are those of another.
    `validation` has the metrics of both models on the validation split, by model, in a sweep.
    """

    recipe: dict[str, Any]
    dense: dict[str, float] | None
    pruned: dict[str, float]
    groups: dict[str, dict[str, dict[str, float] | None]]
    generation: Generation | None
    report: Report
    main_metric: str
    test_samples: int
    seconds: dict[str, float]
    files: list[Path]
    costs: list[Cost]
    parameters: dict[str, int]
    file_bytes: dict[str, int]
    vocabulary: dict[str, int] = field(default_factory=dict)
    pushed: PushResult | None = None
    base: dict[str, float] | None = None
    at_once: dict[str, float] | None = None
    validation: dict[str, dict[str, float] | None] | None = None

    @property
    def recovery(self) -> float | None:
        """The share of the dense model's main metric that the pruned model keeps; None if it is undefined."""
        if not self.dense:
            return None
        return recovery(self.main_metric, self.dense[self.main_metric], self.pruned[self.main_metric])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "recipe": self.recipe,
            **({"base": _as_json(self.base)} if self.base is not None else {}),
            "dense": _as_json(self.dense),
            **({"at_once": _as_json(self.at_once)} if self.at_once is not None else {}),
            "pruned": _as_json(self.pruned),
            "groups": {group: _all_as_json(of_group) for group, of_group in self.groups.items()},
            **({"validation": _all_as_json(self.validation)} if self.validation is not None else {}),
            "generation": self.generation.model_dump() if self.generation is not None else None,
            "main_metric": self.main_metric,
            "recovery": self.recovery,
            "test_samples": self.test_samples,
            "prunable_sparsity": self.report.prunable_sparsity,
            "overall_sparsity": self.report.sparsity,
            "costs": [cost.model_dump() for cost in self.costs],
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "vocabulary": self.vocabulary,
            "seconds": self.seconds,
        }


def _all_as_json(metrics: Mapping[str, dict[str, float] | None]) -> dict[str, dict[str, float | None] | None]:
    """The metrics of several models, as `_as_json` gives them."""
    return {model: _as_json(values) for model, values in metrics.items()}


def _as_json(metrics: Mapping[str, float] | None) -> dict[str, float | None] | None:
    """Metrics with null in place of NaN and infinity, which JSON does not have."""
    if metrics is None:
        return None
    return {name: value if is_number(value) else None for name, value in metrics.items()}


def write_record(
    saved: SavedModel,
    prepared: Prepared,
    trainer: Trainer,
    target_sparsity: float,
    scores: AllScores,
    dense_model: PreTrainedModel | None,
    generation: Generation | None,
    say: Say,
) -> RunRecord:
    """Write the record and the card of the run beside the model that it saved; returns the record."""
    recipe, dense = prepared.recipe, scores.dense
    pruner = getattr(trainer, "pruner", None)
    if scores.run is not None and scores.run.pruned is not None:
        configs = [scores.run.pruned.config]
    else:
        configs = cast(Any, pruner).configs
    record = record_of(
        trainer,
        saved.hashes,
        configs=configs,
        target_sparsity=target_sparsity,
        kept_step=trainer.state.global_step,
        evaluated=[],
        costs=measure_trainer(trainer, dense_model),
        given=CardInput(model_name=Path(recipe.output_dir).resolve().name),
    )
    if record.distillation is not None and recipe.teacher is None:
        is_trained = recipe.dense is not None
        dense_run = Source(name="the dense run of the recipe" if is_trained else "the model before it was pruned")
        record = record.model_copy(
            update={"distillation": record.distillation.model_copy(update={"teacher": dense_run})}
        )
    if scores.run is not None:
        record = record.model_copy(update=_of_pruning(prepared, configs, target_sparsity, scores.run))
    evaluations = [
        evaluation_of(
            prepared,
            metrics,
            group=group,
            dense=dense[group] if dense is not None else None,
            base=scores.base[group] if scores.base is not None else None,
            at_once=scores.at_once[group] if scores.at_once is not None else None,
        )
        for group, metrics in scores.pruned.items()
    ]
    if scores.validation is not None:
        evaluations.append(evaluation_of(prepared, scores.validation, "validation", dense=scores.dense_validation))
    record = record.model_copy(
        update={
            "base_model": describe_model(prepared, say),
            "training_data": describe_data(prepared, "train") if record.steps or record.dense_steps else None,
            "evaluations": evaluations,
            "generation": generation,
            "removed_tokens": prepared.removed_tokens,
            "recipe": without_paths(without_tokens(as_written(recipe))),
        }
    )
    save_record(saved, record)
    write_card(saved)
    return record


def _of_pruning(
    prepared: Prepared, configs: Sequence[PruningConfig], target_sparsity: float, run: AtOnce
) -> dict[str, Any]:
    """What a record has of pruning at once, whether or not it was followed by training."""
    config = prepared.recipe.calibration_config
    assert config is not None
    assert run.pruned is not None
    source = describe_data(prepared, "train")
    return {
        "pruning": [config.to_dict() for config in configs],
        "methods": describe_methods(configs),
        "target_sparsity": target_sparsity,
        "dense_steps": run.dense_steps,
        "train_samples": len(prepared.data["train"]),
        "calibration": describe_calibration(run.pruned, config, source, isinstance(prepared.task, TextGeneration)),
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics without those that are NaN or infinite, as after a training that has diverged."""
    return {name: value for name, value in metrics.items() if is_number(value)}


def evaluation_of(
    prepared: Prepared,
    metrics: Mapping[str, float],
    part: str = "test",
    group: str = "",
    dense: Mapping[str, float] | None = None,
    base: Mapping[str, float] | None = None,
    at_once: Mapping[str, float] | None = None,
) -> Evaluation:
    """The evaluation on a split or a group of the rows of the test split, with the metrics of other models on it."""
    rows = len(prepared.data[part])
    return Evaluation(
        metrics=_finite(metrics),
        part=part,
        main_metric=next((name for name in list(metrics)[:1] if is_number(metrics[name])), None),
        not_finite=[name for name, value in metrics.items() if not is_number(value)],
        dense_metrics=_finite(dense) if dense is not None else None,
        base_metrics=_finite(base) if base is not None else None,
        at_once_metrics=_finite(at_once) if at_once is not None else None,
        samples=prepared.task.group_sizes.get(group, rows) if part == "test" else rows,
        dataset=_only(describe_data(prepared, part), prepared.recipe, group),
    )


def as_written(recipe: Recipe) -> dict[str, Any]:
    """The content of a file that gives this recipe."""
    content = recipe.model_dump(exclude_unset=True)
    return {key: value for key, value in content.items() if key != "distillation" or value is not None}


def _only(source: Source, recipe: Recipe, group: str) -> Source:
    """The source of a group of its rows."""
    if not group:
        return source
    taken = f"where {recipe.dataset.group_by} is {group}"
    return source.model_copy(update={"rows": f"{source.rows}, {taken}" if source.rows else taken})


def describe_model(prepared: Prepared, say: Say) -> Source | None:
    """The source of the base model; None for a new one."""
    section = prepared.recipe.model
    if section.name is None:
        return None
    path = resolve_name("model.name", section.name)
    source, problem = describe_base(path, section.base_model, commit_of(prepared.model.config))
    if problem is not None:
        say(f"The model card will state no license: {problem}")
    return source


def describe_data(prepared: Prepared, part: str) -> Source:
    """The source of a split: the data set, and in words which of its rows."""
    return source_of(prepared.recipe.dataset, prepared.data[part], part)
