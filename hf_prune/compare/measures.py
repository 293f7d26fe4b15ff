"""Which metric models are compared by, on which data: one for all of them, or a refusal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CompareError, nearest
from ..publish.record import Evaluation, Source, lower_is_better
from .models import ComparedModel

VALIDATION = "validation"


@dataclass(frozen=True)
class Measure:
    """The metric that models are compared by.

    Attributes:
        name: of the metric.
        part: the name of the data: `validation`, `test`, or the Trainer's.
        data: what the data are, in words.
        samples: how many they are; None if that is unknown.
        tested: whether `part` is the validation split and the models were measured on a test split, too.
    """

    name: str
    part: str
    data: str
    samples: int | None
    tested: bool

    @property
    def lower_is_better(self) -> bool:
        """Whether lower values are better."""
        return lower_is_better(self.name)

    def value(self, model: ComparedModel) -> float | None:
        """The metric of a model on these data; None if it was not measured."""
        evaluation = evaluation_on(model, self.part)
        return evaluation.metrics.get(self.name) if evaluation is not None else None

    def test_value(self, model: ComparedModel) -> float | None:
        """The metric of a model on the test split, which has not chosen it; None if it was not measured."""
        evaluation = evaluation_on(model, "test") if self.tested else None
        return evaluation.metrics.get(self.name) if evaluation is not None else None

    def standard_error(self, value: float) -> float | None:
        """The standard error of an accuracy; None for other metrics."""
        if self.name != "accuracy" or not self.samples or not 0 <= value <= 1:
            return None
        return math.sqrt(value * (1 - value) / self.samples)


def evaluation_on(model: ComparedModel, part: str) -> Evaluation | None:
    """A model's first evaluation on data of this name: the one on all of its rows."""
    return next((one for one in model.evaluations if one.part == part), None)


def find_measure(models: Sequence[ComparedModel], metric: str | None = None) -> tuple[Measure | None, list[str]]:
    """The metric and the data that models are compared by, and notes; None if nothing was measured of any.

    The metric is `metric`, or the main one of all models. The data are those of the validation split if every model
    that was measured at all was measured on it, so that the test split chooses nothing; or else those of each model's
    main evaluation. Raises CompareError if models have different metrics or were measured on different data, those of
    the test split that are told beside it included.
    """
    measured = [model for model in models if model.evaluations]
    left_out = [model.name for model in models if not model.evaluations]
    notes = [f"Not measured, so counted only: {', '.join(left_out)}."] if left_out else []
    if not measured:
        if metric is not None:
            raise CompareError("--metric", f"expected a metric that was measured, got {metric!r}; no model has any")
        return None, notes
    validated = all(evaluation_on(model, VALIDATION) is not None for model in measured)
    chosen = [(evaluation_on(model, VALIDATION) if validated else None) or model.evaluations[0] for model in measured]
    name = _metric(measured, chosen, metric)
    _refuse_different_data(measured, chosen)
    first = chosen[0]
    if first.dataset is None:
        notes.append(
            f"The names of the data ({first.part}) are not in the records: whether all models were measured on the "
            "same is not checked."
        )
    on_test = [one for model in measured if (one := evaluation_on(model, "test")) is not None]
    tested = validated and len(on_test) == len(measured)
    if tested:
        _refuse_different_data(measured, on_test)
    return Measure(name, first.part, _words(_data_of(first)), first.samples, tested), notes


def _refuse_different_data(models: Sequence[ComparedModel], evaluations: Sequence[Evaluation]) -> None:
    """Raise CompareError if one evaluation of each model is not on the same data for all."""
    kinds: dict[tuple, list[str]] = {}
    for model, evaluation in zip(models, evaluations, strict=True):
        kinds.setdefault(_data_of(evaluation), []).append(model.name)
    if len(kinds) > 1:
        lines = [f"{', '.join(names)}: {_words(kind)}" for kind, names in kinds.items()]
        raise CompareError(
            "expected models that were measured on the same data, got "
            + "; ".join(lines)
            + ". Compare those of one kind, or evaluate all on the same data"
        )


def _metric(models: Sequence[ComparedModel], evaluations: Sequence[Evaluation], metric: str | None) -> str:
    """The metric that all have. Raises CompareError if there is none."""
    pairs = list(zip(models, evaluations, strict=True))
    if metric is None:
        names = {one.main_metric: model.name for model, one in reversed(pairs) if one.main_metric is not None}
        if len(names) != 1:
            got = "; ".join(f"{of}: {name}" for name, of in reversed(names.items())) or "none"
            raise CompareError(f"expected models with the same main metric, got {got}. Name one with --metric")
        return next(iter(names))
    for model, one in pairs:
        if metric not in (*one.metrics, *one.not_finite):
            has = ", ".join(one.metrics) or "none"
            raise CompareError("--metric", f"{model.name} has {has}, got {metric!r}{nearest(metric, one.metrics)}")
    return metric


def _data_of(evaluation: Evaluation) -> tuple:
    """What tells data apart: part, number of rows, and where they come from."""
    source = evaluation.dataset
    known = (source.name, source.hub_name, source.revision, source.config, source.split, source.rows) if source else ()
    return (evaluation.part, evaluation.samples, _described(source) if source is not None else "", *known)


def _described(source: Source) -> str:
    """A data set in plain text, with its configuration, split and rows."""
    config = f"configuration {source.config}" if source.config else ""
    split = f"split {source.split}" if source.split else ""
    return ", ".join(filter(None, (source.hub_name or source.name, config, split, source.rows)))


def _words(kind: tuple) -> str:
    part, samples, described_as, *_ = kind
    rows = f"{samples:,} samples" if samples is not None else "samples of unknown number"
    return f"{rows} of {described_as} ({part})" if described_as else f"{rows} ({part})"
