"""Sparse products in place of dense ones, for inference on a CPU: equal outputs, and a model that does not change."""

import copy
import logging

import pytest
import torch
from models import bert, gpt2
from torch import nn

import hf_prune
from hf_prune.errors import ArgumentError
from hf_prune.runtimes import csr, sparse_inference
from hf_prune.runtimes.csr import csr_linear, to_csr, why_no_kernels
from hf_prune.runtimes.sparse_inference import CsrForward

has_kernels = pytest.mark.skipif(why_no_kernels() is not None, reason=str(why_no_kernels()))

ALWAYS = {1: 2.0, 128: 2.0}


@pytest.fixture(params=[pytest.param(None, marks=has_kernels)])
def always(request, monkeypatch):
    """Every sparse layer is taken to be faster, whatever the clock says."""
    monkeypatch.setattr(sparse_inference, "LEAST_SPEEDUP", 0.0)


@pytest.fixture(params=[pytest.param(None, marks=has_kernels)])
def never(request, monkeypatch):
    monkeypatch.setattr(sparse_inference, "LEAST_SPEEDUP", float("inf"))


def zero_most(model, share=0.9):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter[torch.rand(parameter.shape, generator=generator) < share] = 0
    return model


def sparse_linear(*sizes, bias=True):
    return zero_most(nn.Linear(*sizes, bias=bias)).eval()


def batch(rows=3, length=8):
    return {"input_ids": torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))}


def logits(model, inputs):
    with torch.inference_mode():
        return model(**inputs).logits


# ---- The product ----


