"""Codebooks are the best there are: compared with every clustering of few numbers, and with the histogram undone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.quantise.codebooks import nearest
from hf_prune.quantise.kmeans import kmeans


def cost_of(values, codebook, importance=1.0):
    values, codebook = values.double(), codebook.double()
    return float((importance * (values - codebook[nearest(values, codebook.float())]).square()).sum())


def least_cost(values, clusters, importance=None):
    """Of all ways to cut the ascending numbers into intervals."""
    importance = torch.ones_like(values) if importance is None else importance
    order = values.argsort()
    values, importance = values[order].double(), importance[order].double()
    least = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), clusters - 1):
        cost = 0.0
        for first, end in itertools.pairwise([0, *cuts, len(values)]):
            part, share = values[first:end], importance[first:end]
            cost += float((share * (part - (share * part).sum() / share.sum()).square()).sum())
        least = min(least, cost)
    return least


@pytest.mark.parametrize("clusters", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_clustering_is_better(seed, clusters):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(12, generator=generator) * 0.05
    importance = torch.rand(12, generator=generator) + 0.01
    codebook = kmeans(values, clusters)
    assert len(codebook) == clusters
    assert cost_of(values, codebook) <= least_cost(values, clusters) * (1 + 1e-5)
    weighted = kmeans(values, clusters, importance=importance)
    assert cost_of(values, weighted, importance) <= least_cost(values, clusters, importance) * (1 + 1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-2.0, 2.0, width=32), min_size=1, max_size=10),
    st.integers(1, 10),
)
def test_a_codebook_is_ascending_has_no_more_numbers_than_asked_and_lies_within_the_values(numbers, clusters):
    values = torch.tensor(numbers)
    codebook = kmeans(values, clusters)
    assert 1 <= len(codebook) <= clusters
    assert (codebook.diff() >= 0).all()
    assert values.min() <= codebook.min()
    assert codebook.max() <= values.max()


def test_few_distinct_values_are_the_codebook():
    values = torch.tensor([-0.5, 0.25, 1.5]).repeat(5)
    assert kmeans(values, 4).tolist() == [-0.5, 0.25, 1.5]


def test_values_in_one_bin_are_averaged_exactly():
    values = 1 + torch.arange(4) * 2.0**-20
    assert kmeans(values, 2).tolist() == [1 + 1.5 * 2.0**-20]


def test_no_values_have_no_codebook():
    assert kmeans(torch.zeros(0), 4).tolist() == []


def test_a_large_tensor_is_clustered_as_well_as_in_many_iterations_of_lloyd():
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)) * 0.03
    codebook = kmeans(values, 16)
    moved = codebook
    for _ in range(20):
        where = nearest(values, moved)
        sums = torch.bincount(where, values.double(), minlength=16)
        moved = (sums / torch.bincount(where, minlength=16)).float()
    assert cost_of(values, moved) > 0.999 * cost_of(values, codebook)


def test_the_codebook_of_parts_is_that_of_the_whole_to_the_bit():
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    whole = kmeans(values, 16)
    for parts in (values.flip(0).split(1000), values.split([1, 2999]), values.split([3000, 0])):
        sent = []
        for part in parts:
            kmeans(part, 16, lambda counts, sent=sent: sent.append(counts.clone()) or counts)
        together = torch.stack(sent).sum(0)
        for part in parts:
            assert torch.equal(kmeans(part, 16, lambda counts, together=together: together), whole)
