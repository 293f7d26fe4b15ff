"""A whole comparison: models, the metric they are compared by, fronts and the best; plain values for JSON."""

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..publish.record import Hardware
from .measures import VALIDATION, Measure, find_measure
from .models import ComparedModel
from .pareto import Axis, Choice, Limits, axes_of, choose, pareto_front

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Comparison:
    """Models side by side.

    Attributes:
        title: what is compared.
        models: all models, dense ones first.
        measure: the metric and its data; None if nothing was measured.
        axes: what the metric is traded for.
        limits: what the best must keep to.
        choice: the best, or the closest to the limits.
        notes: what to know of the figures.
        failed: runs of a sweep that have failed: name -> error.
        command: the command that makes this comparison again.
    """

    title: str
    models: tuple[ComparedModel, ...]
    measure: Measure | None
    axes: tuple[Axis, ...]
    limits: Limits
    choice: Choice
    notes: tuple[str, ...]
    failed: dict[str, str]
    command: str

    def front(self, axis: Axis) -> list[ComparedModel]:
        """The models that no other beats in the metric and on an axis, in the order of the axis from its best on."""
        measure = self.measure
        if measure is None:
            return []
        points = [
            (x, y, model)
            for model in self.models
            if (x := axis.value(model)) is not None and (y := measure.value(model)) is not None
        ]
        at = pareto_front([point[:2] for point in points], axis.lower_is_better, measure.lower_is_better)
        return [points[index][2] for index in at]

    @property
    def verdict(self) -> list[str]:
        """The best model within the limits in sentences, or that there is none and which comes closest."""
        measure, limits = self.measure, self.limits.words
        if measure is None:
            return ["No metric was measured of any of these models, so none is the best."]
        best, closest = self.choice.best, self.choice.closest
        if best is not None:
            return [
                f"Best {measure.name}{f' with {limits}' if limits else ''}: {best.name}, {self._reached(best)}.",
                *self._caveats(best),
            ]
        if closest is not None:
            return [f"No model has {limits}. The closest is {closest.name}, {self._reached(closest)}."]
        if limits and any(model.is_pruned and measure.value(model) is not None for model in self.models):
            return [f"No model is known to have {limits}: it was not measured with these weights."]
        return ["There is no pruned model among those that were measured."]

    def _reached(self, model: ComparedModel) -> str:
        assert self.measure is not None
        parts = [f"{self.measure.name} {figure(self.measure.value(model))} on {self.measure.data}"]
        if self.measure.tested:
            parts.append(f"{figure(self.measure.test_value(model))} on the test split, which chose nothing")
        parts += [f"{axis.words}: {shown(axis, model)}" for axis in self.axes if axis.value(model) is not None]
        return "; ".join(parts)

    def _caveats(self, best: ComparedModel) -> list[str]:
        """What stands against the choice: noise, and data that chose it and that it is measured on."""
        measure = self.measure
        assert measure is not None
        value = measure.value(best)
        assert value is not None
        error = measure.standard_error(value)
        found = []
        if measure.part != VALIDATION and self.choice.candidates > 1:
            found.append(
                f"It was chosen among {self.choice.candidates} by the same data that its metric is from, so the metric "
                "is a little better than it will be on new data."
            )
        if error is not None:
            others = [
                model.name
                for model in self.models
                if model is not best
                and model.is_pruned
                and self.limits.excess(model) == 0
                and (other := measure.value(model)) is not None
                and abs(other - value) <= error
            ]
            among = f"; {len(others)} other pruned models are within it" if len(others) > 1 else ""
            among = f"; {others[0]} is within it" if len(others) == 1 else among
            found.append(f"The standard error of this accuracy is {100 * error:.1f} points{among}.")
        return found

    def push_command(self, run_in: Path | None = None) -> str | None:
        """The command that pushes the best model; None if there is none.

        It is run where the comparison was, or in the folder `run_in`.
        """
        best = self.choice.best
        if best is None or best.folder is None:
            return None
        folder = os.fspath(best.folder) if run_in is None else Path(os.path.relpath(best.folder, run_in)).as_posix()
        return f"hf-prune push {shlex.quote(folder)} USER/NAME"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        measure, best, closest = self.measure, self.choice.best, self.choice.closest
        return {
            "format_version": FORMAT_VERSION,
            "title": self.title,
            "command": self.command,
            "metric": measure.name if measure is not None else None,
            "lower_is_better": measure.lower_is_better if measure is not None else None,
            "part": measure.part if measure is not None else None,
            "data": measure.data if measure is not None else None,
            "samples": measure.samples if measure is not None else None,
            "limits": {name: value for name, value in vars(self.limits).items() if value is not None},
            "best": best.name if best is not None else None,
            "closest": closest.name if closest is not None else None,
            "verdict": self.verdict,
            "push": self.push_command(),
            "notes": list(self.notes),
            "failed": self.failed,
            "models": [self._row(model) for model in self.models],
            "fronts": {axis.key: [model.name for model in self.front(axis)] for axis in self.axes},
        }

    def _row(self, model: ComparedModel) -> dict[str, Any]:
        measure = self.measure
        return {
            "name": model.name,
            "folder": os.fspath(model.folder) if model.folder is not None else None,
            "is_pruned": model.is_pruned,
            "value": measure.value(model) if measure is not None else None,
            "test_value": measure.test_value(model) if measure is not None else None,
            "sparsity": model.sparsity,
            "prunable_sparsity": model.prunable_sparsity,
            "overall_sparsity": model.overall_sparsity,
            "parameters": model.parameters,
            "file_bytes": model.file_bytes,
            "speedup": model.speedup(1),
            "tokens_per_second": model.tokens_per_second,
            "changed_answers": _changed_answers(model),
            "costs": [cost.model_dump() for cost in model.costs],
            "hardware": model.hardware.model_dump() if model.hardware is not None else None,
            "evaluations": [one.model_dump() for one in model.evaluations],
            "notes": list(model.notes),
        }


