"""Values of groups of weights: clusters compared with the best ones, and whole numbers that are found again."""

import pytest
import torch

from hf_prune.quantise.codebooks import nearest
from hf_prune.quantise.forms import SharedValues, parse_granularity, parse_values, shared_values_of
from hf_prune.quantise.groups import cluster_in_groups, distinct_in_groups, scales_for, whole_numbers
from hf_prune.quantise.kmeans import kmeans


def survivors(groups=40, size=300, seed=0):
    """The weights that magnitude keeps: two tails, in groups of unequal sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(groups * size, generator=generator) * 0.05
    values = values[values.abs() > 0.04]
    return values, torch.randint(groups, (len(values),), generator=generator)


@pytest.mark.parametrize("clusters", [1, 2, 4, 16])
def test_clusters_of_groups_are_nearly_as_good_as_the_best(clusters):
    values, groups = survivors()
    shared = cluster_in_groups(values, groups, clusters)
    assert (distinct_in_groups(shared, groups) <= clusters).all()
    cost = best = 0.0
    for group in range(40):
        of_group = values[groups == group]
        codebook = kmeans(of_group, clusters)
        best += float((of_group - codebook[nearest(of_group, codebook)]).square().sum())
        cost += float((of_group - shared[groups == group]).square().sum())
    assert cost <= 1.15 * best


def test_each_weight_has_the_mean_of_its_cluster_and_groups_know_nothing_of_each_other():
    values, groups = survivors()
    shared = cluster_in_groups(values, groups, 4)
    for value in shared[groups == 7].unique():
        members = values[(groups == 7) & (shared == value)]
        assert float(members.double().mean()) == pytest.approx(float(value), rel=1e-6)
    alone = cluster_in_groups(values[groups == 7], torch.zeros(int((groups == 7).sum()), dtype=torch.int64), 4)
    assert torch.equal(alone, shared[groups == 7])


def test_few_distinct_numbers_stay():
    values = torch.tensor([0.5, -1.0, 0.5, 3.0, 0.25])
    groups = torch.tensor([0, 0, 0, 2, 2])
    assert torch.equal(cluster_in_groups(values, groups, 2), values)
    assert distinct_in_groups(values, groups).tolist() == [2, 0, 2]
    assert cluster_in_groups(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 4).shape == (0,)


@pytest.mark.parametrize("levels", [7, 127])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_whole_numbers_and_scales_are_found_again_from_the_weights(dtype, levels):
    values, groups = survivors()
    saved = whole_numbers(values, groups, levels, dtype).to(dtype)
    largest = torch.zeros(40).scatter_reduce(0, groups, saved.float().abs(), "amax")
    scales = scales_for(largest, levels, dtype)[groups]
    codes = saved.float() / scales
    assert torch.equal(codes, codes.round())
    assert codes.abs().max() <= levels
    assert codes.abs().min() >= 1
    assert torch.equal((codes * scales).to(dtype), saved)
    assert torch.equal(whole_numbers(saved, groups, levels, dtype).to(dtype), saved)
    apart = (values - saved.float()).abs() / scales
    assert (apart[codes.abs() > 1] <= 0.5 + 1e-3).all()


def test_a_small_weight_that_is_kept_does_not_become_zero():
    values, groups = torch.tensor([7.0, 0.01, -0.01, 0.0]), torch.zeros(4, dtype=torch.int64)
    assert whole_numbers(values, groups, 7, torch.float32).tolist() == [7.0, 1.0, -1.0, 1.0]


def test_numbers_become_fewer_by_halves_at_equal_intervals():
    values = SharedValues(16, first=256)
    assert [values.number_at(step, 10, 50) for step in (10, 19, 20, 30, 40, 49, 50, 99)] == [
        256, 256, 128, 64, 32, 32, 16, 16,
    ]  # fmt: skip
    assert [SharedValues(3, first=16).number_at(step, 0, 6) for step in (0, 5, 6)] == [16, 4, 3]
    assert SharedValues(16).number_at(0, 0, 10) == 16
    assert values.number_at(10, 10, 10) == 16


def test_what_a_user_writes_is_read():
    assert [parse_values(one) for one in (16, "16", "int8", "int4")] == [16, 16, "int8", "int4"]
    assert [parse_values(one) for one in (1, 257, True, "int2", "1.5", 2.0, None, "²")] == [None] * 8
    assert [parse_granularity(one) for one in ("tensor", "row", "rows:8", "group:32")] == [
        (None, None), (1, None), (8, None), (1, 32),
    ]  # fmt: skip
    assert [parse_granularity(one) for one in ("rows", "group:0", 32, None, "group:-1")] == [None] * 5
    assert shared_values_of("int4", None) == SharedValues(14, 7, 1)
    assert shared_values_of("int8", "tensor") == SharedValues(254, 127)
    assert shared_values_of(16, None).is_one_codebook
    words = [shared_values_of(16, one).words for one in ("tensor", "row", "rows:8", "group:32")]
    assert words == ["tensor", "row", "group of 8 rows", "group of 32 weights of a row"]
