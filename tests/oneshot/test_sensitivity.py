"""Curves of single tensors, and the allocation that follows from them."""

import copy
import itertools
import json
import re

import pytest
import torch
from models import gpt2, llama, mixtral
from test_seen import SETTINGS, counted, taught, tokens

from hf_prune import CalibrationConfig, PruningConfig, PruningConfigError, prune
from hf_prune.errors import CalibrationError
from hf_prune.methods.allocation import cheapest, lower_hull
from hf_prune.oneshot.perplexity import mean_loss
from hf_prune.oneshot.sensitivity import Curve, Sensitivity, as_overrides, measure_sensitivity

DATA = tokens(12)


def loss_of(windows):
    return lambda model: mean_loss(model, windows)


def alone(dense, name, rate, method):
    """The loss with one tensor pruned, by pruning it as any user would."""
    model = copy.deepcopy(dense)
    config = PruningConfig(method=method, sparsity=rate, targets=[re.escape(name)])
    prune(model, config, DATA, CalibrationConfig(batch_size=2, dense_weight=0.0, residual_weight=0.0))
    return mean_loss(model, DATA)


@pytest.mark.parametrize(("build", "method"), [(llama, "sparsegpt"), (gpt2, "wanda"), (llama, "magnitude")])
def test_a_curve_is_the_loss_with_that_tensor_alone_pruned(build, method):
    model = build().eval()
    before = copy.deepcopy(model.state_dict())
    config = PruningConfig(method=method, sparsity=0.5)
    found = measure_sensitivity(model, config, DATA, loss_of(DATA), (0.3, 0.6), SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.dense == mean_loss(model, DATA)
    for name in list(found.curves)[::3]:
        for rate, loss in found.curves[name].losses.items():
            assert loss == pytest.approx(alone(model, name, rate, method), rel=1e-6)


def test_experts_are_measured_together():
    model = mixtral().eval()
    before = copy.deepcopy(model.state_dict())
    found = measure_sensitivity(
        model, PruningConfig(method="wanda", sparsity=0.5), tokens(2), loss_of(DATA), (0.5,), SETTINGS
    )
    names = [name for name in found.curves if "experts" in name]
    assert len(names) == 4
    assert all(found.curves[name].losses[0.5] != found.dense for name in names)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_measuring_goes_on_where_it_was_stopped(tmp_path):
    model, config = llama().eval(), PruningConfig(method="sparsegpt", sparsity=0.5)
    calls = []

    def evaluate(model):
        calls.append(1)
        return mean_loss(model, DATA)

    whole = measure_sensitivity(model, config, DATA, evaluate, (0.3, 0.6), SETTINGS)
    assert len(calls) == 1 + 14 * 2

    def stop(done, total, name):
        assert total == 14
        if done == 5:
            raise KeyboardInterrupt

    kept_in = tmp_path / "measured.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measure_sensitivity(model, config, DATA, evaluate, (0.3, 0.6), SETTINGS, kept_in=kept_in, progress=stop)
    with kept_in.open("a", encoding="utf-8") as file:
        file.write('{"name": "model')  # a line that was being written
    calls.clear()
    again = measure_sensitivity(model, config, DATA, evaluate, (0.3, 0.6), SETTINGS, kept_in=kept_in)
    assert len(calls) == 1 + 9 * 2
    assert again == whole
    with pytest.raises(CalibrationError, match="expected measurements of the same model"):
        measure_sensitivity(model, config, DATA, evaluate, (0.3, 0.7), SETTINGS, kept_in=kept_in)
    kept_in.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match="cannot be read"):
        measure_sensitivity(model, config, DATA, evaluate, (0.3, 0.6), SETTINGS, kept_in=kept_in)


# ---- Allocation ----


def test_a_lower_hull_by_hand():
    assert lower_hull([(0, 0.0), (10, 5.0), (20, 2.0), (30, 9.0)]) == [(0, 0.0), (20, 2.0), (30, 9.0)]
    assert lower_hull([(0, 0.0), (10, -1.0), (20, 3.0)]) == [(0, 0.0), (10, -1.0), (20, 3.0)]
    assert lower_hull([(0, 0.0)]) == [(0, 0.0)]


