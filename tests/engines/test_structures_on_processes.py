"""Structures on several processes: the same units on all, and a small model is saved, also of a sharded one."""

import pytest
import torch
import train_structures
from forks import run_group
from transformers import AutoModelForSequenceClassification

from hf_prune.structure.chosen import read_chosen
from hf_prune.structure.coupled import find_families
from hf_prune.structure.record import cut_of_record, read_structure

SIZES = {"small": (16, 6, 2), "narrow": (8, 24, 4), "different": (16, 24, 3)}


def saved_by(directory, engine, kind="small"):
    """What a group of two processes saved, as plain transformers opens it, and the record of what was cut out."""
    ended = run_group(2, train_structures.main, directory, engine, kind)
    assert [one.returncode for one in ended] == [0, 0], "\n".join(one.stderr[-3000:] for one in ended)
    opened, loading = AutoModelForSequenceClassification.from_pretrained(directory / "saved", output_loading_info=True)
    assert not any(loading.values()), loading
    config = opened.config.to_dict()
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == SIZES[kind]
    return opened, read_structure(directory / "saved")


def cut_out_of(weights, record, directory, kind):
    """The weights without the units that the record says are gone."""
    structures = [config["structure"] for config in train_structures.CONFIGS[kind]]
    found = [family for one in structures for family in find_families(train_structures.dense(), one)]
    families = [family for one in found for family in one.with_tied]
    return cut_of_record(record, families, directory).tensors(weights)


def test_replicated_processes_end_with_the_same_small_model(tmp_path):
    opened, _ = saved_by(tmp_path, "ddp")
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    weights = dict(opened.named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in result["weights"].items() if name in weights)


@pytest.mark.parametrize("kind", ["target", pytest.param("target_per_layer", marks=pytest.mark.widths_per_layer)])
@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_the_first_process_chooses_for_a_target_and_all_prune_the_same(tmp_path, engine, kind):
    ended = run_group(2, train_structures.main, tmp_path, engine, kind)
    assert [one.returncode for one in ended] == [0, 0], "\n".join(one.stderr[-3000:] for one in ended)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    left = torch.load(tmp_path / "result.pt", weights_only=True)["left"]
    assert sum(parameter.numel() for parameter in opened.parameters()) == left
    chosen = read_chosen(tmp_path / "saved")
    assert chosen.candidate.parameters == left
    assert chosen.reached_speedup > 0  # of a sharded model: one of the sizes that are saved is timed


@pytest.mark.slow
def test_a_stock_trainer_that_would_save_a_sharded_model_whole_is_refused_before_training(tmp_path):
    case = {"engine": "fsdp", "configs": train_structures.CONFIGS["small"], "callback": True}
    ended = run_group(2, train_structures.run_refused, tmp_path, case)
    assert [one.returncode for one in ended] == [0, 0], "\n".join(one.stderr[-3000:] for one in ended)
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "structure: cannot be removed in PruningCallback from a model that is sharded over processes" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["small", "narrow", "different"])
def test_a_sharded_model_is_saved_as_the_smaller_one(tmp_path, kind):
    opened, record = saved_by(tmp_path, "fsdp", kind)
    result = torch.load(tmp_path / "result.pt", weights_only=True)
    expected = cut_out_of(result["weights"], record, tmp_path, kind)
    for name, weight in opened.named_parameters():
        assert torch.equal(weight, expected[name]), name
