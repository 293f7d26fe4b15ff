"""The metadata of a model card, in its first lines: figures and the record of a run -> what the Hub reads."""

from typing import Any

from huggingface_hub import EvalResult

from ..foreign.huggingface_hub import eval_results_to_model_index
from .markdown import cleaned, single_line
from .record import Evaluation, RunRecord, Source
from .sparsity_json import Figures
from .tasks import HUB_TASKS, task_of


def generated_metadata(figures: Figures, record: RunRecord) -> dict[str, Any]:
    """The generated metadata of a card: what is known, and what the user chose."""
    task, base, evaluation = record.chosen.get("pipeline_tag"), record.base_model, record.evaluation
    task = task or task_of(figures.architecture)
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task if task in HUB_TASKS else None}
    if base is not None:
        found |= {"license": base.license, "language": base.languages or None}
        if base.hub_name:
            found |= {"base_model": base.hub_name, "base_model_relation": "finetune"}
    found["tags"] = [
        *("hf-prune", *(["pruned"] if figures.is_pruned else [])),
        *(*_method_tags(figures), *record.tags),
    ]
    sources = [record.training_data, *(one.dataset for one in record.evaluations)]
    names = [source.hub_name for source in sources if source is not None and source.hub_name]
    found["datasets"] = list(dict.fromkeys(names)) or None
    if evaluation is not None:
        found["metrics"] = [name for name in evaluation.metrics if name != "loss"] or None
    results = [result for one in record.evaluations if task is not None for result in _eval_results(task, one)]
    if results:
        # One value for a metric of a data set: that of the first evaluation, the main one.
        first: dict[tuple, EvalResult] = {}
        for result in results:
            first.setdefault((*result.unique_identifier, result.dataset_name, result.metric_type), result)
        found["model-index"] = eval_results_to_model_index(figures.model, list(first.values()))
    if record.emissions is not None:
        found["co2_eq_emissions"] = {
            "emissions": record.emissions.kilograms * 1000,
            "source": "codecarbon",
            "training_type": "fine-tuning",
        }
    return {key: cleaned(value) for key, value in (found | record.chosen).items() if value is not None}


def _eval_results(task: str, evaluation: Evaluation) -> list[EvalResult]:
    """Results for the `model-index`, which needs the name of a data set; none if there is a loss only."""
    dataset = evaluation.dataset or Source(name="Unknown", hub_name="unknown", split=evaluation.part or None)
    if all(name == "loss" or name.endswith("_loss") for name in evaluation.metrics):
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=single_line(dataset.hub_name or dataset.name),
            dataset_name=single_line(dataset.name),
            dataset_config=single_line(dataset.config) if dataset.config else None,
            dataset_split=single_line(dataset.split) if dataset.split else None,
            dataset_revision=single_line(dataset.revision) if dataset.revision else None,
            metric_type=single_line(name),
            metric_name=single_line(name),
            metric_value=round(value, 6),
        )
        for name, value in evaluation.metrics.items()
    ]


def _method_tags(figures: Figures) -> list[str]:
    """The patterns, where the counted zeros reach the target sparsity, and the methods; what was removed for units."""
    tags: dict[str, None] = {}
    for config in figures.pruning:
        if config.get("structure"):
            tags |= {"structured-pruning": None} if figures.removed is not None else {}
        elif figures.missed_target is None and config["pattern"] not in figures.missed_patterns:
            tags |= {config["pattern"].replace(":", "-") if "block" in config["pattern"] else config["pattern"]: None}
        tags |= {config["method"]: None}
    return list(tags)
