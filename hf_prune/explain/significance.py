"""Whether a model is worse than another on the same samples: paired tests, and many of them together."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np


def sign_test(worse: int, better: int) -> float:
    """The two-sided p-value of so many samples on which one model is worse, and so many on which it is better.

    That of the exact sign test: both are as likely. For answers that are right or wrong this is McNemar's exact test
    (McNemar, 1947). Samples on which both do the same count for neither.
    """
    changed, fewer = worse + better, min(worse, better)
    tail = sum(math.comb(changed, number) for number in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def paired_test(differences: np.ndarray, weights: np.ndarray) -> float:
    """The two-sided p-value of the sum of paired differences, where each sample is of `weights` tokens or answers.

    The t statistic of the ratio of both sums (Cochran, "Sampling Techniques", 1977, section 6.3), which for weights of
    one is that of the paired t test; its distribution as Wallace (1959) approximates it.
    """
    count = len(differences)
    mean = differences.sum() / weights.sum()
    spread = math.sqrt(float(((differences - mean * weights) ** 2).sum()) * count / (count - 1))
    if spread == 0:
        return 1.0 if mean == 0 else 0.0
    statistic, freedom = abs(float(differences.sum())) / spread, count - 1
    deviate = (8 * freedom + 1) / (8 * freedom + 3) * math.sqrt(freedom * math.log1p(statistic**2 / freedom))
    return 2 * NormalDist().cdf(-deviate)


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which hypotheses are rejected, if the chance that any true one is must be at most the level.

    Holm, "A simple sequentially rejective multiple test procedure" (1979): the smallest of m p-values is compared with
    level / m, the next with level / (m - 1), and so on, until one is larger.
    """
    rejected = [False] * len(p_values)
    for place, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[index] > level / (len(p_values) - place):
            break
        rejected[index] = True
    return rejected
