"""Where the parts of a tensor lie, what processes say when something is wrong, and how little they send."""

import math

import pytest
import torch
from workers import Workers

from hf_prune.regions import Region, flat_range


@pytest.fixture(scope="module")
def four():
    with Workers(4) as workers:
        yield workers


def assert_parts_are_where_they_are_said_to_be(answers, shape):
    """Each process holds the indices that its region names; those that count hold the tensor once."""
    counted = []
    for local, holding in answers:
        indices = holding.region.indices(torch.arange(holding.region.weights))
        assert local.tolist() == indices.tolist()
        inside, positions = holding.region.positions(torch.arange(math.prod(shape)))
        assert positions.tolist() == list(range(holding.region.weights))
        assert int(inside.sum()) == holding.region.weights
        if holding.counted:
            counted += indices.tolist()
    assert sorted(counted) == list(range(math.prod(shape)))
    for rank, (_, holding) in enumerate(answers):
        assert rank in holding.peers
        together = [index for peer in holding.peers for index in answers[peer][0].tolist()]
        assert sorted(together) == list(range(math.prod(shape)))


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((4,), [0]),
        ((4,), [1]),
        ((2, 2), [0, 1]),
        ((2, 2), [1, 0]),
        ((2, 2), [0, 0]),
        ((2, 2), ["whole", 0]),
        ((2, 2), [1, "whole"]),
        ((4,), ["whole"]),
    ],
)
@pytest.mark.parametrize("shape", [(8, 4), (5, 3), (2, 7), (3, 4, 2), (1, 1)])
def test_parts_of_dtensors(four, shape, mesh, placements):
    answers = four.run("held_of_dtensor", [(shape, mesh, placements)] * 4)
    assert_parts_are_where_they_are_said_to_be(answers, shape)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(8, 4), (6, 6), (4, 2)])
def test_parts_of_fsdp_over_tensor_parallelism(four, shape, dim):
    answers = four.run("held_of_fsdp_over_tensor_parallelism", [(shape, (2, 2), dim)] * 4)
    assert_parts_are_where_they_are_said_to_be(answers, shape)


def test_a_placement_that_is_not_supported_is_refused_by_the_name_of_the_tensor(four):
    for message in four.run("refusal_of_a_partial_tensor", [()] * 4):
        assert "layers.0.weight: expected a tensor that is replicated or sharded" in message


# ---- Replicas ----


def test_equal_masks_of_replicas_cost_sixteen_bytes(four):
    masks = {f"w{index}": torch.rand(64, 64) < 0.5 for index in range(3)}
    for message, (calls, sent) in four.run("refusal_of_different_masks", [(masks,)] * 4):
        assert message is None
        assert (calls, sent) == (1, 16)


def test_a_mask_that_differs_is_told_on_every_process_with_the_tensor_and_the_ranks(four):
    masks = {f"layers.{index}.weight": torch.rand(8, 8) < 0.5 for index in range(3)}
    other = {name: mask.clone() for name, mask in masks.items()}
    other["layers.1.weight"][3, 4] ^= True
    for message, _ in four.run("refusal_of_different_masks", [(masks,), (other,), (masks,), (other,)]):
        assert message.startswith("layers.1.weight: expected the same mask on all processes")
        assert "ranks 1, 3 came to another than rank 0" in message


def test_whole_tensors_of_a_model_that_is_partly_sharded_are_compared(four):
    mask = torch.rand(8, 8) < 0.5
    task = "refusal_of_a_different_mask_beside_a_sharded_one"
    assert four.run(task, [(mask,)] * 4) == [None] * 4
    for message in four.run(task, [(mask,), (mask,), (mask,), (~mask,)]):
        assert message.startswith("whole: expected the same mask on all processes")
        assert "rank 3 came to another than rank 0" in message


@pytest.mark.parametrize("bad_rank", [0, 3])
def test_a_weight_that_is_not_finite_on_one_process_stops_all_before_any_mask_changes(four, bad_rank):
    config = {"sparsity": 0.5, "targets": ["weight"], "schedule": "one_shot", "begin": 1}
    for message, is_dense in four.run("update_with_nan", [(config, bad_rank)] * 4):
        assert message.startswith("weight: expected finite weights")
        assert is_dense


# ---- What goes over the wire ----


def bytes_of_an_update(workers, scope, tensors, side, pattern="unstructured"):
    """The bytes that one process hands to collectives, and in how many calls, for tensors cut by rows."""
    rows = side // workers.processes
    shape = (side, side)
    targets = [(f"w{index}", shape, "matrix") for index in range(tensors)]
    config = {"sparsity": 0.5, "scope": scope, "pattern": pattern}
    arguments = []
    for rank in range(workers.processes):
        generator = torch.Generator().manual_seed(rank)
        region = Region(shape, (rank * rows, 0), (rows, side))
        parts = {
            name: (
                torch.randn(rows * side, generator=generator).bfloat16(),  # with many ties
                torch.ones(rows * side, dtype=torch.bool),
                region,
                True,
                tuple(range(workers.processes)),
            )
            for name, _, _ in targets
        }
        arguments.append((config, targets, [0.1, 0.5], parts))
    [counted] = {tuple(answer) for answer in workers.run("bytes_of_an_update", arguments)}
    return counted


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1"])
def test_bytes_do_not_grow_with_the_weights(four, pattern):
    """Sixteen times the weights: the same bytes in as many calls, but for a digit more of the ties' indices."""
    for scope in ("global", "layer"):
        calls, sent = bytes_of_an_update(four, scope, tensors=3, side=64, pattern=pattern)
        more_calls, more_sent = bytes_of_an_update(four, scope, tensors=3, side=256, pattern=pattern)
        assert more_calls <= calls + 4
        assert more_sent <= sent + 4 * 3 * 256 * 8


def test_a_global_update_sends_as_much_for_many_tensors_and_a_layer_wise_one_some_kibibytes_each(four):
    _, few = bytes_of_an_update(four, "global", tensors=2, side=64)
    _, many = bytes_of_an_update(four, "global", tensors=32, side=64)
    # In two updates: some counts a tensor, and a digit more of the ties' indices.
    assert many - few < 2 * (30 * 4 * 8 + 256 * 8)
    _, few = bytes_of_an_update(four, "layer", tensors=2, side=64)
    _, many = bytes_of_an_update(four, "layer", tensors=32, side=64)
    a_tensor = (many - few) / 30 / 2  # in each of two updates
    assert 2 * 1024 < a_tensor < 32 * 1024


def test_a_range_is_cut_to_the_end_of_the_tensor():
    assert flat_range(10, 8, 4) == Region((10,), (8,), (2,))
    assert flat_range(10, 12, 4) == Region((10,), (10,), (0,))