@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_allocation_agrees_with_trying_all(seed):
    """Of convex curves with a point for each unit, none of all allocations costs less."""
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for _ in range(3):
        slopes = torch.rand(6, generator=generator).sort().values
        curves.append([(0, 0.0), *((place + 1, float(slopes[: place + 1].sum())) for place in range(6))])
    for total in (0, 5, 11, 18):
        counts, loss = cheapest(curves, total)
        assert sum(counts) == total
        tried = [
            sum(curve[number][1] for curve, number in zip(curves, numbers, strict=True))
            for numbers in itertools.product(range(7), repeat=3)
            if sum(numbers) == total
        ]
        assert loss == pytest.approx(min(tried))
        assert loss == pytest.approx(sum(curve[number][1] for curve, number in zip(curves, counts, strict=True)))
    assert cheapest(curves, 19) is None


def test_shares_are_exact_in_all_and_zeros_stay():
    curves = {
        "a.weight": Curve(1000, 0, {0.3: 2.1, 0.7: 2.5}),  # 1/3000 for each of the first 300, then 1/1000
        "b.weight": Curve(500, 0, {0.3: 2.0, 0.7: 2.01}),  # 0 for each of the first 150, then 1/20000
        "c.weight": Curve(500, 200, {0.3: 9.0, 0.7: 2.2}),  # 200 are zero; 1/750 for each of 150 more
    }
    shares, loss = Sensitivity(2.0, curves).allocate(0.4)
    assert [round(share * curve.units) for share, curve in zip(shares.values(), curves.values(), strict=True)] == [
        800 - 350 - 200,
        350,
        200,
    ]
    assert loss == pytest.approx(2.01 + 250 / 3000)
    with pytest.raises(PruningConfigError, match=r"expected at most 0\.7"):
        Sensitivity(2.0, curves).allocate(0.8)


def test_an_allocation_is_pruned_as_it_says_and_loses_less_than_equal_shares():
    dense, data = taught(), counted(16, seed=2)
    config = PruningConfig(method="sparsegpt", sparsity=0.6)
    found = measure_sensitivity(dense, config, data, loss_of(counted(64, seed=4)), (0.2, 0.4, 0.6, 0.8), SETTINGS)
    shares, predicted = found.allocate(0.6)
    assert predicted >= found.dense - 1e-3
    losses = {}
    for name, overrides in (("even", None), ("measured", json.loads(json.dumps(as_overrides(shares))))):
        model = copy.deepcopy(dense)
        pruned = prune(model, PruningConfig(method="sparsegpt", sparsity=0.6, overrides=overrides), data, SETTINGS)
        weights = sum(mask.numel() for mask in pruned.masks.values())
        assert sum(int((~mask).sum()) for mask in pruned.masks.values()) == pytest.approx(0.6 * weights, abs=8)
        losses[name] = mean_loss(model, counted(64, seed=5)) - found.dense
    for name, share in shares.items():
        mask = pruned.masks[name]
        assert int((~mask).sum()) == round(share * mask.numel())
    assert losses["measured"] < 0.7 * losses["even"]


@pytest.mark.parametrize(
    ("config", "rates", "message"),
    [
        (PruningConfig(method="sparsegpt", pattern="2:4"), (0.5,), "leaves a choice"),
        (PruningConfig(method="sparsegpt", sparsity=0.5), (), "between 0 and 1"),
        (PruningConfig(method="sparsegpt", sparsity=0.5), (0.5, 1.0), "between 0 and 1"),
        (PruningConfig(method="taylor", sparsity=0.5), (0.5,), "expected one of"),
    ],
)
def test_what_cannot_be_measured_is_refused(config, rates, message):
    with pytest.raises(PruningConfigError, match=message):
        measure_sensitivity(llama(), config, DATA, loss_of(DATA), rates, SETTINGS)
