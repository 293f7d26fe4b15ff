import math

import pytest
import torch

from hf_prune.quantise import codebooks
from hf_prune.quantise.codebooks import cluster_means, distinct_values, nearest, share

CODEBOOK = torch.tensor([-1.0, 0.5, 1.0])


def own(counts):
    return counts


def of_part(values, where, answers, sent):
    """The means of one part of 5000 numbers, with the sums of the first all-reduces; what it sends next is noted."""
    calls = iter(range(2))

    def all_reduce(counts):
        call = next(calls)
        if call == len(answers):
            sent.append(counts)
        return answers[call] if call < len(answers) else counts

    return cluster_means([values], [where], [CODEBOOK], [5000], all_reduce)


def test_each_weight_has_the_nearest_value_and_masked_ones_are_zero():
    weight = torch.tensor([[-3.0, -0.26, -0.24], [0.74, 0.75, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    assert nearest(weight, CODEBOOK).tolist() == [[0, 0, 1], [1, 2, 2]]
    assert share(weight, mask, CODEBOOK).tolist() == [[-1.0, -1.0, 0.5], [0.5, 1.0, 0.0]]
    assert share(weight.bfloat16(), mask, CODEBOOK).dtype is torch.float32


def test_a_value_that_no_number_has_is_not_a_number():
    values = torch.tensor([-2.0, -1.0, 0.75, 1.0])
    [means] = cluster_means([values], [torch.tensor([0, 0, 2, 2])], [CODEBOOK], [4], own)
    assert means[[0, 2]].tolist() == [-1.5, 0.875]
    assert means[1].isnan()


def test_means_are_exact_in_any_order_and_of_any_parts():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator) * torch.logspace(-6, 2, 5000)
    where = torch.randint(3, (5000,), generator=generator)
    [whole] = cluster_means([values], [where], [CODEBOOK], [5000], own)
    expected = [float(values[where == index].double().mean()) for index in range(3)]
    assert whole.tolist() == pytest.approx(expected, rel=1e-6)
    order = torch.randperm(5000, generator=generator)
    [shuffled] = cluster_means([values[order]], [where[order]], [CODEBOOK], [5000], own)
    assert torch.equal(shuffled, whole)
    parts = [slice(0, 17), slice(17, 4000), slice(4000, 4000), slice(4000, 5000)]
    answers = []  # of the all-reduces, each known only once every part has said what it sends
    for _ in range(3):
        sent = []
        for part in parts:
            [means] = of_part(values[part], where[part], answers, sent)
            assert len(answers) < 2 or torch.equal(means, whole)
        answers.append(torch.stack(sent).sum(0) if sent else None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_told_by_the_values(bad):
    tensors = [torch.tensor([0.5, bad]), torch.tensor([0.5, 1.0])]
    where = torch.tensor([1, 1])
    broken, whole = cluster_means(tensors, [where, where], [CODEBOOK, CODEBOOK], [2, 2], own)
    assert broken.isnan().all()
    assert whole[1] == 0.75


def test_distinct_values_are_counted_without_zeros_over_all_parts():
    parts = [torch.tensor([[0.0, -0.0], [1.5, -2.0]]), torch.tensor([1.5, 3.0]).bfloat16()]
    assert distinct_values(parts).tolist() == [-2.0, 1.5, 3.0]
    assert distinct_values(parts, most=2) is None
    assert distinct_values([torch.zeros(3)]).tolist() == []


def test_distinct_values_behind_the_sample_are_seen(monkeypatch):
    monkeypatch.setattr(codebooks, "_PIECE", 1 << 10)
    values = torch.ones(10_000)
    values[-1] = 2.0
    assert distinct_values([values]).tolist() == [1.0, 2.0]
    values[5000:5300] = torch.arange(300)
    assert distinct_values([values]) is None