@pytest.mark.parametrize("shape", [(5,), (1, 5), (3, 5), (128, 5), (129, 5), (2, 200, 5), (0, 5), (2, 3, 0, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_a_linear_layer(shape, bias):
    layer = sparse_linear(5, 7, bias=bias)
    inputs = torch.randn(shape)
    with torch.no_grad():
        found, expected = csr_linear(inputs, to_csr(layer.weight), layer.bias), layer(inputs)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()


def test_zeros_are_left_out_and_indices_have_32_bits():
    layer = sparse_linear(50, 70)
    rows = to_csr(layer.weight)
    assert rows.values().numel() == int(layer.weight.count_nonzero()) < layer.weight.numel() / 5
    assert rows.crow_indices().dtype == rows.col_indices().dtype == torch.int32
    assert torch.equal(rows.to_dense(), layer.weight)


def test_other_processors_and_builds_have_no_kernels(monkeypatch):
    monkeypatch.setattr(csr.platform, "machine", lambda: "aarch64")
    assert "need an x86 processor, this one is aarch64" in why_no_kernels()
    monkeypatch.setattr(csr.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert "built with MKL" in why_no_kernels()
    found = hf_prune.sparse_inference(zero_most(bert()))
    assert not found.layers
    assert found.note == "Nothing was changed: sparse products need a torch that was built with MKL, this one was not."


# ---- A whole model ----


@pytest.mark.parametrize("build", [bert, gpt2])
def test_outputs_are_equal_and_the_state_dict_is_as_before(always, build):
    model = zero_most(build()).eval()
    before, types = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    names = [name for name, _ in model.named_parameters()]
    expected = logits(model, batch())
    with hf_prune.sparse_inference(model) as found:
        used = {one.name for one in found.layers if one.used}
        assert used
        assert {name for name, module in model.named_modules() if "forward" in module.__dict__} == used
        torch.testing.assert_close(logits(model, batch()), expected, atol=1e-5, rtol=1e-5)
        assert [type(module) for module in model.modules()] == types
        assert [name for name, _ in model.named_parameters()] == names
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    assert torch.equal(logits(model, batch()), expected)


def test_dense_ends_it_too_and_a_second_call_begins_anew(always):
    model = zero_most(bert()).eval()
    hf_prune.sparse_inference(model)
    again = hf_prune.sparse_inference(model)
    assert [one.used for one in again.layers].count(True) == len(again.layers) > 5
    assert hf_prune.dense(model) is model
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_every_layer_is_measured_with_its_rows_of_an_example_and_with_one(always):
    model = zero_most(bert()).eval()
    found = hf_prune.sparse_inference(model, batch(rows=3))
    by_name = {one.name: one for one in found.layers}
    assert set(by_name["bert.encoder.layer.0.output.dense"].ratios) == {1, 24}
    assert set(by_name["bert.pooler.dense"].ratios) == {1, 3}
    assert all(0.8 < one.sparsity < 1 and min(one.ratios.values()) > 0 for one in found.layers)
    assert found.speedup > 0
    assert "bert.pooler.dense: 8" in str(found) or "bert.pooler.dense: 9" in str(found)
    assert f"the whole model: {found.speedup:.2f}x" in str(found)


def test_where_nothing_pays_nothing_is_changed_and_it_is_said(never):
    model = zero_most(bert()).eval()
    found = hf_prune.sparse_inference(model, batch())
    assert found.layers
    assert not any(one.used for one in found.layers)
    assert found.note == "Nothing was changed: no layer is faster."
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_layers_with_few_zeros_or_another_precision_are_left_alone(always):
    assert "60% zeros" in hf_prune.sparse_inference(zero_most(bert(), 0.5)).note
    assert not hf_prune.sparse_inference(zero_most(bert()).bfloat16()).layers


def test_a_forward_of_somebody_else_is_left_alone(always):
    model = zero_most(bert()).eval()
    layer = model.bert.pooler.dense
    theirs = layer.forward
    layer.forward = theirs
    assert "bert.pooler.dense" not in {one.name for one in hf_prune.sparse_inference(model).layers}
    hf_prune.dense(model)
    assert layer.__dict__["forward"] == theirs


def test_an_example_that_does_not_fit_is_refused(always):
    model = zero_most(bert()).eval()
    with pytest.raises(ArgumentError, match="example: BertForSequenceClassification does not run with inputs"):
        hf_prune.sparse_inference(model, {"pixel_values": torch.ones(1, 3, 4, 4)})
    with pytest.raises(ArgumentError, match="expected inputs by name, such as a tokenizer gives, got list"):
        hf_prune.sparse_inference(model, [1, 2])
    assert not [module for module in model.modules() if "forward" in module.__dict__]


def test_modes_are_restored(always):
    model = zero_most(bert()).train()
    model.bert.eval()
    hf_prune.sparse_inference(model)
    assert model.training
    assert not model.bert.training


# ---- One layer: when the sparse product computes, and with which weight ----


@pytest.fixture
def layer(monkeypatch):
    """A layer with a sparse forward, and a list of the rows of each sparse product."""
    layer = sparse_linear(6, 9)
    layer.forward = CsrForward(layer, ALWAYS).forward
    products = []

    def counting(inputs, weight, bias):
        products.append(inputs.numel() // inputs.shape[-1])
        return csr_linear(inputs, weight, bias)

    monkeypatch.setattr(sparse_inference, "csr_linear", counting)
    return layer, products


def outputs_are_current(layer, rows=4):
    inputs = torch.randn(rows, layer.in_features)
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), nn.functional.linear(inputs, layer.weight, layer.bias))


def test_gradients_are_those_of_the_dense_product(layer, caplog):
    layer, products = layer
    layer.train()
    layer(torch.randn(2, 6)).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
    assert not products
    layer.eval()
    assert not caplog.records
    layer(torch.randn(2, 6)).sum().backward()
    layer(torch.randn(2, 6))
    assert not products
    assert ["torch.no_grad()" in record.message for record in caplog.records] == [True]
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    layer(torch.randn(2, 6))
    assert products == [2]


def test_autocast_and_other_precisions_use_the_dense_product(layer):
    layer, products = layer
    with torch.inference_mode():
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(2, 6)).dtype == torch.bfloat16
        layer.double()
        assert layer(torch.randn(2, 6, dtype=torch.float64)).dtype == torch.float64
    assert not products


def test_other_numbers_of_rows_than_those_measured_need_both_neighbours_to_be_faster():
    layer = sparse_linear(6, 9)
    forward = CsrForward(layer, {128: 2.0, 1: 0.5, 16: 1.5})
    assert [rows for rows in (1, 2, 15, 16, 17, 128, 5000) if forward._is_faster(rows)] == [16, 17, 128, 5000]


@pytest.mark.parametrize("change", ["step", "load", "assign", "new", "to"])
def test_a_changed_weight_is_noticed(layer, change):
    layer, products = layer
    outputs_are_current(layer)
    values = layer.weight.detach().clone() * 3
    if change == "step":
        layer.weight.grad = torch.where(layer.weight != 0, 1.0, 0.0)
        torch.optim.SGD([layer.weight], lr=0.5).step()
    elif change == "load":
        layer.load_state_dict({"weight": values, "bias": layer.bias.detach().clone()})
    elif change == "assign":
        layer.load_state_dict({"weight": values, "bias": layer.bias.detach().clone()}, assign=True)
    elif change == "new":
        layer.weight = nn.Parameter(values)
    else:
        layer.double().float()
        layer.weight.data = values
    outputs_are_current(layer)
    assert products == [4, 4]


def test_a_weight_with_fewer_zeros_is_computed_densely_and_it_is_said_once(layer, caplog):
    layer, products = layer
    zeros = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.fill_(1.0)
    outputs_are_current(layer)
    outputs_are_current(layer)
    assert not products
    assert ["has fewer zeros" in record.message for record in caplog.records] == [True]
    layer.load_state_dict({"weight": zeros, "bias": layer.bias})
    outputs_are_current(layer)
    assert products == [4]


def test_a_deep_copy_has_a_forward_of_its_own(layer):
    layer, products = layer
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(5)
    outputs_are_current(other)
    outputs_are_current(layer)
    assert products == [4, 4]
    hf_prune.dense(other)
    assert "forward" not in other.__dict__
    assert "forward" in layer.__dict__


def test_export_and_compilation_see_the_dense_product(layer):
    layer, products = layer
    program = torch.export.export(layer, (torch.randn(3, 6),))
    assert "sparse" not in str(program.graph)
    assert not products


def test_nothing_is_told_of_a_layer_that_is_used_as_it_should_be(layer, caplog):
    layer, products = layer
    with caplog.at_level(logging.WARNING):
        outputs_are_current(layer, rows=1)
    assert products == [1]
    assert not caplog.records
