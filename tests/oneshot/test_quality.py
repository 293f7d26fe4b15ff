"""The highest sparsity that keeps a share of the dense model's quality."""

import copy

import pytest
import torch
from models import llama
from test_seen import SETTINGS, counted, taught

from hf_prune import CalibrationConfig, PruningConfig, PruningConfigError, prune
from hf_prune.errors import CalibrationError
from hf_prune.oneshot.perplexity import mean_loss
from hf_prune.oneshot.quality import prune_to_quality

OWN = CalibrationConfig(batch_size=2, dense_weight=0.0, residual_weight=0.0)


def evaluate(model):
    return mean_loss(model, counted(64, seed=3))


def test_the_highest_sparsity_that_holds_is_found():
    model, data = taught(), counted(16, seed=2)
    dense = copy.deepcopy(model)
    config = PruningConfig(method="wanda", sparsity=0.99)
    seen = []
    pruned, trials = prune_to_quality(model, config, data, evaluate, 0.9, OWN, step=0.05, tried=seen.append)
    assert trials == seen
    held = {trial.sparsity for trial in trials if trial.quality >= 0.9}
    assert pruned.config.sparsity == max(held)
    assert pruned.sparsity == pytest.approx(max(held), abs=0.01)
    missed = [trial.sparsity for trial in trials if trial.quality < 0.9]
    assert min(missed) - max(held) == pytest.approx(0.05, abs=0.011)
    assert evaluate(dense) / evaluate(model) >= 0.9
    assert all(f"{trial.sparsity:.4g} (" in pruned.notes[-1] for trial in trials)
    again = copy.deepcopy(dense)
    prune(again, PruningConfig(method="wanda", sparsity=max(held)), data, OWN)
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), model.parameters(), strict=True))
    parameters = dict(model.named_parameters())
    assert all(not bool(parameters[name][~mask].any()) for name, mask in pruned.masks.items())


def test_the_highest_is_tried_first():
    config = PruningConfig(method="wanda", sparsity=0.3)
    pruned, [trial] = prune_to_quality(taught(), config, counted(16, seed=2), evaluate, 0.9, SETTINGS)
    assert pruned.config == config
    assert trial.sparsity == 0.3


def test_a_metric_of_which_more_is_better():
    model, data = taught(), counted(16, seed=2)

    def accuracy(model):
        ids = counted(64, seed=3)
        with torch.no_grad():
            return float((model(input_ids=ids).logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean())

    config = PruningConfig(method="magnitude", sparsity=0.99)
    pruned, trials = prune_to_quality(model, config, data, accuracy, 0.9, greater_is_better=True, step=0.1)
    dense = trials[0].value / trials[0].quality
    assert accuracy(model) >= 0.9 * dense
    assert 0 < pruned.sparsity < 0.99


def test_a_quality_that_cannot_be_kept_leaves_the_dense_model():
    model = llama()
    before = copy.deepcopy(model.state_dict())
    config, values = PruningConfig(method="magnitude", sparsity=0.5), iter([1.0, *[float("nan")] * 20])
    with pytest.raises(CalibrationError, match=r"found none: at 0\.1 it keeps nan"):
        prune_to_quality(model, config, None, lambda model: next(values), 0.9, step=0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("fields", "options", "key"),
    [
        ({"pattern": "2:4"}, {}, "sparsity"),
        ({"sparsity": 0.0}, {}, "sparsity"),
        ({"sparsity": 0.5}, {"target_quality": 1.0}, "target_quality"),
        ({"sparsity": 0.5}, {"step": 0}, "step"),
    ],
)
def test_what_leaves_nothing_to_search_is_refused(fields, options, key):
    with pytest.raises(PruningConfigError) as caught:
        prune_to_quality(llama(), PruningConfig(method="magnitude", **fields), None, evaluate, **options)
    assert caught.value.problems[0][0] == key
