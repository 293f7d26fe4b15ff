"""Trials of optuna: which settings to try next, kept in the sweep's folder.

What a trial gets depends on the seed, its place, and the results before it alone: a sweep that was killed and continued
draws what one that was not would have drawn.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RecipeError
from ..publish.record import lower_is_better
from ..recipe.schema import COMMAND_LINE
from .plan import AGAINST, SweepPlan
from .settings import Range, Swept

if TYPE_CHECKING:
    import optuna

_LOG_NAME, _STUDY_NAME = "study.log", "sweep"

_SETTINGS, _SETTLED = "settings", "settled"


def check_optuna() -> None:
    """Raise RecipeError if optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise RecipeError("--trials", "needs the package optuna; pip install 'hf-prune[sweep]'", at=COMMAND_LINE)


class Study:
    """The trials of a sweep.

    Args:
        plan: of the sweep, with `trials`.
        metric: the name of the main metric, whose best value is searched.
    """

    def __init__(self, plan: SweepPlan, metric: str):
        import optuna
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self._plan = optuna, plan
        low, high = optuna.study.StudyDirection.MINIMIZE, optuna.study.StudyDirection.MAXIMIZE
        directions = [low if lower_is_better(Path(metric).stem) else high]
        if plan.against is not None:
            directions.append(high if AGAINST[plan.against] == "sparsity" else low)
        backend = JournalFileBackend(str(plan.output / _LOG_NAME))
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=_STUDY_NAME,
            directions=directions,
            load_if_exists=True,
        )
        for trial in self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # it was killed

    @property
    def settled(self) -> list[dict[str, str]]:
        """The settings of all trials that have ended, with a result or without, in their order."""
        complete = self._optuna.trial.TrialState.COMPLETE
        return [
            trial.user_attrs[_SETTINGS]
            for trial in self._study.get_trials(deepcopy=False)
            if trial.state == complete or trial.user_attrs.get(_SETTLED)
        ]

    def ask(self) -> "tuple[optuna.Trial, dict[str, str]]":
        """The next trial, and its settings by key, as they are written in YAML."""
        place = len(self.settled)
        self._study.sampler = self._optuna.samplers.TPESampler(seed=self._plan.seed + place)
        trial = self._study.ask()
        settings = {one.key: _drawn(trial, one) for one in self._plan.swept}
        trial.set_user_attr(_SETTINGS, settings)
        return trial, settings

    def tell(self, trial: "optuna.Trial", values: Sequence[float] | None) -> None:
        """The results of a trial; None for one that has failed, and is not tried again."""
        if values is not None:
            self._study.tell(trial, list(values))
            return
        trial.set_user_attr(_SETTLED, True)
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)


def _drawn(trial: Any, one: Swept) -> str:
    """A value for a key, as it is written in YAML: of a range with four digits, so that names are short."""
    if not isinstance(one, Range):
        return trial.suggest_categorical(one.key, list(one.texts))
    if one.is_whole:
        return str(trial.suggest_int(one.key, int(one.low), int(one.high), log=one.log))
    value = trial.suggest_float(one.key, one.low, one.high, log=one.log)
    return f"{min(max(float(f'{value:.4g}'), one.low), one.high):.15g}"
