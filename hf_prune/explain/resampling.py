"""Intervals by the bootstrap: figures that are functions of sums over samples, on resamples of the same samples."""

from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from ..publish.explanation import Compared, Estimate, Gap

# The order in which figures of both models come.
MODELS: Sequence[Literal["pruned", "dense"]] = ("pruned", "dense")

_Z = NormalDist().inv_cdf(0.975)  # of the ends of a 95% interval

# Numbers of a block of resamples that are in memory together.
_NUMBERS_AT_A_TIME = 1 << 22


class Bootstrap:
    """Resamples of `samples` samples, drawn with replacement: for one seed always the same, so that figures are paired.

    Efron and Tibshirani, "An Introduction to the Bootstrap" (1993).

    Args:
        samples: how many samples there are.
        resamples: how many times as many are drawn of them.
        seed: the seed of the draws.
    """

    def __init__(self, samples: int, resamples: int = 1000, seed: int = 0):
        self.samples, self.resamples, self.seed = samples, resamples, seed

    def sums(self, columns: np.ndarray) -> np.ndarray:
        """The sums (1 + resamples, k) of columns (samples, k) over all samples, and over those of each resample."""
        columns = np.asarray(columns, dtype=np.float64)
        generator = np.random.default_rng(self.seed)
        found = [columns.sum(axis=0, keepdims=True)]
        step = max(_NUMBERS_AT_A_TIME // max(self.samples, 1), 1)
        for start in range(0, self.resamples, step):
            rows = min(step, self.resamples - start)
            drawn = generator.integers(0, self.samples, (rows, self.samples))
            places = (drawn + self.samples * np.arange(rows)[:, None]).ravel()
            times = np.bincount(places, minlength=rows * self.samples).reshape(rows, self.samples)
            found.append(times @ columns)
        return np.concatenate(found)


def ratio(sums: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Quotients of sums; NaN where the divisor is zero, as where no sample of a slice was drawn."""
    return np.divide(sums, of, out=np.full(np.broadcast_shapes(sums.shape, of.shape), np.nan), where=of != 0)


def estimate(
    values: np.ndarray,
    share_of: int | None = None,
    least: float = 0.0,
    most: float = 1.0,
    is_distance: bool = False,
    reach: float = 0.0,
) -> Estimate:
    """A figure, the first of the values, and its 95% interval from the others: the same figure on resamples.

    The interval is the percentile interval. `is_distance` says that the figure is a mean distance from zero, which is
    too large by chance, and on resamples again: its interval then reaches as far below it as above, `reach` or
    more, within `least` and `most`. Resamples on which the figure does not exist are left out.

    `share_of` is the number of samples that the figure is a share of, or the difference of two shares:
    where all resamples give the same, as where no sample was answered wrong, the bootstrap knows nothing, and the
    interval ends where Wilson's (1927) does for none or all of so many samples, within `least` and `most`.
    """
    value, draws = float(values[0]), values[1:][np.isfinite(values[1:])]
    if not len(draws):
        return Estimate(value=value)
    low, high = (float(end) for end in np.quantile(draws, [0.025, 0.975]))
    are_equal = bool(draws.min() == draws.max() == value)
    if not is_distance and not (share_of and are_equal):
        return Estimate(value=value, low=low, high=high)
    width = wilson_width(share_of) if share_of and are_equal else max(high - value, value - low, reach)
    return Estimate(value=value, low=max(value - width, least), high=min(value + width, most))


def wilson_width(samples: int) -> float:
    """How far Wilson's (1927) 95% interval reaches for a share that none or all of so many samples have."""
    return _Z**2 / (samples + _Z**2)


def compared(name: str, samples: int, models: Sequence[np.ndarray], is_share: bool = False) -> Compared:
    """One figure of the pruned model and of the dense one, if any, from its values on all samples and resamples."""
    of = samples if is_share else None
    pruned, *others = models
    if not others:
        return Compared(name=name, samples=samples, pruned=estimate(pruned, of))
    [dense] = others
    return Compared(
        name=name,
        samples=samples,
        pruned=estimate(pruned, of),
        dense=estimate(dense, of),
        difference=estimate(pruned - dense, of, least=-1.0),
    )


def gap_between(
    model: Literal["dense", "pruned"],
    of_training: np.ndarray,
    of_test: np.ndarray,
    training_samples: int,
    samples: int | None = None,
) -> Gap:
    """A figure on training samples and on test samples, each resampled by themselves, and the first - the second.

    The resamples of both must have been drawn with different seeds. With `samples`, the number of test samples, the
    figure is a share.
    """
    return Gap(
        model=model,
        training=estimate(of_training, training_samples if samples is not None else None),
        test=estimate(of_test, samples),
        gap=estimate(of_training - of_test),
        training_samples=training_samples,
    )
