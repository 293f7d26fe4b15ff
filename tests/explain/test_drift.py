"""Hidden states by depth, against those that transformers returns, also of models with other depths and widths."""

import copy

import pytest
import torch
from models import bert, llama
from text_models import tokenizer
from transformers import DataCollatorWithPadding

from hf_prune.explain.drift import _Alignment, drift_of
from hf_prune.explain.samples import Reader, Samples
from hf_prune.saved.removed import LayersLeft

ROWS = [{"input_ids": list(range(3, 3 + length)), "attention_mask": [1] * length} for length in (7, 4, 9)]


def reader_of(model):
    return Reader(model, DataCollatorWithPadding(tokenizer()))


def drift(pruned, dense, removed=()):
    return drift_of(reader_of(pruned), reader_of(dense), Samples(rows=ROWS), 2, removed)


def states_of(model, rows):
    with torch.no_grad():
        return [
            model.eval()(input_ids=torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
            for row in rows
        ]


def test_the_distance_is_that_of_the_hidden_states():
    dense, pruned = bert(), bert()
    found, notes = drift(pruned, dense)
    assert notes == []
    pairs = list(zip(states_of(pruned, ROWS), states_of(dense, ROWS), strict=True))
    for one in found:
        tokens = [
            ((own[one.layer + 1] - other[one.layer + 1]).square().sum(-1) / other[one.layer + 1].square().sum(-1))[0]
            for own, other in pairs
        ]
        assert one.by == "distance"
        assert one.moved == pytest.approx(float(torch.cat(tokens).mean()), rel=1e-4)


def test_layers_that_are_left_are_compared_with_those_that_they_were():
    dense = llama(num_hidden_layers=4)
    pruned = copy.deepcopy(dense)
    pruned.model.layers = torch.nn.ModuleList([pruned.model.layers[0], pruned.model.layers[3]])
    pruned.config.num_hidden_layers = 2
    found, _ = drift(pruned, dense, [LayersLeft("model.layers", 4, (0, 3))])
    assert [one.moved is None for one in found] == [False, True, True, False]
    assert found[0].moved == 0  # before any layer is skipped; without the norm after the last layer
    assert found[3].moved > 0
    found, [note] = drift(pruned, dense)
    assert found == []
    assert "2 layers are left of 4" in note


def test_other_widths_are_aligned():
    dense = bert()
    found, _ = drift(bert(hidden_size=8), dense)
    assert {one.by for one in found} == {"cka"}
    assert 0 <= found[0].moved <= 1
    same, _ = drift(dense, dense)
    assert [one.moved for one in same] == [0, 0]


def test_linear_cka_of_a_rotation_is_one():
    states = torch.randn(50, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    alignment = _Alignment()
    for rows in (slice(0, 20), slice(20, 50)):
        alignment.add(3 * states[rows] @ rotation + 1, states[rows])
    assert alignment.value == pytest.approx(0, abs=1e-9)
    other = _Alignment()
    other.add(torch.randn(50, 4, dtype=torch.float64), states)
    assert other.value > 0.3
