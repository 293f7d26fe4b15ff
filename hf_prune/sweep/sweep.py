"""Running a sweep: each point that has no results yet, with one dense run for all that can share it; then the page."""

import contextlib
import gc
import json
import math
import shutil
import traceback
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..compare.comparison import Comparison, compare_models
from ..compare.measures import VALIDATION, evaluation_on, find_measure
from ..compare.models import ComparedModel, read_models
from ..compare.page import write_comparison
from ..compare.pareto import Limits, axes_of
from ..config.safe_json import read_object
from ..errors import CheckpointError, RecipeError, first_line
from ..recipe.dense_run import DenseRun, Shared
from ..recipe.outcome import Say
from ..recipe.prepare import Examples, examples_of, prepare
from ..recipe.reports import finish_wandb
from ..recipe.run import ShowLayers, run
from ..saved.files import write_file
from ..trainer.claims import claimed
from .dense_runs import dense_folder, dense_key, find_dense, make_dense
from .plan import AGAINST, BEGUN_NAME, COMPARISON, ERROR_NAME, STATE_NAME, Point, SweepPlan
from .study import Study, check_optuna

# After so many kills while it ran, a point has failed: one may have been meant for the sweep.
_KILLS = 2

_KILLED = (
    "the process was killed twice while this ran, as the system does where memory runs out; settings that need less "
    "memory, such as a smaller batch, may help"
)


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep: the comparison of its models, the files of its page, and which points have failed, and why.

    `comparison` is None where no point was finished.
    """

    comparison: Comparison | None
    files: list[Path]
    failed: dict[str, str]


def run_sweep(
    plan: SweepPlan,
    limits: Limits | None = None,
    metric: str | None = None,
    command: str = "",
    say: Say = print,
    show_layers: ShowLayers = nullcontext,
) -> SweepResult:
    """Run the points of a sweep that are not finished, and compare all of them.

    The dense model is trained once for all points whose settings leave it as it is, and data are tokenized once. What
    a point gives is what `hf-prune run` gives with the same settings, bit for bit. A point that fails is recorded with
    its error, and the others go on; a dense run that fails is not tried again for other points. What was killed twice
    while it ran has failed, too: a point for which the system kills the process does not end every continuation. Each
    point is also evaluated on the validation split, by which trials are told how good they are and the best is chosen.

    Raises CompareError as soon as a point is finished that was not evaluated by `metric`.
    Raises RecipeError, before anything is written, if the first point cannot be run, or if the folder has something
    else or is in use.
    """
    if plan.trials is not None:
        check_optuna()
    sweep = _Sweep(plan, say, show_layers)
    sweep.prepare_first()
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claimed(plan.output, writes=True))
        except CheckpointError as error:
            raise RecipeError("--output", error.problems[0][1]) from error
        return sweep.run(limits, metric, command)


class _Sweep:
    """A sweep at work: the tokenized data, once there are some, the points so far, and dense runs that have failed."""

    def __init__(self, plan: SweepPlan, say: Say, show_layers: ShowLayers):
        self.plan, self.say, self.show_layers = plan, say, show_layers
        self.examples: Examples | None = None
        self.points: list[Point] = []
        self.failed_dense: dict[str, str] = {}
        self.metric: str | None = None

    def prepare_first(self) -> None:
        """Load and check the first point that is to be run and has not failed before, and tokenize its data."""
        if self.plan.trials is not None:
            self.examples = examples_of(prepare(self.plan.first.recipe))
            return
        for point in self.plan.points:
            if not self.plan.is_finished(point) and not (point.folder / ERROR_NAME).exists():
                self.examples = examples_of(prepare(point.recipe))
                return

    def run(self, limits: Limits | None, metric: str | None, command: str) -> SweepResult:
        """Run what is not finished, in a folder that is this sweep's from now on, and compare all models."""
        plan, self.metric = self.plan, metric
        plan.check_folder()
        plan.output.mkdir(parents=True, exist_ok=True)
        _write_json(plan.output / STATE_NAME, plan.state)
        if plan.trials is None:
            for point in plan.points:
                self._run_point(point)
        else:
            self._run_trials(plan.trials)
        return self._compare(limits, metric, command)

    def _run_trials(self, trials: int) -> None:
        study = Study(self.plan, self.plan.first.recipe.metrics[0])
        self.points = [self.plan.point_of(settings) for settings in study.settled]
        while len(study.settled) < trials:
            trial, settings = study.ask()
            point = self.plan.point_of(settings)
            study.tell(trial, self._values(point) if self._run_point(point) else None)

    def _run_point(self, point: Point) -> bool:
        """Run a point that has no results yet; whether it has some now."""
        if point.name not in [one.name for one in self.points]:
            self.points.append(point)
        if self.plan.is_finished(point):
            self.say(f"{point.name}: finished before")
            self._check_metric(point)
            return True
        of = self.plan.trials or len(self.plan.points)
        self.say(f"Point {len(self.points)} of {of}: {point.name}")
        if point.folder.exists():
            shutil.rmtree(point.folder)  # what a run that was killed or failed has left
        error = self._error_of(point)
        if error is None:
            self._check_metric(point)
            return True
        point.folder.mkdir(parents=True, exist_ok=True)
        write_file(point.folder / ERROR_NAME, error.encode(errors="replace"))
        self.say(f"{point.name} failed: {_beginning(error)}")
        gc.collect()  # what the error had held is free now, and the next point needs the memory
        torch.cuda.empty_cache()
        return False

    def _check_metric(self, point: Point) -> None:
        """Raise CompareError if a finished point has no value of the metric to compare by: no other will have one."""
        if self.metric is not None:
            find_measure([one for one in read_models([point.model]) if one.folder is not None], self.metric)

    def _error_of(self, point: Point) -> str | None:
        """Run a point; None, or the error that it failed with, and where."""
        try:
            with self._begun(point.name):
                self._run(point)
        except Exception as error:  # noqa: BLE001 - whatever it was: it is recorded, and the others go on
            return f"{type(error).__name__}: {first_line(error)}\n\n{traceback.format_exc()}"
        finally:
            finish_wandb()
        return None

    @contextlib.contextmanager
    def _begun(self, name: str) -> Iterator[None]:
        """Note in a file that a point or dense run has begun, until it ends: what stays there was killed meanwhile.

        Raises RecipeError for one that was killed twice; it may begin again when the sweep is continued once more.
        """
        path = self.plan.output / BEGUN_NAME
        begun = read_object(path)
        times = int(begun.get(name, 0))
        if times >= _KILLS:
            _write_json(path, begun | {name: _KILLS - 1})
            raise RecipeError(_KILLED)
        _write_json(path, begun | {name: times + 1})
        try:
            yield
        finally:
            others = {one: count for one, count in read_object(path).items() if one != name}
            if others:
                _write_json(path, others)
            else:
                path.unlink(missing_ok=True)

    def _run(self, point: Point) -> None:
        if self.examples is None or not self.examples.fit(point.recipe):
            self.examples = examples_of(prepare(point.recipe))
        dense = self._dense(point, self.examples) if point.recipe.dense is not None else None
        run(point.recipe, self.say, self.show_layers, Shared(self.examples, dense))

    def _dense(self, point: Point, examples: Examples) -> DenseRun:
        """The dense run of a point: found, or trained now. Raises RecipeError where that has failed in this sweep."""
        found = find_dense(self.plan.output, point.recipe)
        if found is not None:
            return found
        key = dense_key(point.recipe)
        if key in self.failed_dense:
            raise RecipeError("dense", f"the dense run that this point shares has failed: {self.failed_dense[key]}")
        try:
            with self._begun(dense_folder(self.plan.output, point.recipe).parent.name):
                return make_dense(self.plan.output, point.recipe, examples, self.say, point.run_name)
        except Exception as error:  # whatever it was: other points need not try it again, and this one fails with it
            self.failed_dense[key] = first_line(error)
            raise

    def _values(self, point: Point) -> list[float] | None:
        """What a trial is told of a finished point: its main metric on validation data, and what it is traded for."""
        [model] = [one for one in read_models([point.model]) if one.folder is not None]
        evaluation = evaluation_on(model, VALIDATION)
        if evaluation is None or evaluation.main_metric is None:
            return None
        values = [evaluation.metrics[evaluation.main_metric]]
        if self.plan.against is not None:
            axis = next((one for one in axes_of([model]) if one.key == AGAINST[self.plan.against]), None)
            value = axis.value(model) if axis is not None else None
            values.append(value if value is not None else math.nan)
        return values if all(map(math.isfinite, values)) else None

    def _compare(self, limits: Limits | None, metric: str | None, command: str) -> SweepResult:
        plan = self.plan
        finished = [point for point in self.points if plan.is_finished(point)]
        failed = {point.name: _recorded_error(point) for point in self.points if point not in finished}
        if not finished:
            return SweepResult(None, [], failed)
        dense = dict.fromkeys(dense_folder(plan.output, one.recipe) for one in finished if one.recipe.dense is not None)
        models = read_models([*dense, *(point.model for point in finished)])
        comparison = compare_models(
            [_with_dense_name(model, dense) for model in models],
            metric=metric,
            limits=limits,
            title=f"Sweep of {plan.path.stem}: {', '.join(map(str, plan.swept))}",
            command=command,
            failed=failed,
        )
        return SweepResult(comparison, write_comparison(comparison, plan.output / COMPARISON), failed)


def _with_dense_name(model: ComparedModel, dense: Collection[Path]) -> ComparedModel:
    """A dense model of the sweep as `dense`, or with the name of its folder where there are several."""
    if model.folder is None or model.folder not in dense:
        return model
    return replace(model, name="dense" if len(dense) == 1 else model.folder.parent.name)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _recorded_error(point: Point) -> str:
    """The first line of what a point failed with."""
    path = point.folder / ERROR_NAME
    return _beginning(path.read_text(encoding="utf-8")) if path.exists() else "it was not finished"


def _beginning(error: str) -> str:
    return error.partition("\n")[0]
