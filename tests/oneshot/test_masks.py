"""Masks held as one bit a weight while a model is pruned at once."""

from dataclasses import replace

import models
import pytest
import torch
from torch import nn

from hf_prune import CalibrationConfig, PruningConfig, prune
from hf_prune.model.names import named_parameters
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.layers import as_part, find_layers, matrix_of, part_of
from hf_prune.oneshot.masks import PackedMasks


@pytest.mark.parametrize(
    ("shape", "parts"), [((3, 5), 1), ((3, 5), 3), ((4, 16), 2), ((6, 2, 3), 3), ((4, 3, 3, 5), 1), ((4, 3, 3, 5), 2)]
)
def test_a_mask_whose_parts_are_set_is_the_mask(shape, parts):
    mask = torch.rand(shape) > 0.5
    masks = PackedMasks()
    masks.add("one", shape)
    assert not masks["one"].any()
    for part in reversed(range(parts)):
        masks.set_part("one", part, parts, mask.chunk(parts)[part])
    assert masks["one"].dtype == torch.bool
    assert torch.equal(masks["one"], mask)
    masks.set_mapped("other", mask)
    assert masks["other"] is mask
    assert list(masks) == ["one", "other"]
    assert list(masks.in_order(["other", "none", "one"])) == ["other", "one"]
    with pytest.raises(KeyError):
        masks["none"]


def convolutions():
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 5))


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.mixtral, convolutions])
def test_a_matrix_as_a_part_is_where_the_parameter_has_it(build):
    model = build()
    for layer in find_layers(model, find_targets(model), dict(named_parameters(model))):
        for part in range(layer.parts):
            found = as_part(layer, matrix_of(layer, part))
            assert torch.equal(found, part_of(layer, part)), layer.target.name
            kept = replace(layer, parameter=nn.Parameter(layer.parameter > 0, requires_grad=False))
            assert torch.equal(as_part(layer, matrix_of(kept, part)), part_of(kept, part))


@pytest.mark.parametrize("build", [models.llama, models.gpt2, models.mixtral])
def test_masks_of_a_pruned_model_are_its_weights_and_take_a_bit_each(build):
    model = build()
    data = torch.randint(5, models.VOCABULARY, (4, 16))
    pruned = prune(model, PruningConfig(method="sparsegpt", sparsity=0.5), data, CalibrationConfig())
    parameters = dict(named_parameters(model))
    assert all(torch.equal(mask, parameters[name] != 0) for name, mask in pruned.masks.items())
    weights = sum(mask.numel() for mask in pruned.masks.values())
    assert sum(packed.nbytes for packed, _ in pruned.masks._masks.values()) == weights / 8


def test_masks_of_a_method_without_data_take_a_bit_too():
    pruned = prune(models.llama(), PruningConfig(method="magnitude", sparsity=0.5))
    assert isinstance(pruned.masks, PackedMasks)
    assert pruned.sparsity == 0.5
