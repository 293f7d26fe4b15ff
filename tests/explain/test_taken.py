"""Zeros by matrix and unit, dead units and rank, of models with masks and with units cut out."""

import pytest
import torch
from models import bert, gpt2, llama, mixtral
from shrunk import save_shrunk

from hf_prune.explain.taken import dense_name, effective_rank, matrices_of, units_of
from hf_prune.saved.model import SavedModel
from hf_prune.saved.removed import LayersLeft


def test_effective_rank_of_known_matrices():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)
    assert effective_rank(torch.diag(torch.tensor([2.0, 1, 1]))) == pytest.approx(2 * 2**0.5, rel=1e-6)
    assert effective_rank(torch.zeros(4, 4)) == 0


def test_dead_rows_columns_heads_and_neurons_are_found():
    model = bert()
    layer = model.bert.encoder.layer[1]
    with torch.no_grad():
        attention = layer.attention
        for linear in (attention.self.query, attention.self.key, attention.self.value):
            linear.weight[8:] = 0  # the second head
            linear.bias[8:] = 0
        attention.output.dense.weight[:, 8:] = 0
        layer.intermediate.dense.weight[3] = 0
        layer.intermediate.dense.bias[3] = 0
        layer.output.dense.weight[:, 3] = 0
    matrices = {one.name: one for one in matrices_of(model, bert())}
    query = matrices["bert.encoder.layer.1.attention.self.query.weight"]
    assert (query.kind, query.layer, query.zeros, query.zero_rows, query.zero_columns) == (
        *("attention.self.query", 1),
        *(8 * 16, 8, 0),
    )
    assert matrices["bert.encoder.layer.1.output.dense.weight"].zero_columns == 1
    assert query.effective_rank < 8 < query.dense_effective_rank
    units, notes = units_of(model)
    assert notes == []
    dead = {(one.structure, one.layer): (one.dead, one.units) for one in units}
    assert dead == {("neurons", 0): (0, 24), ("neurons", 1): (1, 24), ("heads", 0): (0, 2), ("heads", 1): (1, 2)}
    neurons = next(one for one in units if (one.structure, one.layer) == ("neurons", 1))
    assert neurons.zeros[3] == 1
    # the head of BERT that is left has its bias, which is zero in a new model
    heads = next(one for one in units if (one.structure, one.layer) == ("heads", 0))
    assert heads.zeros == pytest.approx([3 * 8 / (3 * 8 * 17 + 16 * 8)] * 2)


def test_many_units_have_quantiles():
    [first, *_] = units_of(bert(intermediate_size=200))[0]
    assert first.are_quantiles
    assert (first.units, len(first.zeros)) == (200, 65)


@pytest.mark.parametrize("build", [gpt2, llama, mixtral])
def test_zeros_of_all_units_are_those_of_their_tensors(build):
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) < 0.3] = 0
    neurons = [one for one in units_of(model)[0] if one.structure == "neurons"]
    assert neurons
    for one in neurons:
        assert sum(one.zeros) / one.units == pytest.approx(0.3, abs=0.08)
    matrices = matrices_of(model)
    assert {one.effective_rank is None for one in matrices if len(one.shape) == 3} <= {True}
    assert sum(one.zeros for one in matrices) / sum(one.weights for one in matrices) == pytest.approx(0.3, abs=0.02)


def test_layers_that_are_left_are_compared_with_those_that_they_were(tmp_path):
    save_shrunk(tmp_path)
    saved = SavedModel(tmp_path)
    model = type(saved.skeleton).from_pretrained(tmp_path)
    [stack] = saved.removed.layers
    dense = bert(num_hidden_layers=4)
    with torch.no_grad():
        dense.bert.encoder.layer[stack.kept[1]].attention.self.query.weight.copy_(torch.eye(16))
    found = {one.name: one for one in matrices_of(model, dense, removed=saved.removed.layers)}
    last = found["bert.encoder.layer.1.attention.self.query.weight"]
    assert last.dense_effective_rank == pytest.approx(16)
    assert last.effective_rank < 16
    assert {one.layer for one in found.values()} == set(stack.kept) != {0, 1}
    assert last.layer == stack.kept[1]
    units, _ = units_of(model, saved.removed.layers)
    assert {one.layer for one in units} == set(stack.kept)


def test_names_before_layers_were_removed():
    removed = [LayersLeft("encoder.layer", 6, (0, 2, 5))]
    assert dense_name("encoder.layer.2.output.weight", removed) == "encoder.layer.5.output.weight"
    assert dense_name("pooler.weight", removed) == "pooler.weight"
