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


def test_a_shard_that_is_not_finite_stops_every_process(two):
    for said in two.run("refusal_of_broken_shards", [[1], [1]]):
        assert "weight: expected finite weights" in said


def test_shards_resume_from_their_residuals(two, tmp_path):
    for same, any_residual in two.run("saved_and_resumed_sharing", [[str(tmp_path)]] * 2):
        assert all(same)
        assert any_residual


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_trainer_on_processes_saves_few_values_and_resumes_to_the_bit(engine, tmp_path):
    config = {"sparsity": 0.5, "scope": "global", "begin": 2, "end": 4, "frequency": 1, "shared_values": 4}
    case = {
        "engine": engine,
        "model": "bert",
        "configs": [config],
        "compare": False,
        "arguments": SAVE,
        "weights_at": [5],
    }
    launch(2, tmp_path, {"whole": case})
    results = launch(2, tmp_path, {"resumed": case | {"resume": str(tmp_path / "whole" / "checkpoint-5")}})
    whole = torch.load(tmp_path / "whole" / "result.pt", weights_only=True)
    assert_same_to_the_bit(whole, results["resumed"])
    assert_saved_as_masked(tmp_path / "whole", whole)
    for folder in ("saved", "checkpoint-5", "checkpoint-10"):
        report = make_report(tmp_path / "whole" / folder)
        assert {tensor.distinct_values for tensor in report.prunable} == {4}