def compare_models(
    models: Sequence[ComparedModel],
    *,
    metric: str | None = None,
    limits: Limits | None = None,
    title: str = "Comparison",
    command: str = "",
    failed: dict[str, str] | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare models by a metric and choose the best within limits. Raises CompareError, see `find_measure`."""
    limits = limits if limits is not None else Limits()
    measure, found = find_measure(models, metric)
    ordered = tuple(sorted(models, key=lambda model: model.is_pruned))
    return Comparison(
        title=title,
        models=ordered,
        measure=measure,
        axes=tuple(axes_of(ordered)),
        limits=limits,
        choice=choose(ordered, measure, limits),
        notes=(
            *notes,
            *_measured_how(measure),
            *found,
            *_timed_how(ordered),
            *_explained_how(ordered),
            *_of_models(ordered),
        ),
        failed=failed or {},
        command=command,
    )


def _measured_how(measure: Measure | None) -> list[str]:
    if measure is None:
        return []
    chosen = f"Models are compared by {measure.name} on {measure.data}."
    if measure.tested:
        chosen += " This split chose the best; the test split chose nothing."
    return [chosen]


def _timed_how(models: Sequence[ComparedModel]) -> list[str]:
    """On which machine times were measured, and that they cannot be compared if it was not one machine and length."""
    timed = [model for model in models if model.costs]
    if not timed:
        return []
    machines: dict[str, list[str]] = {}
    for model in timed:
        machines.setdefault(_machine(model.hardware), []).append(model.name)
    notes = [f"Times are medians of forward passes on {next(iter(machines))}."]
    if len(machines) > 1:
        where = "; ".join(f"{', '.join(names)}: {machine}" for machine, names in machines.items())
        notes = [f"Times were measured on different machines and cannot be compared: {where}."]
    lengths = {tuple(sorted((name, *shape[1:]) for name, shape in model.costs[0].shapes.items())) for model in timed}
    if len(lengths) > 1:
        notes.append("Times were measured on inputs of different shapes, so they cannot be compared.")
    notes.append("They were taken when each model was saved, so what else the machine did then shows in them.")
    notes += _unsteady(timed)
    if any(model.tokens_per_second is not None for model in models):
        notes.append("Tokens a second are those of the texts in the card, generated one after another.")
    if any(model.speedup(1) is not None for model in models):
        notes.append("Speed is that of one sample beside the dense model, measured in turns with it.")
    return notes


# How many times the first quartile of times the third may be, before a machine counts as busy with something else.
_STEADY = 1.5


def _unsteady(models: Sequence[ComparedModel]) -> list[str]:
    """A warning of models whose times differ much from pass to pass."""
    names = [
        model.name
        for model in models
        if any(one.model.quartiles and one.model.quartiles[1] > _STEADY * one.model.quartiles[0] for one in model.costs)
    ]
    if not names:
        return []
    return [
        f"The times of {', '.join(names)} differ much from pass to pass (see the quartiles in brackets): the machine "
        "was busy with something else, so do not choose by them."
    ]


def _changed_answers(model: ComparedModel) -> dict[str, Any] | None:
    """The shares of answers that changed and of those from right to wrong, and beside what; None if it is unknown."""
    explanation = model.explanation
    if explanation is None or explanation.answers.agreement is None:
        return None
    to_wrong = explanation.answers.to_wrong
    return {
        "changed": 1 - explanation.answers.agreement.value,
        "right_to_wrong": to_wrong.value if to_wrong is not None else None,
        "dense_model": explanation.dense_model,
        "samples": explanation.samples,
    }


def _explained_how(models: Sequence[ComparedModel]) -> list[str]:
    """Beside which dense model and on which data answers were compared: what columns of changed answers are of."""
    names: dict[str, list[str]] = {}
    for model in models:
        found = model.explanation
        if found is not None and _changed_answers(model) is not None:
            how = f"on {found.samples:,} samples of {found.data.name} beside {found.dense_model}"
            names.setdefault(how, []).append(model.name)
    if not names:
        return []
    told = [f"{', '.join(some)} {how}" if len(names) > 1 else how for how, some in names.items()]
    share = "Changed answers are the share that differs from the dense model's, as hf-prune explain has measured"
    return [f"{share}: {'; '.join(told)}."]


def _machine(hardware: Hardware | None) -> str:
    if hardware is None:
        return "an unknown machine"
    threads = "1 thread" if hardware.threads == 1 else f"{hardware.threads} threads"
    return hardware.accelerator or f"{hardware.processor} with {threads}"


def _of_models(models: Sequence[ComparedModel]) -> list[str]:
    return [f"{model.name}: {note}." for model in models for note in model.notes]


def figure(value: float | None) -> str:
    """A metric with four decimals, or four digits where that would show next to nothing."""
    if value is None:
        return "–"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.4g}"


def shown(axis: Axis, model: ComparedModel) -> str:
    """The value of a model on an axis."""
    value = axis.value(model)
    if value is None:
        return "–"
    return f"{value:.1%}" if axis.is_share else _digits(value)


def shown_with_spread(axis: Axis, model: ComparedModel) -> str:
    """The value of a model on an axis; of a time with the first and the third quartile."""
    cost = model.cost_of(axis.samples) if axis.samples is not None else None
    if cost is None or cost.quartiles is None:
        return shown(axis, model)
    low, high = (_digits(1000 * seconds) for seconds in cost.quartiles)
    return f"{shown(axis, model)} ({low}–{high})"


def _digits(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
