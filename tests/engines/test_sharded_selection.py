"""Masks decided from parts of tensors are those of one process, whatever the parts are."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tasks import masks_of_parts
from workers import Workers

from hf_prune import PruningConfig
from hf_prune.engines.regions import Region, flat_range
from hf_prune.masking.groups import make_groups
from hf_prune.masking.units import divide
from hf_prune.model.layouts import Target

derandomized = settings(deadline=None, derandomize=True)
# Each example is some hundred collectives: a few in every run, and many in `make test-all`.
examples = pytest.mark.parametrize("examples", [10, pytest.param(40, marks=pytest.mark.slow)])

LAYOUTS = {"matrix": 2, "transposed": 2, "convolution": 4, "experts": 3, "experts_transposed": 3}


@pytest.fixture(scope="module", params=[2, 3, 4])
def workers(request):
    with Workers(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def four():
    with Workers(4) as started:
        yield started


def boxes(draw, shape, processes):
    """The tensor cut along any dimension, or along two: a part for each process, some of them empty."""
    grids = [(rows, processes // rows) for rows in range(1, processes + 1) if processes % rows == 0]
    cuts = draw(st.sampled_from(grids))
    dims = draw(st.permutations(range(len(shape))))[:2]
    edges = []
    for dim, parts in zip(dims, cuts, strict=True):
        inner = sorted(draw(st.lists(st.integers(0, shape[dim]), min_size=parts - 1, max_size=parts - 1)))
        edges.append([0, *inner, shape[dim]])
    regions = []
    for first in range(cuts[0]):
        for second in range(cuts[1]):
            start, size = [0] * len(shape), list(shape)
            for dim, edge, place in zip(dims, edges, (first, second), strict=True):
                start[dim], size[dim] = edge[place], edge[place + 1] - edge[place]
            regions.append(Region(tuple(shape), tuple(start), tuple(size)))
    return regions


def ranges(draw, shape, processes):
    """The flattened tensor cut into ranges."""
    weights = math.prod(shape)
    inner = sorted(draw(st.lists(st.integers(0, weights), min_size=processes - 1, max_size=processes - 1)))
    edges = [0, *inner, weights]
    return [flat_range(weights, start, stop - start) for start, stop in pairwise(edges)]


def part_of(tensor, region):
    box = tuple(slice(start, start + size) for start, size in zip(region.start, region.size, strict=True))
    return tensor.reshape(region.shape)[box].reshape(-1)


@st.composite
def cases(draw, processes, patterns):
    pattern = draw(st.sampled_from(patterns))
    tensors = {}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20), label="seed"))
    for index in range(draw(st.integers(1, 3))):
        layout = draw(st.sampled_from(list(LAYOUTS)))
        shape = [4 * draw(st.integers(1, 3)) for _ in range(3)]
        shape = {2: shape[:2], 3: [draw(st.integers(1, 3)), *shape[:2]], 4: [*shape[:2], 2, draw(st.integers(1, 2))]}[
            LAYOUTS[layout]
        ]
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        weight = torch.randn(shape, generator=generator).round(decimals=draw(st.sampled_from([0, 1, 6]))).to(dtype)
        mask = torch.rand(shape, generator=generator) >= draw(st.sampled_from([0.0, 0.3]))
        regions = (boxes if draw(st.booleans()) else ranges)(draw, shape, processes)
        tensors[f"w{index}"] = (tuple(shape), layout, weight, mask, regions)
    scope = draw(st.sampled_from(["layer", "global", "erk"] if pattern == "unstructured" else ["layer"]))
    if pattern.startswith("block"):
        scope = draw(st.sampled_from(["layer", "global", "erk"]))
    config = {
        "method": draw(st.sampled_from(["magnitude", "random"])),
        "pattern": pattern,
        "scope": scope,
        "block_norm": draw(st.sampled_from(["l1", "l2"])),
    } | ({} if ":" in pattern and "block" not in pattern else {"sparsity": 0.9})
    sparsities = sorted(draw(st.lists(st.sampled_from([0.1, 0.35, 0.5, 0.55, 0.8, 0.9]), min_size=1, max_size=3)))
    return config, tensors, sparsities


def check(workers, config, tensors, sparsities, copies=1):
    """Compare every part of every mask with that of one process; `copies` processes hold each part."""
    targets = [(name, shape, layout) for name, (shape, layout, *_) in tensors.items()]
    whole = {
        name: (weight.reshape(-1), mask.reshape(-1), Region(shape, (0,) * len(shape), shape), True, (0,))
        for name, (shape, _, weight, mask, _) in tensors.items()
    }
    expected = masks_of_parts(config, targets, sparsities, whole, False)
    shards = workers.processes // copies
    arguments = []
    for rank in range(workers.processes):
        copy, shard = divmod(rank, shards)
        peers = tuple(range(copy * shards, (copy + 1) * shards))
        parts = {
            name: (part_of(weight, regions[shard]), part_of(mask, regions[shard]), regions[shard], copy == 0, peers)
            for name, (_, _, weight, mask, regions) in tensors.items()
        }
        arguments.append((config, targets, sparsities, parts))
    for rank, masks in enumerate(workers.run("masks_of_parts", arguments)):
        for name, (shape, _, _, _, regions) in tensors.items():
            assert torch.equal(masks[name], part_of(expected[name].reshape(shape), regions[rank % shards])), (
                rank,
                name,
            )


@examples
@pytest.mark.parametrize("patterns", [["unstructured"], ["2:4", "1:4"], ["block:4x1", "block:2x2", "block:1x4"]])
def test_any_parts_of_any_tensors_give_the_masks_of_one_process(workers, patterns, examples):
    @settings(derandomized, max_examples=examples)
    @given(case=cases(workers.processes, patterns))
    def every_case(case):
        check(workers, *case)

    every_case()


@examples
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x1"])
def test_two_copies_of_two_parts_give_the_masks_of_one_process(four, pattern, examples):
    @settings(derandomized, max_examples=examples)
    @given(case=cases(2, [pattern]))
    def every_case(case):
        check(four, *case, copies=2)

    every_case()


@pytest.mark.parametrize(("pattern", "rows"), [("2:4", 1), ("block:4x1", 4)])
def test_few_weights_of_a_range_are_of_units_that_others_hold_parts_of(pattern, rows):
    """At each end of a range at most as many rows as a unit has; all others are ranked where they are."""
    target = Target("w", (64, 32), "matrix")
    [group] = make_groups(
        0, PruningConfig(pattern=pattern, **({} if pattern == "2:4" else {"sparsity": 0.5})), [target]
    )
    shared = [
        len(divide(target, group.pattern, flat_range(64 * 32, start, size)).shared_positions())
        for start in range(0, 1024, 37)
        for size in (512, 517, 1000)
    ]
    assert 0 < max(shared) <= 2 * rows * 32
