"""Trials of optuna: the same whatever killed the sweep, and towards better values."""

import pytest
from test_run import reviews, save_tiny_bert, write_csv, write_recipe
from test_sweep import sweep

from hf_prune.errors import RecipeError
from hf_prune.sweep.plan import plan_sweep
from hf_prune.sweep.study import Study, check_optuna

SPACE = (
    "pruning.sparsity=0.5..0.9",
    "training.learning_rate=1e-4..1e-1:log",
    "training.seed=1..9",
    "pruning.scope=layer,global",
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model and a data set; no test may change them."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_csv(folder / "reviews.csv", reviews())
    return folder


def study_in(folder, material, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_sweep(write_recipe(folder, material), SPACE, folder / "sweep", **{"trials": 16, **changes})
    (folder / "sweep").mkdir(exist_ok=True)
    # The folder is not begun, so that it can be opened again as often as a test likes.
    return lambda: Study(plan, "accuracy")


def value(settings):
    """What a trial is told here: the best is a sparsity of 0.7 and a learning rate of 1e-2."""
    rate = float(settings["training.learning_rate"])
    return 1 - abs(float(settings["pruning.sparsity"]) - 0.7) - abs(rate - 1e-2)


def drawn(study, trials):
    found = []
    for _ in range(trials):
        trial, settings = study.ask()
        study.tell(trial, [value(settings)])
        found.append(settings)
    return found


def test_a_study_that_is_killed_draws_what_one_that_is_not_would_have(material, tmp_path):
    whole = drawn(study_in(tmp_path / "whole", material)(), 14)
    open_study = study_in(tmp_path / "killed", material)
    assert drawn(open_study(), 5) == whole[:5]
    open_study().ask()  # killed while it runs
    again = open_study()
    assert again.settled == whole[:5]
    assert drawn(again, 9) == whole[5:]  # beyond the ten that are drawn at random
    assert open_study().settled == whole


def test_values_are_in_their_ranges_and_follow_the_seed(material, tmp_path):
    first = drawn(study_in(tmp_path / "one", material)(), 8)
    other = drawn(study_in(tmp_path / "two", material, seed=5)(), 8)
    assert first != other
    for settings in first + other:
        assert 0.5 <= float(settings["pruning.sparsity"]) <= 0.9
        assert 1e-4 <= float(settings["training.learning_rate"]) <= 1e-1
        assert settings["training.seed"] in list("123456789")
        assert settings["pruning.scope"] in ("layer", "global")
    rates = sorted(float(settings["training.learning_rate"]) for settings in first + other)
    assert rates[4] < 1e-2  # drawn in the logarithm: in the range itself, one in ten would be


def test_a_trial_without_a_result_is_not_drawn_again(material, tmp_path):
    study = study_in(tmp_path, material)()
    trial, settings = study.ask()
    study.tell(trial, None)
    assert study.settled == [settings]
    assert study.ask()[1] != settings


def test_trials_may_trade_the_metric_for_something(material, tmp_path):
    study = study_in(tmp_path, material, against="sparsity")()
    for _ in range(12):
        trial, settings = study.ask()
        study.tell(trial, [value(settings), float(settings["pruning.sparsity"])])
    assert len(study.settled) == 12


def test_without_optuna_its_install_command_is_told(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--trials: needs the package optuna; pip install 'hf-prune\[sweep\]'"):
        check_optuna()


def test_trials_are_run_compared_and_continued(material, tmp_path):
    path = write_recipe(tmp_path, material, training__max_steps=2)
    settings = ["pruning.sparsity=0.5..0.9", "training.learning_rate=0.01,0.001"]
    result, _ = sweep(path, *settings, trials=1)
    assert len(result.comparison.models) == 1
    result, said = sweep(path, *settings, trials=2)
    names = [model.name for model in result.comparison.models]
    assert len(names) == 2
    assert all(name.startswith("sparsity=0.") and ",learning_rate=0.0" in name for name in names)
    assert [line for line in said if line.startswith("Point ")] == [f"Point 2 of 2: {names[1]}"]
    assert result.comparison.measure.part == "validation"
