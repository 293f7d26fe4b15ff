"""Weights share the values that they would share on one process, whole or sharded; a file has them all."""

import pytest
import tasks
import torch
from launching import SAVE, assert_same_to_the_bit, assert_saved_as_masked, launch
from test_allotting_on_processes import batches
from workers import Workers

from hf_prune.saved.report import make_report


@pytest.fixture(scope="module")
def two():
    with Workers(2) as workers:
        yield workers


@pytest.mark.parametrize("sharded", [False, True])
def test_processes_come_to_the_codebooks_of_one(two, sharded):
    """To the bit from the same weights, and to rounding after steps whose gradients are added up in another order."""
    first, last, _, masked = tasks.shared_from(batches(2), 3)
    parts = batches(2)
    results = two.run("shared_from", [[parts[:1], 3, sharded], [parts[1:], 3, sharded]])
    for name, codebook in first.items():
        for of_rank in results:
            assert torch.equal(of_rank[0][name], codebook), name
        assert torch.equal(results[0][1][name], results[1][1][name]), name
        together = torch.cat([of_rank[2][name] for of_rank in results]).unique()
        assert together[together != 0].tolist() == results[0][1][name].tolist()
        assert len(results[0][1][name]) == 4
        torch.testing.assert_close(results[0][1][name], last[name], rtol=0.05, atol=1e-3)
    assert results[0][3] == results[1][3] == masked
    assert not all(torch.equal(first[name], codebook) for name, codebook in last.items())


@pytest.mark.parametrize(
    "fields", [{"shared_values": 4, "shared_values_granularity": "row"}, {"shared_values": "int4"}]
)
def test_shards_of_rows_have_the_values_of_one_process_to_the_bit(two, fields):
    results = two.run("shared_in_groups", [[fields, True]] * 2)
    for step, alone in enumerate(tasks.shared_in_groups(fields)):
        for name, weight in alone.items():
            assert torch.equal(torch.cat([of_rank[step][name] for of_rank in results]), weight), name


def test_groups_that_are_cut_are_refused_on_every_process(two):
    for said in two.run("refusal_of_cut_groups", [[], []]):
        assert "shared_values_granularity: expected groups of weights that lie on one process each, got weight" in said


def test_a_shard_that_is_not_finite_stops_every_process(two):
    for said in two.run("refusal_of_broken_shards", [[1], [1]]):
        assert "weight: expected finite weights" in said


def test_shards_resume_from_their_residuals(two, tmp_path):
    for same, any_residual in two.run("saved_and_resumed_sharing", [[str(tmp_path)]] * 2):
        assert all(same)
        assert any_residual


CONFIG = {"sparsity": 0.5, "scope": "global", "begin": 2, "end": 4, "frequency": 1, "shared_values": 4}


def check_saved_and_resumed(case, directory):
    """A training on two processes saves few values, and one that goes on from its checkpoint ends the same."""
    case = {"model": "bert", "configs": [CONFIG], "compare": False, "arguments": SAVE, "weights_at": [5]} | case
    launch(2, directory, {"whole": case})
    results = launch(2, directory, {"resumed": case | {"resume": str(directory / "whole" / "checkpoint-5")}})
    whole = torch.load(directory / "whole" / "result.pt", weights_only=True)
    assert_same_to_the_bit(whole, results["resumed"])
    assert_saved_as_masked(directory / "whole", whole)
    for folder in ("saved", "checkpoint-5", "checkpoint-10"):
        report = make_report(directory / "whole" / folder)
        assert {tensor.distinct_values for tensor in report.prunable} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_trainer_on_processes_saves_few_values_and_resumes_to_the_bit(engine, tmp_path):
    check_saved_and_resumed({"engine": engine}, tmp_path)
