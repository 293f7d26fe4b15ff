"""Sparse and few values at once: counts, the error of layers, and what is refused."""

import copy

import pytest
import torch
from models import llama, mixtral
from test_prune import METHODS, SETTINGS, error_of, masked, tokens

from hf_prune import PruningConfig, PruningConfigError, prune


def values_in(parameter):
    return parameter[parameter != 0].unique()


@pytest.mark.parametrize("fields", METHODS, ids=str)
def test_every_method_leaves_few_values_and_the_share_of_zeros(fields):
    model = llama()
    pruned = prune(model, PruningConfig(**fields, sparsity=0.5, shared_values=4), tokens(), SETTINGS)
    parameters = dict(model.named_parameters())
    for name, count in masked(model, pruned).items():
        assert count == parameters[name].numel() // 2 == int((parameters[name] == 0).sum())
        assert 2 <= len(values_in(parameters[name])) <= 4


def test_bfloat16_weights_have_few_values():
    model = llama().bfloat16()
    pruned = prune(model, PruningConfig(method="sparsegpt", sparsity=0.5, shared_values=4), tokens(), SETTINGS)
    parameters = dict(model.named_parameters())
    assert all(len(values_in(parameters[name])) <= 4 for name in pruned.masks)


def test_many_values_are_hardly_worse_than_values_of_their_own():
    torch.manual_seed(0)
    dense = llama()
    inputs = {"input_ids": tokens()}
    errors = {}
    for number in (None, 256, 2):
        model = copy.deepcopy(dense)
        prune(model, PruningConfig(method="sparsegpt", sparsity=0.5, shared_values=number), tokens(), SETTINGS)
        errors[number] = error_of(model, dense, inputs)
    assert errors[256] == pytest.approx(errors[None], rel=0.05)
    assert errors[2] > errors[256]


def test_fused_experts_are_refused_where_they_are_solved_one_by_one():
    config = PruningConfig(method="sparsegpt", sparsity=0.5, shared_values=4)
    with pytest.raises(PruningConfigError, match=r"shared_values: cannot be used at once for a tensor whose matrices"):
        prune(mixtral(), config, tokens(), SETTINGS)
    model = mixtral()
    pruned = prune(model, PruningConfig(method="magnitude", sparsity=0.5, shared_values=4))
    parameters = dict(model.named_parameters())
    assert all(len(values_in(parameters[name])) == 4 for name in pruned.masks)
