"""Shares and counts against plain loops."""

from fractions import Fraction

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.methods.allocation import counts_near, histogram, lowest_of_all, moved_towards, outlier_share
from hf_prune.methods.patterns import parse_pattern
from hf_prune.methods.scopes import Prunable, Seen, owl, sensitivity

quick = settings(max_examples=60, deadline=None, derandomize=True)


def tensor_of(seed, out, wide, scale=1.0, block="", zeros=0, pattern="unstructured"):
    """A tensor of one matrix with random statistics."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out, wide, generator=generator)
    weight.view(-1)[:zeros] = 0
    seen = Seen(
        weight=weight,
        kept=weight != 0,
        squares=torch.rand(wide, generator=generator) + 0.1,
        gradients=(torch.rand(out, 1, generator=generator) + 0.1) * scale,
    )
    parsed = parse_pattern(pattern)
    return Prunable(out * wide // parsed.unit_size, zeros, (out, wide), matrices=[seen], pattern=parsed, block=block)


def costs_of(tensor):
    """What dropping each weight that is kept costs, weight by weight."""
    [seen] = tensor.matrices
    return [
        float(seen.weight[row, column]) ** 2 * float(seen.squares[column]) * float(seen.gradients[row, 0])
        for row in range(seen.weight.shape[0])
        for column in range(seen.weight.shape[1])
        if seen.kept[row, column]
    ]


def sensitivity_shares(tensors, sparsity):
    """The shares before they are moved to the exact total, from one sorted list of all weights."""
    wanted = references.count(sparsity, sum(tensor.units for tensor in tensors))
    ranked = sorted((cost, index) for index, tensor in enumerate(tensors) for cost in costs_of(tensor))
    lost = [tensor.dropped for tensor in tensors]
    for _, index in ranked[: wanted - sum(lost)]:
        lost[index] += 1
    shares = []
    for number, tensor in zip(lost, tensors, strict=True):
        share = sparsity + 0.5 * (number / tensor.units - sparsity)
        shares.append(min(max(share, sparsity - 0.15), sparsity + 0.15, (1 + sparsity) / 2))
    return shares


def shifted(shares, tensors, wanted):
    """Counts at shares that are all moved by the same amount, found by halving an interval."""
    low, high = -2.0, 2.0
    for _ in range(200):
        shift = (low + high) / 2
        counts = [
            min(max((share + shift) * tensor.units, tensor.dropped), tensor.units)
            for share, tensor in zip(shares, tensors, strict=True)
        ]
        low, high = (shift, high) if sum(counts) < wanted else (low, shift)
    return counts


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.95])
def test_sensitivity_agrees_with_one_sorted_list(sparsity):
    tensors = [
        tensor_of(0, 20, 30),
        tensor_of(1, 40, 25, scale=4.0),
        tensor_of(2, 30, 30, scale=0.2, zeros=90),
        tensor_of(3, 10, 10, scale=30.0),
    ]
    wanted = max(references.count(sparsity, sum(tensor.units for tensor in tensors)), 90)
    found = [pool.count for pool in sensitivity(tensors, Fraction(str(sparsity)))]
    assert sum(found) == wanted
    expected = shifted(sensitivity_shares(tensors, sparsity), tensors, wanted)
    for count, near, tensor in zip(found, expected, tensors, strict=True):
        assert count == pytest.approx(near, abs=1 + 0.01 * tensor.units)  # the bins of the ranking
    if sparsity == 0.5:
        assert found[2] / tensors[2].units > found[0] / tensors[0].units > found[3] / tensors[3].units


def test_sensitivity_ranks_blocks_by_the_sum_of_their_weights():
    plain, tensors = [], []
    for seed, scale in ((0, 1.0), (1, 3.0)):
        tensors.append(tensor_of(seed, 16, 24, scale, pattern="block:2x4"))
        [seen] = tensors[-1].matrices
        costs = seen.weight.square() * seen.squares * seen.gradients
        plain += [
            (float(costs[row : row + 2, column : column + 4].sum()), seed)
            for row in range(0, 16, 2)
            for column in range(0, 24, 4)
        ]
    lost = [sum(index == which for _, index in sorted(plain)[:48]) for which in (0, 1)]
    shares = [min(max(0.5 + 0.5 * (one / 48 - 0.5), 0.35), 0.65) for one in lost]
    found = [pool.count for pool in sensitivity(tensors, Fraction(1, 2))]
    assert found == pytest.approx(shifted(shares, tensors, 48), abs=1)


def test_a_tensor_of_which_nothing_was_seen_stays_at_the_sparsity_of_all():
    tensors = [tensor_of(0, 20, 20), tensor_of(1, 20, 20, scale=10.0), Prunable(400, 0, (20, 20))]
    counts = [pool.count for pool in sensitivity(tensors, Fraction(1, 2))]
    assert counts[0] > counts[2] > counts[1]
    assert counts[2] == pytest.approx(200, abs=20)
    assert sum(counts) == 600


def test_owl_agrees_with_the_paper():
    tensors = [
        tensor_of(0, 40, 40, block="layers.0"),
        tensor_of(1, 40, 40, block="layers.0"),
        tensor_of(2, 40, 40, block="layers.1"),
        tensor_of(3, 40, 40, block="layers.2"),
    ]
    for index, outliers in ((1, 60), (2, 10)):
        tensors[index].matrices[0].weight.view(-1)[:outliers] = 100.0
    ratios = {}
    for block in ("layers.0", "layers.1", "layers.2"):
        values = []
        for tensor in tensors:
            [seen] = tensor.matrices
            if tensor.block == block:
                values += (seen.weight.abs() * seen.squares.sqrt()).flatten().tolist()
        mean = sum(values) / len(values)
        ratios[block] = sum(value > 5 * mean for value in values) / len(values)
    low, high = min(ratios.values()), max(ratios.values())
    assert low < high
    kept = {block: (ratio - low) / (high - low) * 2 * 0.08 for block, ratio in ratios.items()}
    middle = sum(kept.values()) / 3
    shares = [0.7 - (kept[tensor.block] - middle) for tensor in tensors]
    found = [pool.count for pool in owl(tensors, Fraction("0.7"))]
    assert sum(found) == round(0.7 * 6400)
    assert found == pytest.approx(shifted(shares, tensors, sum(found)), abs=1)


def test_owl_without_a_difference_is_even():
    tensors = [tensor_of(0, 10, 10, block="layers.0"), tensor_of(0, 10, 10, block="layers.1")]
    assert [pool.count for pool in owl(tensors, Fraction(1, 2))] == [50, 50]


@st.composite
def tensors_with_shares(draw):
    units = draw(st.lists(st.integers(0, 50), min_size=1, max_size=6))
    dropped = [draw(st.integers(0, of)) for of in units]
    shares = [draw(st.floats(0, 1)) for _ in units]
    return units, dropped, shares, draw(st.integers(sum(dropped), sum(units)))


@quick
@given(tensors_with_shares())
def test_counts_are_exact_and_can_be_had(given_):
    units, dropped, shares, total = given_
    counts = counts_near(shares, units, dropped, total)
    assert sum(counts) == total
    assert all(least <= count <= most for least, count, most in zip(dropped, counts, units, strict=True))


@quick
@given(tensors_with_shares())
def test_counts_move_all_shares_by_one_amount(given_):
    units, dropped, shares, total = given_
    counts = counts_near(shares, units, dropped, total)
    tensors = [Prunable(of, least, (of,)) for of, least in zip(units, dropped, strict=True)]
    assert counts == pytest.approx(shifted(shares, tensors, total), abs=1.001)


@quick
@given(st.integers(0, 300), st.integers(0, 5))
def test_the_lowest_of_all_agree_with_a_sorted_list(count, seed):
    generator = torch.Generator().manual_seed(seed)
    costs = [torch.rand(100, generator=generator) * scale for scale in (1.0, 0.01, 5.0)]
    found = lowest_of_all([histogram(one) for one in costs], count)
    ranked = sorted((float(cost), index) for index, some in enumerate(costs) for cost in some)
    expected = [sum(index == which for _, index in ranked[:count]) for which in range(3)]
    assert sum(found) == pytest.approx(count)
    assert found == pytest.approx(expected, abs=3)


def test_costs_of_every_size_have_a_bin():
    costs = torch.tensor([0.0, 1e-45, 1e-30, 1.0, 3e38, float("inf"), float("nan")])
    bins = histogram(costs)
    assert int(bins.sum()) == len(costs)
    assert lowest_of_all([bins], 7) == [7.0]
    assert lowest_of_all([bins, histogram(torch.empty(0))], 3) == [3.0, 0.0]


def test_a_share_moves_half_way_within_bounds():
    assert moved_towards(0.5, 0.7, 0.5, 0.15) == pytest.approx(0.6)
    assert moved_towards(0.5, 1.0, 0.5, 0.15) == pytest.approx(0.65)
    assert moved_towards(0.5, 0.0, 0.5, 0.15) == pytest.approx(0.35)
    assert moved_towards(0.9, 1.0, 0.5, 0.15) == pytest.approx(0.95)  # half of what is kept on average stays


def test_outliers_are_counted_over_all_parts():
    parts = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 97.0])]
    assert outlier_share(lambda: parts, 3.0, lambda numbers: numbers) == 0.25
    assert outlier_share(list, 3.0, lambda numbers: numbers) == 0.0
    assert outlier_share(lambda: [torch.ones(3), torch.full((1,), 10.0)], 3.0, lambda numbers: 2 * numbers) == 0.25
