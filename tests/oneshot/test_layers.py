"""Layers as matrices: what a matrix is multiplied with gives the layer's output."""

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_prune.model.targets import find_targets
from hf_prune.oneshot.layers import as_part, find_layers, inputs_of_part, matrix_of, put_matrix

CONVOLUTIONS = [
    nn.Conv2d(4, 6, 3, bias=False),
    nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), bias=False),
    nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding=2, bias=False),
    nn.Conv2d(4, 8, 3, groups=4, padding="same", bias=False),
    nn.Conv2d(4, 6, (4, 3), padding="same", bias=False),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=False),
    nn.Conv2d(4, 6, 3, padding="valid", bias=False),
    nn.Conv1d(4, 6, 5, padding=4, bias=False),
    nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2, padding_mode="circular", bias=False),
]


def layer_of(module, targets=("weight",)):
    model = nn.Sequential(module)
    names = dict(model.named_parameters())
    return find_layers(model, find_targets(model, targets=[rf"0\.{name}" for name in targets]), names)[0]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("module", CONVOLUTIONS, ids=str)
def test_unfolded_inputs_times_the_matrices_are_what_a_convolution_returns(module):
    layer = layer_of(module)
    seen = torch.randn(2, 4, 9, 8) if isinstance(module, nn.Conv2d) else torch.randn(2, 4, 9)
    outputs = module(seen)
    parts = [inputs_of_part(layer, part, seen) @ matrix_of(layer, part).T for part in range(layer.parts)]
    assert layer.parts == module.groups
    torch.testing.assert_close(torch.cat(parts, 1), outputs.flatten(2).transpose(1, 2).reshape(-1, outputs.shape[1]))


def test_columns_of_a_convolution_are_kernel_positions_first():
    """So that n:m groups run along the input channels, as they do in training."""
    module = nn.Conv2d(4, 3, 2, bias=False)
    matrix = matrix_of(layer_of(module), 0)
    for row, channel, (high, wide) in itertools.product(range(3), range(4), itertools.product(range(2), range(2))):
        assert matrix[row, (high * 2 + wide) * 4 + channel] == module.weight[row, channel, high, wide]


@pytest.mark.parametrize("module", [*CONVOLUTIONS, nn.Linear(5, 3), Conv1D(5, 3)], ids=str)
def test_a_matrix_that_is_put_back_is_the_parameter_again(module):
    layer = layer_of(module)
    before = layer.parameter.detach().clone()
    matrices = [matrix_of(layer, part).clone() for part in range(layer.parts)]
    assert torch.equal(torch.cat([as_part(layer, matrix) for matrix in matrices]), before)
    nn.init.zeros_(layer.parameter)
    address = layer.parameter.data_ptr()
    for part, matrix in enumerate(matrices):
        put_matrix(layer, part, matrix)
    assert torch.equal(layer.parameter, before)
    assert layer.parameter.data_ptr() == address


def test_linear_layers_of_both_orientations():
    for module in (nn.Linear(5, 3, bias=False), Conv1D(3, 5)):
        seen = torch.randn(2, 7, 5)
        layer = layer_of(module)
        torch.testing.assert_close(
            inputs_of_part(layer, 0, seen) @ matrix_of(layer, 0).T, module(seen).detach().reshape(-1, 3)
        )
