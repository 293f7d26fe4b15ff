"""A recipe in bfloat16 on a processor that has no instructions for it."""

import pytest
import torch
from test_run import reviews, save_tiny_bert, write_csv, write_recipe

from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.precision import changes_to_float32, slow_bfloat16
from hf_prune.recipe.run import run
from hf_prune.recipe.shipped import find_recipe


@pytest.fixture
def processor(monkeypatch):
    """Say what the processor has, and that there is no accelerator."""

    def set_capabilities(**capabilities):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    return set_capabilities


@pytest.mark.parametrize(
    ("capabilities", "is_slow"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_bfloat16_that_is_slow_is_told_with_the_settings_for_float32(processor, capabilities, is_slow):
    processor(**capabilities)
    recipe = load_recipe(find_recipe("oneshot"))
    said = slow_bfloat16(recipe)
    assert (said is not None) == is_slow
    if said is not None:
        assert said.endswith("to compute in float32, add training.bf16=false calibration.autocast=null")
    changed = load_recipe(find_recipe("oneshot"), changes_to_float32(recipe))
    assert changed.calibration_config.autocast is None
    assert slow_bfloat16(changed) is None


def test_a_run_says_it_before_it_trains(processor, tmp_path):
    processor(architecture="x86_64", avx512_bf16=False)
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews())
    path = write_recipe(tmp_path, tmp_path, pruning__sparsity=0.5)
    said = []
    run(load_recipe(path, ["training.bf16=true", "training.max_steps=1"]), say=said.append)
    told = [line for line in said if "training.bf16=false" in line]
    assert len(told) == 1
    assert said.index(told[0]) < next(index for index, line in enumerate(said) if line.startswith("Fine-tuning"))
