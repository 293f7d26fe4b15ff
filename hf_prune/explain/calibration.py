"""Whether a classifier is as often right as it is sure."""

import numpy as np

from ..publish.explanation import Bin, Calibration
from .resampling import Bootstrap, estimate, wilson_width

BINS = 15


def calibration_of(log_probabilities: np.ndarray, is_right: np.ndarray, bootstrap: Bootstrap) -> Calibration:
    """The expected calibration error (Guo et al., 2017, equation 3), and its bins of equal width that have samples.

    A sample's confidence is the probability of its answer. The error is the mean over samples of |accuracy -
    mean confidence| of their bin. On few samples it is too large for a model that is calibrated.
    """
    confidence = np.exp(log_probabilities.max(axis=1))
    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    inside = places[:, None] == np.arange(BINS)
    columns = np.concatenate([inside, inside * confidence[:, None], inside & is_right[:, None]], axis=1)
    numbers, confidences, hits = np.split(bootstrap.sums(columns), 3, axis=1)
    # Where all answers are right, or all wrong, no resample has another accuracy, but other samples may.
    reach = wilson_width(len(is_right)) if is_right.all() or not is_right.any() else 0.0
    error = estimate(np.abs(confidences - hits).sum(axis=1) / len(is_right), is_distance=True, reach=reach)
    bins = [
        Bin(
            low=place / BINS,
            high=(place + 1) / BINS,
            samples=int(numbers[0, place]),
            confidence=float(confidences[0, place] / numbers[0, place]),
            accuracy=float(hits[0, place] / numbers[0, place]),
        )
        for place in range(BINS)
        if numbers[0, place]
    ]
    return Calibration(error=error, bins=bins)
