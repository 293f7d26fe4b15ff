"""Matrices that are rounded by rows: what the block has, what comes back, and what is refused."""

import json

import numpy as np
import pytest
import torch
from models import bert
from safetensors.torch import load_file, save_file
from test_reader import reader  # noqa: F401 (a fixture)

import hf_prune
from hf_prune.errors import PackedError
from hf_prune.packed.files import pack_file, unpack_file
from hf_prune.publish.card import write_card

LARGEST = {"int8": 127, "int4": 7}


def matrix():
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    return weight


def rounded(weight, kind):
    """The reference: in float32, row by row."""
    scales = weight.float().abs().amax(1, keepdim=True) / LARGEST[kind]
    scales[scales == 0] = 1
    return ((weight.float() / scales).round() * scales).to(weight.dtype)


@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_scale_times_number(kind, dtype, tmp_path, reader):  # noqa: F811
    weight = matrix().to(dtype)
    save_file({"weight": weight, "other": weight.clone()}, tmp_path / "dense")
    pack_file(tmp_path / "dense", tmp_path / "packed", rounded={"weight": kind})
    unpack_file(tmp_path / "packed", tmp_path / "again")
    found = load_file(tmp_path / "again")
    assert torch.equal(found["weight"], rounded(weight, kind))
    assert torch.equal(found["other"], weight)
    [read] = [array for name, array in reader["read_packed"](tmp_path / "packed") if name == "weight"]
    patterns = found["weight"].view(torch.int16).numpy().view("<u2") if dtype == torch.bfloat16 else found["weight"]
    assert np.array_equal(read, patterns)


def test_float32_is_rounded_to_bfloat16_before_if_both_are_asked_for(tmp_path):
    save_file({"weight": matrix()}, tmp_path / "dense")
    pack_file(tmp_path / "dense", tmp_path / "packed", to_bfloat16=True, rounded={"weight": "int8"})
    unpack_file(tmp_path / "packed", tmp_path / "again")
    assert torch.equal(load_file(tmp_path / "again")["weight"], rounded(matrix().bfloat16(), "int8"))


@pytest.mark.parametrize(
    "weight",
    [
        matrix().half(),
        matrix().flatten(),
        torch.full((40, 64), torch.inf),
        torch.full((40, 64), torch.finfo(torch.float32).max),
        torch.full((40, 64), torch.nan),
        torch.zeros(7, 0),
    ],
)
def test_what_cannot_be_rounded_is_refused(weight, tmp_path):
    save_file({"weight": weight}, tmp_path / "dense")
    with pytest.raises(PackedError, match="weight: expected"):
        pack_file(tmp_path / "dense", tmp_path / "packed", rounded={"weight": "int8"})


def test_a_model_opens_with_rounded_embeddings_and_says_so(tmp_path):
    dense = bert(hidden_size=64, intermediate_size=128)
    dense.save_pretrained(tmp_path / "dense")
    hf_prune.save_packed(tmp_path / "dense", tmp_path / "packed", embeddings="int8")
    found = type(dense).from_pretrained(tmp_path / "packed").state_dict()
    changed = {name for name, tensor in dense.state_dict().items() if not torch.equal(tensor, found[name])}
    assert changed == {name for name in found if name.endswith("embeddings.weight")}
    for name in changed:
        assert torch.equal(found[name], rounded(dense.state_dict()[name], "int8"))
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["embeddings"] == "int8"
    card = write_card(tmp_path / "packed").read_text()
    assert "the embeddings were rounded to int8 with a scale for each row" in card
    hf_prune.unpack(tmp_path / "packed", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in found.items())
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "dense" / "config.json").read_text()
    with pytest.raises(PackedError, match="embeddings: expected int8 or int4, or None, got 'int3'"):
        hf_prune.save_packed(tmp_path / "dense", tmp_path / "other", embeddings="int3")
