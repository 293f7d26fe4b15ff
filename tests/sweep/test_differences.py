"""What differs between the states of two sweeps is told by key."""

from hf_prune.sweep.differences import differences


def state(fixed=(), trials=None, **recipe):
    return {"format_version": 1, "recipe": recipe, "fixed": list(fixed), "trials": trials}


def test_each_setting_that_differs_is_named_with_both_values():
    was = state(["training.seed=1"], training={"max_steps": 3, "lr": 0.1}, pruning=[{"sparsity": 0.5}], task="x")
    now = state(["training.seed=2"], training={"max_steps": 4, "lr": 0.1}, pruning=[{"sparsity": 0.6}], task="x")
    assert differences(was, now) == [
        "training.seed (for all points) was 1 and is now 2",
        "training.max_steps (in the recipe) was 3 and is now 4",
        "pruning.0.sparsity (in the recipe) was 0.5 and is now 0.6",
    ]
    assert differences(state(a=1), state(b={})) == [
        "a (in the recipe) was 1 and is now not set",
        "b (in the recipe) was not set and is now {}",
    ]


def test_the_draws_of_trials_are_settings_too():
    was = {"space": ["pruning.sparsity=0.5..0.9"], "seed": 0, "against": None}
    now = was | {"seed": 3, "against": "bytes"}
    assert differences(state(trials=was), state(trials=now)) == [
        "--seed was 0 and is now 3",
        "--against was not set and is now bytes",
    ]
