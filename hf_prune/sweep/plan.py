"""The points of a sweep: their names, folders and recipes; what is in its folder already; and what is refused."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config.safe_json import read_object
from ..engines.launched import launched_processes
from ..errors import LaunchError, RecipeError
from ..publish.redact import without_tokens
from ..recipe.loading import load_recipe
from ..recipe.schema import COMMAND_LINE, Recipe
from ..recipe.yaml12 import read_recipe
from ..trainer.checkpoints import UNFINISHED
from .differences import differences
from .settings import Range, Swept, parse_settings

STATE_NAME, ERROR_NAME, RESULTS_NAME = "sweep.json", "error.txt", "results.json"

# What has begun and not ended, and how often: the name of a point or of the folder of a dense run -> times.
BEGUN_NAME = "begun.json"

POINTS, COMPARISON = "points", "comparison"

FORMAT_VERSION = 1

# What a sweep with trials may trade the metric for: the name of an axis of the comparison.
AGAINST = {"sparsity": "sparsity", "bytes": "megabytes", "latency": "milliseconds_1"}

_LONGEST_NAME = 80


@dataclass(frozen=True)
class Point:
    """One run of a sweep: its name, its folder, and its recipe with its settings.

    `run_name` is what the recipe itself calls a run where it reports to, if it has a name for it.
    """

    name: str
    folder: Path
    recipe: Recipe
    run_name: str | None

    @property
    def model(self) -> Path:
        """The folder of its pruned model."""
        return self.folder / "model"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep as it was asked for.

    Attributes:
        path: the recipe's file.
        fixed: the overrides that all points have.
        swept: what differs.
        output: the folder of the sweep.
        trials: how many points are drawn by optuna; None for a grid.
        seed: of the draws.
        against: what trials trade the metric for, a key of `AGAINST`; None for the metric alone.
    """

    path: Path
    fixed: tuple[str, ...]
    swept: tuple[Swept, ...]
    output: Path
    trials: int | None = None
    seed: int = 0
    against: str | None = None

    @cached_property
    def points(self) -> list[Point]:
        """All points of a grid, the last key changing first; none for trials, which are drawn one after another."""
        if self.trials is not None:
            return []
        keys = [one.key for one in self.swept]
        texts = [one.texts for one in self.swept if not isinstance(one, Range)]
        points = [self.point_of(dict(zip(keys, chosen, strict=True))) for chosen in itertools.product(*texts)]
        _refuse_repeated(points)
        return points

    @cached_property
    def first(self) -> Point:
        """The point with the first value of each key, or the lower bound of its range."""
        return self.point_of({one.key: _first_of(one) for one in self.swept})

    def point_of(self, settings: Mapping[str, str]) -> Point:
        """The point with these values, by key. Raises RecipeError if the recipe refuses one."""
        name = name_of(settings)
        folder = self.output / POINTS / name
        overrides = [*self.fixed, *(f"{key}={text}" for key, text in settings.items())]
        recipe = load_recipe(self.path, [*overrides, f"output_dir={json.dumps(str(folder))}"])
        return Point(name, folder, named(recipe, name), recipe.training.get("run_name"))

    def is_finished(self, point: Point) -> bool:
        """Whether a point has results. Raises RecipeError if they are those of another recipe."""
        path = point.folder / RESULTS_NAME
        if not path.exists():
            return False
        if read_object(path).get("recipe") != _as_json(without_tokens(point.recipe.model_dump())):
            raise RecipeError(
                "--output",
                f"expected the results of this recipe in {path}, found those of another; give another folder, or "
                "remove this one",
            )
        return True

    @property
    def state(self) -> dict[str, Any]:
        """What a folder must have been begun with to be continued; a grid may get other values."""
        content, _, _ = read_recipe(self.path)
        trials = {"space": [str(one) for one in self.swept], "seed": self.seed, "against": self.against}
        return {
            "format_version": FORMAT_VERSION,
            "recipe": _as_json(without_tokens(content)),
            "fixed": sorted(text for text in self.fixed if not text.startswith("output_dir=")),
            "trials": trials if self.trials is not None else None,
        }

    def check_folder(self) -> None:
        """Raise RecipeError if the folder has something else than this sweep."""
        if self.output.exists() and not self.output.is_dir():
            raise RecipeError("--output", f"expected a folder, found a file at {self.output}")
        if not self.output.is_dir() or all(path.name == UNFINISHED for path in self.output.iterdir()):
            return
        path = self.output / STATE_NAME
        if not path.exists():
            raise RecipeError(
                "--output", f"expected an empty folder or that of a sweep, got {self.output}, which has no {STATE_NAME}"
            )
        there, here = read_object(path), self.state
        if there.keys() != here.keys() or there["format_version"] != FORMAT_VERSION:
            problem = f"expected a sweep of this version of hf-prune, got {path} of another, or damaged"
            raise RecipeError("--output", f"{problem}; give another folder")
        if there != here:
            raise RecipeError(
                "--output",
                f"expected the folder of this sweep, got {self.output}, which was begun with other settings: "
                f"{'; '.join(differences(there, here))}. Give those it was begun with, or another folder",
            )


