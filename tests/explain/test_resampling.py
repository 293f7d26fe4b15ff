"""Intervals of the bootstrap: against their coverage in a simulation, and where all resamples are the same."""

import numpy as np
import pytest

from hf_prune.explain.calibration import calibration_of
from hf_prune.explain.resampling import Bootstrap, compared, estimate, gap_between, ratio


def test_sums_are_those_of_plain_resamples():
    columns = np.random.default_rng(1).normal(size=(7, 3))
    sums = Bootstrap(7, resamples=5, seed=3).sums(columns)
    drawn = np.random.default_rng(3).integers(0, 7, (5, 7))
    expected = [columns.sum(0), *(columns[rows].sum(0) for rows in drawn)]
    np.testing.assert_allclose(sums, expected, rtol=1e-12)


def test_one_seed_gives_the_same_resamples_and_another_one_others():
    column = np.arange(20.0)[:, None]
    first, again = (Bootstrap(20, 50, seed=4).sums(column) for _ in range(2))
    assert (first == again).all()
    assert (first[1:] != Bootstrap(20, 50, seed=5).sums(column)[1:]).any()


def test_intervals_of_a_mean_and_of_a_paired_difference_hold_it_in_about_95_of_100_cases():
    generator = np.random.default_rng(0)
    held = np.zeros((300, 2))
    for case in held:
        samples = generator.exponential(size=(60, 1)) + generator.normal(0.2, 0.3, (60, 2)) * [0, 1]
        pruned, dense = (Bootstrap(60, 400, seed=1).sums(samples) / 60).T
        found = compared("loss", 60, [pruned, dense])
        case[:] = [found.pruned.low <= 1 <= found.pruned.high, found.difference.low <= -0.2 <= found.difference.high]
    assert held.mean(axis=0) == pytest.approx([0.94, 0.94], abs=0.035)


def test_a_share_that_is_the_same_in_all_resamples_ends_where_wilsons_interval_does():
    none = estimate(np.zeros(101), share_of=30)
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.1135, abs=1e-4)  # scipy.stats.binomtest(0, 30).proportion_ci(method="wilson")
    every = estimate(np.ones(101), share_of=30)
    assert (every.low, every.high) == (pytest.approx(1 - 0.1135, abs=1e-4), 1)
    same = compared("accuracy", 30, [np.full(101, 0.5), np.full(101, 0.5)], is_share=True).difference
    assert (same.low, same.high) == (pytest.approx(-0.1135, abs=1e-4), pytest.approx(0.1135, abs=1e-4))


def test_resamples_without_a_sample_of_a_slice_are_left_out():
    values = ratio(np.array([2.0, 1.0, 0.0, 3.0]), np.array([4.0, 4.0, 0.0, 4.0]))
    assert np.isnan(values[2])
    assert estimate(values).low >= 0.25


def test_the_gap_has_the_noise_of_both():
    generator = np.random.default_rng(0)
    training, test = (
        Bootstrap(n, 500, seed).sums(generator.normal(size=(n, 1)))[:, 0] / n for n, seed in ((50, 1), (90, 2))
    )
    found = gap_between("dense", training, test, 50)
    assert found.gap.value == pytest.approx(found.training.value - found.test.value)
    width = found.gap.high - found.gap.low
    assert width == pytest.approx(2 * 1.96 * np.sqrt(1 / 50 + 1 / 90), rel=0.2)


def answers_of(generator, samples, times_too_sure):
    """Log-probabilities of two labels, whose logits are so many times those that the labels are drawn from."""
    logits = generator.normal(0, 1.5, samples)
    is_one = generator.random(samples) < 1 / (1 + np.exp(-logits))
    given = times_too_sure * logits
    return np.stack([-np.log1p(np.exp(given)), -np.log1p(np.exp(-given))], 1), (logits > 0) == is_one


@pytest.mark.parametrize(
    ("times_too_sure", "true_error", "least_held"), [(3, 0.148, 0.9), (2, 0.100, 0.9), (1.3, 0.039, 0.8)]
)
def test_intervals_of_the_calibration_error_hold_it_and_mostly_the_true_one(times_too_sure, true_error, least_held):
    generator = np.random.default_rng(5)
    of_many = calibration_of(*answers_of(generator, 400_000, times_too_sure), Bootstrap(400_000, 2)).error.value
    assert of_many == pytest.approx(true_error, abs=0.002)
    held, widths = [], []
    for _ in range(200):
        found = calibration_of(*answers_of(generator, 60, times_too_sure), Bootstrap(60, 200)).error
        assert 0 <= found.low <= found.value <= found.high <= 1
        held.append(found.low <= true_error <= found.high)
        widths.append(found.high - found.low)
    assert least_held <= np.mean(held) <= 0.98
    assert 0.05 < min(widths) < max(widths) < 0.35


def test_the_calibration_error_of_a_model_that_is_always_right_may_be_as_large_as_a_share_may_be():
    sure = np.random.default_rng(0).uniform(0.99, 0.999, 60)
    found = calibration_of(np.log(np.stack([sure, 1 - sure], 1)), np.ones(60, bool), Bootstrap(60, 100)).error
    assert found.low == 0
    assert found.high == pytest.approx(found.value + 0.0602, abs=1e-4)  # Wilson's for none of 60
