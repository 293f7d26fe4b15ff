"""Parts of tensors: where their weights lie, and masks that are saved in some parts and read in others."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune import PruningStateError
from hf_prune.engines.regions import Region, flat_range, whole
from hf_prune.saved.masks import MASKS_NAME, mask_files, read_masks, write_mask_shard, write_masks

quick = settings(max_examples=60, deadline=None, derandomize=True)

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def parts(draw, shape):
    """A tensor cut along one dimension, or its flattened form cut into ranges; some parts may be empty."""
    count = draw(st.integers(1, 4))
    flat = draw(st.booleans())
    dim = 0 if flat else draw(st.integers(0, len(shape) - 1))
    length = math.prod(shape) if flat else shape[dim]
    edges = [0, *sorted(draw(st.lists(st.integers(0, length), min_size=count - 1, max_size=count - 1))), length]
    regions = []
    for first, last in pairwise(edges):
        if flat:
            regions.append(flat_range(math.prod(shape), first, last - first))
        else:
            start, size = [0] * len(shape), list(shape)
            start[dim], size[dim] = first, last - first
            regions.append(Region(shape, tuple(start), tuple(size)))
    return regions


def part_of(tensor, region):
    box = tuple(slice(start, start + size) for start, size in zip(region.start, region.size, strict=True))
    return tensor.reshape(region.shape)[box]


@quick
@given(data=st.data(), shape=shapes)
def test_positions_and_indices_are_each_others_inverse(data, shape):
    indices = torch.arange(math.prod(shape))
    for region in data.draw(parts(shape)):
        here = part_of(indices.reshape(shape), region).reshape(-1)
        assert region.indices(torch.arange(region.weights)).tolist() == here.tolist()
        inside, positions = region.positions(indices)
        assert indices[inside].tolist() == here.tolist()
        assert positions.tolist() == list(range(region.weights))


@quick
@given(data=st.data(), shape=shapes)
def test_slices_have_the_weights_of_each_row_of_the_whole_tensor(data, shape):
    indices = torch.arange(math.prod(shape)).reshape(shape)
    for region in data.draw(parts(shape)):
        here = region.indices(torch.arange(region.weights))
        for row, positions in zip(indices, region.slices(shape[0]), strict=True):
            assert here[positions].tolist() == sorted({*row.reshape(-1).tolist()} & {*here.tolist()})
        assert region.slices(1) == [slice(0, region.weights)]


@quick
@given(data=st.data(), shape=shapes)
def test_parts_overlap_where_they_have_a_weight_in_common(data, shape):
    for first in data.draw(parts(shape)):
        for second in data.draw(parts(shape)):
            common = set(first.indices(torch.arange(first.weights)).tolist())
            common &= set(second.indices(torch.arange(second.weights)).tolist())
            assert first.overlaps(second) or not common
            if first.shape == second.shape:
                assert first.overlaps(second) == bool(common)


@settings(quick, max_examples=40)
@given(data=st.data(), shape=shapes)
def test_masks_saved_in_parts_are_read_in_any_other_parts(data, shape, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    saved = data.draw(parts(shape), label="saved")
    for rank, region in enumerate(saved):
        masks = {"w": part_of(mask, region)} if region.weights else {}
        write_mask_shard(folder, masks, {"w": region}, rank, len(saved))
    for region in [*data.draw(parts(shape), label="read"), whole(shape)]:
        read = read_masks(folder, {"w": shape}, {"w": region})["w"]
        assert torch.equal(read, part_of(mask, region))


def test_files_of_another_number_of_processes_are_replaced(tmp_path):
    mask = torch.rand(6, 4) < 0.5
    rows = [Region((6, 4), (2 * rank, 0), (2, 4)) for rank in range(3)]

    def save(count):
        for rank in range(count):
            size = 6 // count
            region = Region((6, 4), (size * rank, 0), (size, 4))
            write_mask_shard(tmp_path, {"w": part_of(mask, region)}, {"w": region}, rank, count)

    save(3)
    assert [file.name[-22:-12] for file in mask_files(tmp_path)] == ["1-of-00003", "2-of-00003", "3-of-00003"]
    save(2)
    assert len(mask_files(tmp_path)) == 2
    write_masks(tmp_path, {"w": mask})
    assert [file.name for file in tmp_path.iterdir()] == [MASKS_NAME]
    save(3)
    write_mask_shard(tmp_path, {}, {}, 2, 3)
    with pytest.raises(PruningStateError, match="expected the masks of 24 weights of 'w', found those of 16"):
        read_masks(tmp_path, {"w": (6, 4)}, {"w": rows[0]})


def test_a_part_that_is_missing_or_there_twice_is_refused(tmp_path):
    shape = (4, 4)
    for rank, start in enumerate((0, 0)):
        region = Region(shape, (start, 0), (4, 4))
        write_mask_shard(tmp_path, {"w": torch.ones(4, 4, dtype=torch.bool)}, {"w": region}, rank, 2)
    with pytest.raises(PruningStateError, match="found those of 32; mask files are missing, or left over"):
        read_masks(tmp_path, {"w": shape}, {"w": whole(shape)})
