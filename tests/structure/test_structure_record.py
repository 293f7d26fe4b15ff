"""`pruning_structure.json`: it says what was cut out, and the same can be cut out of the whole model again."""

import copy
import json

import pytest
import torch
from models import bert, llama

from hf_prune.errors import PruningStateError
from hf_prune.structure.coupled import find_families
from hf_prune.structure.record import (
    STRUCTURE_NAME,
    cut_of_record,
    describe_cut,
    is_cut,
    read_structure,
    write_structure,
)
from hf_prune.structure.shrink import cut_of, shrink_model


def families_of(model):
    return [*find_families(model, "neurons"), *find_families(model, "layers")]


@pytest.fixture
def cut():
    """The whole model, the small one, and the description of what was cut out."""
    whole = bert(num_hidden_layers=4)
    small = copy.deepcopy(whole)
    families = families_of(small)
    dropped = {}
    for group in (group for family in families for group in family.groups):
        is_gone = group.path.endswith(("0", "2")) if group.structure == "layers" else torch.arange(24) % 4 != 1
        dropped[group.name] = torch.tensor([is_gone]) if isinstance(is_gone, bool) else is_gone
    what = cut_of(families, dropped)
    content = describe_cut(what, {0: 1, 2: 1}, whole.config, parameters=(9, 5), weights=(8, 4))
    shrink_model(small, what)
    return whole, small, content


def test_a_description_is_read_as_it_was_written(cut, tmp_path):
    _, _, content = cut
    write_structure(tmp_path, content)
    assert read_structure(tmp_path) == content
    assert content["fields"] == {"intermediate_size": [24, 6], "num_hidden_layers": [4, 2]}
    assert content["groups"] == {"0": 1, "2": 1}
    assert (content["parameters"], content["weights"]) == ([9, 5], [8, 4])
    kept = [1, 5, 9, 13, 17, 21]
    assert content["units"] == {
        **{f"neurons of bert.encoder.layer.{index}": {"of": 24, "kept": kept} for index in (1, 3)},
        **{f"layers of bert.encoder.layer.{index}": {"of": 1, "kept": [0] * (index % 2)} for index in range(4)},
    }


def test_without_a_file_nothing_was_cut_out(tmp_path):
    assert read_structure(tmp_path) is None


def test_the_same_is_cut_out_of_the_whole_model_again(cut, tmp_path):
    whole, small, content = cut
    shrink_model(whole, cut_of_record(json.loads(json.dumps(content)), families_of(whole), tmp_path))
    assert whole.config.to_dict() == small.config.to_dict()
    assert all(map(torch.equal, whole.state_dict().values(), small.state_dict().values()))


def test_the_whole_model_and_the_one_that_was_left_are_told_apart(cut, tmp_path):
    whole, small, content = cut
    assert not is_cut(content, whole.config, tmp_path)
    assert is_cut(content, small.config, tmp_path)
    with pytest.raises(PruningStateError, match="expected a model with intermediate_size 24, or 6 after units"):
        is_cut(content, bert(num_hidden_layers=4, intermediate_size=12).config, tmp_path)


def test_units_that_a_model_does_not_have_are_refused(cut, tmp_path):
    _, _, content = cut
    for model in (llama(), bert(num_hidden_layers=4, intermediate_size=12)):
        with pytest.raises(PruningStateError, match=f"{STRUCTURE_NAME}: expected units of this model"):
            cut_of_record(content, families_of(model), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format_version", 2),
        ("parameters", [1]),
        ("weights", [1, "2"]),
        ("weights", None),
        ("fields", {"a": [1]}),
        ("groups", {"0": -1}),
        ("units", {"a": {"of": 2, "kept": [1, 0]}}),
        ("units", {"a": {"of": 2, "kept": [2]}}),
        ("units", {"a": {"of": 2, "kept": [0.0]}}),
        ("units", {"a": []}),
    ],
)
def test_a_description_that_cannot_be_used_is_refused(cut, tmp_path, name, value):
    _, _, content = cut
    write_structure(tmp_path, content | {name: value})
    with pytest.raises(PruningStateError, match="expected the units that were cut out") as caught:
        read_structure(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