def plan_sweep(
    path: Path,
    overrides: Sequence[str],
    output: Path | None = None,
    trials: int | None = None,
    seed: int = 0,
    against: str | None = None,
) -> SweepPlan:
    """Read what a sweep was asked for; nothing is written. Raises RecipeError for what cannot be run, LaunchError too.

    The default folder is the recipe's `output_dir` with `_sweep` added.
    """
    if launched_processes() > 1:
        raise LaunchError(
            f"expected one process, got {launched_processes()}: run each point with hf-prune run under the launcher, "
            "and compare them with hf-prune compare"
        )
    fixed, swept = parse_settings(overrides)
    for one in swept:
        if _changes_evaluation(one.key):
            problem = "must not be swept, as the models would be evaluated on different data or by different metrics"
            raise RecipeError(one.key, problem, at=COMMAND_LINE)
    if trials is not None and trials < 1:
        raise RecipeError("--trials", f"expected 1 or more, got {trials}", at=COMMAND_LINE)
    if not swept:
        problem = "expected a key with several values, such as pruning.sparsity=0.5,0.7; hf-prune run runs one"
        raise RecipeError(problem, at=COMMAND_LINE)
    for one in swept:
        if trials is None and isinstance(one, Range):
            raise RecipeError(
                one.key, f"expected values with commas, or --trials N for the range {one}", at=COMMAND_LINE
            )
    if against is not None and (trials is None or against not in AGAINST):
        problem = "must not be set without --trials" if trials is None else f"expected {', '.join(AGAINST)}"
        raise RecipeError("--against", f"{problem}, got {against!r}", at=COMMAND_LINE)
    first = load_recipe(path, [*fixed, *(f"{one.key}={_first_of(one)}" for one in swept)])
    if first.training_arguments().push_to_hub:
        raise RecipeError(
            "training.push_to_hub", "must not be set in a sweep, whose models would overwrite each other; push the best"
        )
    if output is None:
        output = Path(f"{first.output_dir.rstrip('/')}_sweep")
    plan = SweepPlan(path, tuple(fixed), tuple(swept), output, trials, seed, against)
    plan.check_folder()
    for point in plan.points:
        plan.is_finished(point)
    return plan


def named(recipe: Recipe, name: str) -> Recipe:
    """The recipe with a name for its run where it reports to: after the recipe's own name, if it has one."""
    if not recipe.training_arguments().report_to:
        return recipe
    own = recipe.training.get("run_name")
    changed = recipe.model_copy(update={"training": {**recipe.training, "run_name": f"{own} {name}" if own else name}})
    changed._places = recipe._places
    return changed


def name_of(settings: Mapping[str, str]) -> str:
    """The name of the point with these settings, as a folder: `sparsity=0.5,method=wanda`.

    Keys are named by their last parts where those differ. What has no place in a file's name is replaced, and a digest
    added, so that different settings have different names.
    """
    lasts = [_last(key) for key in settings]
    parts = []
    for key, text in settings.items():
        short = _last(key) if lasts.count(_last(key)) == 1 else key
        parts.append(f"{short}={text}")
    exact = ",".join(parts)
    safe = re.sub(r"[^\w.,=+-]+", "-", exact, flags=re.ASCII)[:_LONGEST_NAME]
    return safe if safe == exact else f"{safe}-{hashlib.sha256(exact.encode()).hexdigest()[:6]}"


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _changes_evaluation(key: str) -> bool:
    """Whether models with different values of a key cannot be compared."""
    if key.partition(".")[0] == "dataset":
        return key not in ("dataset.max_train_samples", "dataset.max_length", "dataset.max_summary_length")
    return key.partition(".")[0] in ("task", "metrics")


def _first_of(one: Swept) -> str:
    if not isinstance(one, Range):
        return one.texts[0]
    return str(int(one.low)) if one.is_whole else repr(one.low)


def _refuse_repeated(points: Sequence[Point]) -> None:
    """Raise RecipeError for values that differ in their text alone, such as 0.5 and 0.50."""
    first: dict[str, str] = {}
    for point in points:
        content = point.recipe.model_dump(exclude={"output_dir"})
        content["training"] = {**content["training"], "run_name": None}
        text = json.dumps(content, sort_keys=True, default=str)
        if text in first:
            raise RecipeError(f"expected different settings, got {first[text]} and {point.name}, which are the same")
        first[text] = point.name


def _as_json(content: Any) -> Any:
    return json.loads(json.dumps(content, default=str))
