"""A recipe in bfloat16 on a processor that is slower with it than in float32."""

import pytest
import torch
from test_run import reviews, save_tiny_bert, write_csv, write_recipe

from hf_prune.recipe import precision
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.precision import changes_to_float32, slow_bfloat16
from hf_prune.recipe.run import run
from hf_prune.recipe.shipped import find_recipe


@pytest.fixture
def slowdown(monkeypatch):
    """Say how much slower bfloat16 is on this machine, and that there is no accelerator."""

    def set_slowdown(measured):
        monkeypatch.setattr(precision, "bfloat16_slowdown", lambda: measured)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    return set_slowdown


@pytest.mark.parametrize(("measured", "is_slow"), [(8.0, True), (1.5, True), (1.1, False), (0.3, False)])
def test_bfloat16_that_is_slow_is_told_with_the_settings_for_float32(slowdown, measured, is_slow):
    slowdown(measured)
    recipe = load_recipe(find_recipe("oneshot"))
    said = slow_bfloat16(recipe)
    assert (said is not None) == is_slow
    if said is not None:
        assert f"{measured} times as long in bfloat16" in said
        assert said.endswith("to compute in float32, add training.bf16=false calibration.autocast=null")
    changed = load_recipe(find_recipe("oneshot"), changes_to_float32(recipe))
    assert changed.calibration_config.autocast is None
    assert slow_bfloat16(changed) is None


def test_an_accelerator_computes_in_bfloat16(slowdown, monkeypatch):
    slowdown(8.0)
    recipe = load_recipe(find_recipe("oneshot"))
    assert slow_bfloat16(recipe) is not None
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert slow_bfloat16(recipe) is None


def test_the_slowdown_is_measured_on_this_machine():
    assert 0.01 < precision.bfloat16_slowdown() < 1000


def test_a_run_says_it_before_it_trains(slowdown, tmp_path):
    slowdown(8.0)
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews())
    path = write_recipe(tmp_path, tmp_path, pruning__sparsity=0.5)
    said = []
    run(load_recipe(path, ["training.bf16=true", "training.max_steps=1"]), say=said.append)
    told = [line for line in said if "training.bf16=false" in line]
    assert len(told) == 1
    assert said.index(told[0]) < next(index for index, line in enumerate(said) if line.startswith("Fine-tuning"))
