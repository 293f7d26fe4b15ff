"""What is compared of a saved model: counted in its files, and measured with these weights."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from ..config.safe_json import read_object
from ..errors import CompareError
from ..publish.card import CARD_NAME
from ..publish.card_explained import PAGE_NAME, explained_in
from ..publish.explanation import Explanation
from ..publish.markdown import single_line
from ..publish.record import Cost, Evaluation, Hardware, PassCost, RunRecord, dense_beside, load_record
from ..publish.sparsity_json import count_figures
from ..saved.files import name_of
from ..saved.model import SavedModel

# Beside the folder `model` of a recipe's run.
_RESULTS_NAME = "results.json"

# In the folder of a sweep: what tells that it is one, and the folders of its points.
_SWEEP_NAME, _POINTS_NAME = "sweep.json", "points"

_NO_RECORD = "no record of measurements is beside it"


@dataclass(frozen=True)
class ComparedModel:
    """One model of a comparison.

    Attributes:
        name: how it is called here.
        folder: where it is saved; None for a dense model that only the records of others tell of.
        is_pruned: whether something was removed from it, or it has zeros where it may be pruned.
        sparsity: the share of the dense model's prunable weights that are zero or were removed; None if unknown.
        prunable_sparsity: the share of zeros in the prunable tensors that are left.
        overall_sparsity: the share of zeros in all tensors.
        parameters: how many parameters it has, zeros included.
        file_bytes: the size of its weight files.
        evaluations: its metrics; empty if nothing was measured with these weights.
        costs: what a forward pass costs, on one sample and on several.
        hardware: the machine that the costs were measured on.
        tokens_per_second: new tokens in a second, where texts were generated when the model was saved; None if not.
        explanation: what pruning changed in its answers, measured with these weights beside a dense model; None if
            that was not measured.
        notes: what is not known of it, and why.
    """

    name: str
    folder: Path | None
    is_pruned: bool
    sparsity: float | None = None
    prunable_sparsity: float | None = None
    overall_sparsity: float | None = None
    parameters: int | None = None
    file_bytes: int | None = None
    evaluations: tuple[Evaluation, ...] = ()
    costs: tuple[Cost, ...] = ()
    hardware: Hardware | None = None
    tokens_per_second: float | None = None
    explanation: Explanation | None = None
    notes: tuple[str, ...] = ()

    @property
    def card(self) -> Path | None:
        """Its model card, if it has one."""
        path = self.folder / CARD_NAME if self.folder is not None else None
        return path if path is not None and path.is_file() else None

    @property
    def explained_page(self) -> Path | None:
        """The page of its explanation, if it has one."""
        path = self.folder / PAGE_NAME if self.folder is not None and self.explanation is not None else None
        return path if path is not None and path.is_file() else None

    def cost_of(self, samples: int) -> PassCost | None:
        """What a forward pass on so many samples costs; None if it was not measured."""
        return next((cost.model for cost in self.costs if cost.samples == samples), None)

    def speedup(self, samples: int) -> float | None:
        """How many times as fast as the dense model, measured in turns with it; None if it was not measured."""
        return next((cost.speedup for cost in self.costs if cost.samples == samples), None)

    def milliseconds(self, samples: int) -> float | None:
        """The median time of a forward pass on so many samples; None if it was not measured."""
        cost = self.cost_of(samples)
        return 1000 * cost.seconds if cost is not None else None

    @property
    def megabytes(self) -> float | None:
        """The size of its weight files, in millions of bytes."""
        return self.file_bytes / 1e6 if self.file_bytes is not None else None


def read_models(folders: Sequence[str | os.PathLike]) -> list[ComparedModel]:
    """Read saved models, and add the dense models that their records tell of.

    A folder is one of a saved model, of a recipe's run, whose model is in `model/`, or of a sweep, which stands for its
    finished points. A dense model that was trained in the run of another has the measurements in that one's record, if
    it has none of its own. Raises CompareError for a folder that is none of these or given twice, ReportError and
    RecordError for files that cannot be used.
    """
    folders = [one for folder in folders for one in _points_of(folder)]
    saved = [_find(Path(folder)) for folder in folders]
    real = [os.path.realpath(model.folder) for model in saved]
    for index, path in enumerate(real):
        if path in real[:index]:
            raise CompareError(f"{os.fspath(folders[index])}: expected different models, got this one twice")
    names = [name_of(model.folder) for model in saved]
    read = [
        _read(model, single_line(name if names.count(name) == 1 else os.fspath(folder)))
        for model, name, folder in zip(saved, names, folders, strict=True)
    ]
    dense = [one for _, one, _ in read]
    trained = {os.path.realpath(at): one for _, one, at in read if one is not None and at is not None}
    models = [_with_record_of(one, trained.get(path)) for (one, _, _), path in zip(read, real, strict=True)]
    return [*_dense_of(models, dense), *models]


def _points_of(folder: str | os.PathLike) -> list[str | os.PathLike]:
    """The folders of the finished points of a sweep, if a folder is one; or else the folder itself."""
    if not Path(folder, _SWEEP_NAME).is_file():
        return [folder]
    found = sorted(path.parent for path in Path(folder, _POINTS_NAME).glob(f"*/{_RESULTS_NAME}"))
    if not found:
        raise CompareError(f"{os.fspath(folder)}: expected a sweep with a finished point, found none")
    return [*found]


def _with_record_of(model: ComparedModel, recorded: ComparedModel | None) -> ComparedModel:
    """A dense model without a record of its own with what the record of the model pruned from it says."""
    if recorded is None or model.is_pruned or _NO_RECORD not in model.notes:
        return model
    return replace(
        model,
        evaluations=recorded.evaluations,
        costs=recorded.costs,
        hardware=recorded.hardware,
        tokens_per_second=recorded.tokens_per_second,
        notes=tuple(note for note in model.notes if note != _NO_RECORD),
    )


def _find(folder: Path) -> SavedModel:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CompareError(f"{folder}: expected a folder with a saved model, found {found}")
    inner = folder / "model"
    saved = SavedModel(inner if not (folder / "config.json").exists() and inner.is_dir() else folder)
    saved.check_whole()
    return saved


def _read(saved: SavedModel, name: str) -> tuple[ComparedModel, ComparedModel | None, Path | None]:
    """A model, and the dense model that its record compares it with and where its run has saved that, if it has."""
    record = load_record(saved)
    notes = []
    if record is None:
        notes.append(_NO_RECORD)
    elif record.weights != saved.hashes:
        notes.append("its weights have changed since its record was written, so the measurements are not shown")
        record = None
    figures = count_figures(saved, record)
    if figures.note is not None:
        notes.append(figures.note)
    explained = explained_in(saved)
    model = ComparedModel(
        name=name,
        folder=saved.folder,
        is_pruned=figures.is_pruned,
        sparsity=figures.reached_sparsity,
        prunable_sparsity=figures.prunable_sparsity,
        overall_sparsity=figures.overall_sparsity,
        parameters=sum(tensor.weights for tensor in figures.tensors) or None,
        file_bytes=figures.file_bytes,
        evaluations=tuple(record.evaluations) if record is not None else (),
        costs=tuple(record.costs) if record is not None else (),
        hardware=record.hardware if record is not None else None,
        tokens_per_second=record.generation.tokens_per_second if record is not None and record.generation else None,
        explanation=explained.explanation if explained is not None and explained.explanation.dense_model else None,
        notes=tuple(notes),
    )
    if record is None:
        return model, None, None
    return model, _dense_from(record, saved.folder, name), dense_beside(saved.folder, record)


def _dense_from(record: RunRecord, folder: Path, name: str) -> ComparedModel | None:
    """The dense model that a record tells of: its metrics, and its costs and size where they are known."""
    evaluations = [_of_dense(one) for one in record.evaluations if one.dense_metrics]
    if not evaluations:
        return None
    results = read_object(folder.parent / _RESULTS_NAME) if folder.name == "model" else {}
    # Results of another run, or of one before this model was saved again, tell nothing of this one's dense model.
    fits = record.evaluation is not None and _without_nulls(results.get("pruned")) == record.evaluation.metrics
    return ComparedModel(
        name=f"dense model of {name}",
        folder=None,
        is_pruned=False,
        sparsity=0.0,
        parameters=_number(results, "parameters") if fits else None,
        file_bytes=_number(results, "file_bytes") if fits else None,
        evaluations=tuple(evaluations),
        costs=tuple(
            Cost(shapes=cost.shapes, passes=cost.passes, model=cost.dense)
            for cost in record.costs
            if cost.dense is not None and not cost.dense_is_new
        ),
        hardware=record.hardware,
        tokens_per_second=record.generation.dense_tokens_per_second if record.generation else None,
    )


def _of_dense(evaluation: Evaluation) -> Evaluation:
    metrics = evaluation.dense_metrics or {}
    name = evaluation.main_metric
    return Evaluation(
        metrics=metrics,
        main_metric=name if name in metrics else None,
        part=evaluation.part,
        samples=evaluation.samples,
        dataset=evaluation.dataset,
        given_in=evaluation.given_in,
    )


def _without_nulls(metrics: Any) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if value is not None} if isinstance(metrics, dict) else {}


def _number(results: Mapping[str, Any], name: str) -> int | None:
    values = results.get(name)
    value = values.get("dense") if isinstance(values, dict) else None
    return value if isinstance(value, int) else None


def _dense_of(models: Sequence[ComparedModel], found: Sequence[ComparedModel | None]) -> list[ComparedModel]:
    """The different dense models of records: one for those with the same metrics, none that is among the models."""
    there = {_fingerprint(model) for model in models if not model.is_pruned}
    by_metrics: dict[str, list[ComparedModel]] = {}
    for dense in found:
        if dense is not None and _fingerprint(dense) not in there:
            by_metrics.setdefault(_fingerprint(dense), []).append(dense)
    merged = [_merged(same) for same in by_metrics.values()]
    return [replace(merged[0], name="dense model")] if len(merged) == 1 and len(models) > 1 else merged


def _fingerprint(model: ComparedModel) -> str:
    """The metrics of the main evaluation: equal for the same weights."""
    first = model.evaluations[0] if model.evaluations else None
    return json.dumps(first.metrics if first is not None else model.name, sort_keys=True)


def _merged(same: Sequence[ComparedModel]) -> ComparedModel:
    """One dense model that several records tell of; its times and speeds are medians of those that were measured."""
    first = same[0]
    costs = []
    for cost in first.costs:
        others = [one.cost_of(cost.samples) for one in same]
        seconds = median(one.seconds for one in others if one is not None)
        costs.append(cost.model_copy(update={"model": cost.model.model_copy(update={"seconds": seconds})}))
    speeds = [one.tokens_per_second for one in same if one.tokens_per_second is not None]
    return replace(first, costs=tuple(costs), tokens_per_second=median(speeds) if speeds else None)
