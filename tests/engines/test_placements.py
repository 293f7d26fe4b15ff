"""Where the parts of a tensor lie, what processes say when something is wrong, and how little they send."""

import math
import os

import pytest
import torch
from models import bert, mixtral
from workers import Workers

from hf_prune import Pruner, PruningConfig, PruningStateError
from hf_prune.engines.regions import Region, flat_range
from hf_prune.saved.masks import mask_files
from hf_prune.trainer.claims import claimed


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


@pytest.mark.parametrize("placement", [0, 1, 2])
def test_an_expert_of_zeros_is_found_wherever_its_parts_lie(four, placement):
    down = dict(mixtral().named_parameters())["model.layers.0.mlp.experts.down_proj"]
    answers = four.run("zeros_of_sharded_experts", [(placement,)] * 4)
    for masked, _ in answers:
        assert set(masked.values()) == {down.shape[2]}
    for name in answers[0][0]:
        assert sum(kept[name] for _, kept in answers) == down.numel() - down.shape[2]


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
        assert "got other masks on ranks 1, 3 than on rank 0" in message


def test_whole_tensors_of_a_model_that_is_partly_sharded_are_compared(four):
    mask = torch.rand(8, 8) < 0.5
    task = "refusal_of_a_different_mask_beside_a_sharded_one"
    assert four.run(task, [(mask,)] * 4) == [None] * 4
    for message in four.run(task, [(mask,), (mask,), (mask,), (~mask,)]):
        assert message.startswith("whole: expected the same mask on all processes")
        assert "got other masks on rank 3 than on rank 0" in message


@pytest.mark.parametrize("bad_rank", [0, 3])
def test_a_weight_that_is_not_finite_on_one_process_stops_all_before_any_mask_changes(four, bad_rank):
    config = {"sparsity": 0.5, "targets": ["weight"], "schedule": "one_shot", "begin": 1}
    for message, is_dense in four.run("update_with_nan", [(config, bad_rank)] * 4):
        assert message.startswith("weight: expected finite weights")
        assert is_dense


# ---- What goes over the wire ----


ROWS = (4,)  # a mesh of four processes, each with rows of every tensor
COPIES = (2, 2)  # two copies of two parts


def sent_in_updates(workers, config, shape, tensors=1, mesh=ROWS):
    """What each process hands to collectives in two whole updates of a pruner: calls, bytes, and the dtypes."""
    return workers.run("sent_in_updates", [(config, shape, tensors, mesh)] * workers.processes)


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("mesh", [ROWS, COPIES])
def test_bytes_do_not_grow_with_the_weights(four, scope, pattern, mesh):
    """Sixteen times the weights: the same bytes in as many calls, but for a digit more of the ties' indices."""
    config = {"scope": scope, "pattern": pattern}
    small = sent_in_updates(four, config, (64, 64), tensors=3, mesh=mesh)
    large = sent_in_updates(four, config, (256, 256), tensors=3, mesh=mesh)
    for (calls, sent, dtypes), (more_calls, more_sent, more_dtypes) in zip(small, large, strict=True):
        assert more_calls <= calls + 4
        assert more_sent <= sent + 4 * 3 * 256 * 8
        assert dtypes == more_dtypes == {torch.int64}


def test_a_global_update_sends_as_much_for_many_tensors_and_a_layer_wise_one_some_kibibytes_each(four):
    _, few, _ = sent_in_updates(four, {"scope": "global"}, (64, 64), tensors=2)[0]
    _, many, _ = sent_in_updates(four, {"scope": "global"}, (64, 64), tensors=32)[0]
    # In two updates: some counts a tensor, and a digit more of the ties' indices.
    assert many - few < 2 * (30 * 6 * 8 + 256 * 8)
    _, few, _ = sent_in_updates(four, {"scope": "layer"}, (64, 64), tensors=2)[0]
    _, many, _ = sent_in_updates(four, {"scope": "layer"}, (64, 64), tensors=32)[0]
    a_tensor = (many - few) / 30 / 2  # in each of two updates
    assert 2 * 1024 < a_tensor < 32 * 1024


@pytest.mark.parametrize(("pattern", "mesh", "shared_rows"), [("block:8x1", ROWS, 16), ("block:16x1", COPIES, 16)])
def test_of_blocks_that_lie_across_parts_seventeen_bytes_a_weight_are_sent(four, pattern, mesh, shared_rows):
    """Parts of 12 and 24 rows. Sixteen bytes go to the process that ranks the block, and one comes back."""
    narrow = sent_in_updates(four, {"pattern": pattern}, (48, 256), mesh=mesh)
    wide = sent_in_updates(four, {"pattern": pattern}, (48, 2048), mesh=mesh)
    copies = math.prod(mesh) // mesh[-1]
    grown = sum(more[1] - sent[1] for sent, more in zip(narrow, wide, strict=True))
    updates, columns = 2, 2048 - 256
    expected = 17 * updates * copies * shared_rows * columns
    counts = 4 * updates * 2 * 4 * 256 * 8  # on four processes: a digit more of ties, or a shortlist tried
    assert expected <= grown <= expected + counts
    assert counts < expected / 4
    for _, _, dtypes in (*narrow, *wide):
        assert dtypes == {torch.int64, torch.uint8}


def test_a_range_is_cut_to_the_end_of_the_tensor():
    assert flat_range(10, 8, 4) == Region((10,), (8,), (2,))
    assert flat_range(10, 12, 4) == Region((10,), (10,), (0,))


def test_masks_that_processes_have_saved_are_those_that_their_state_was_saved_with(four, tmp_path):
    sparsities = four.run("save_shards", [(tmp_path,)] * 4)
    torch.manual_seed(0)
    whole = Pruner(bert(), PruningConfig(sparsity=0.5, schedule="one_shot", begin=0), 10)
    assert sparsities == [whole.sparsity] * 4
    other = Pruner(bert(), whole.configs)
    other.load(tmp_path)
    assert all(torch.equal(other.masks[name], mask) for name, mask in whole.masks.items())
    second = mask_files(tmp_path)[1]
    content = second.read_bytes()
    second.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PruningStateError, match=f"{second.name}: the mask of .* has changed since it was saved"):
        other.load(tmp_path)
    second.unlink()
    with pytest.raises(PruningStateError, match=r"expected the masks of .* weights"):
        other.load(tmp_path)


def test_a_folder_that_another_process_has_claimed_is_refused_by_every_process(four, tmp_path):
    with claimed(tmp_path, writes=True):
        first, *others = four.run("refusal_of_a_claim", [(tmp_path,)] * 4)
    assert f"{tmp_path}, where process {os.getpid()} on " in first
    assert others == [f"output_dir: the process that writes to {tmp_path} cannot use it"] * 3
    assert four.run("refusal_of_a_claim", [(tmp_path,)] * 4) == [None] * 4
    assert list(tmp_path.iterdir()) == []
