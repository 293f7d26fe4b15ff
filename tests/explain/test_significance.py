"""Paired tests against scipy, and Holm's method against an example that was worked by hand."""

import numpy as np
import pytest
from scipy import stats

from hf_prune.explain.significance import holm, paired_test, sign_test


def test_holm_compares_the_smallest_with_a_share_of_the_level():
    # 0.01 <= 0.05 / 4, 0.016 <= 0.05 / 3, 0.03 > 0.05 / 2: it and all larger ones are kept
    assert holm([0.04, 0.01, 0.03, 0.016]) == [False, True, False, True]
    assert holm([]) == []
    assert holm([0.05]) == [True]


@pytest.mark.parametrize(("worse", "better"), [(0, 0), (8, 1), (1, 8), (5, 5), (40, 22)])
def test_the_sign_test_is_the_exact_one(worse, better):
    expected = stats.binomtest(worse, worse + better).pvalue if worse + better else 1.0
    assert sign_test(worse, better) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [10, 40, 500])
def test_the_paired_test_is_the_t_test_where_all_weights_are_one(count):
    differences = np.random.default_rng(0).normal(0.3, 1, count)
    expected = stats.ttest_1samp(differences, 0).pvalue
    assert paired_test(differences, np.ones(count)) == pytest.approx(expected, rel=0.05)


def test_texts_of_many_tokens_count_as_one_sample_each():
    differences = np.array([10.0, -1, 2, 1, 3, -2, 1, 2, 1, 1])
    tokens = np.array([100.0, 5, 9, 10, 20, 30, 8, 7, 10, 10])
    mean = differences.sum() / tokens.sum()
    spread = np.sqrt(((differences - mean * tokens) ** 2).sum() / (10 * 9))  # of the mean difference of a text
    expected = 2 * stats.t.sf(abs(differences.mean()) / spread, 9)
    assert paired_test(differences, tokens) == pytest.approx(expected, rel=0.05)


def test_equal_differences_are_sure():
    assert paired_test(np.zeros(12), np.ones(12)) == 1
    assert paired_test(np.full(12, 0.5), np.ones(12)) == 0
