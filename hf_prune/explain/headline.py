"""The figures of an explanation that are looked at first, as a Trainer reports them to TensorBoard and the like."""

from ..publish.explanation import Estimate, Explanation
from ..publish.explanation_words import main_metric, worst_first


def headline(explanation: Explanation) -> dict[str, float]:
    """Name -> value of what was measured among: the main metric, agreement, KL, flips, calibration, gap, worst slice.

    Shares are between 0 and 1. Names with `dense_` are of the dense model, all others of the pruned one, or of both.
    """
    answers, metric = explanation.answers, main_metric(explanation)
    found: dict[str, Estimate | None] = {
        explanation.metric: metric.pruned if metric is not None else None,
        f"dense_{explanation.metric}": metric.dense if metric is not None else None,
        "agreement": answers.agreement,
        "kl": answers.divergence,
        "right_to_wrong": answers.to_wrong,
        "wrong_to_right": answers.to_right,
        "calibration_error": answers.calibration.error if answers.calibration is not None else None,
        "dense_calibration_error": answers.dense_calibration.error if answers.dense_calibration is not None else None,
    }
    for gap in explanation.gaps:
        found["generalisation_gap" if gap.model == "pruned" else "dense_generalisation_gap"] = gap.gap
    slices = worst_first(explanation)
    if slices:
        found[f"worst_slice_{explanation.metric}"] = slices[0].metric.pruned
        found[f"dense_worst_slice_{explanation.metric}"] = slices[0].metric.dense
    return {name: estimate.value for name, estimate in found.items() if estimate is not None}
