"""What an explanation says in words: its figures with their intervals, and the sentences that sum it up."""

import math
import re
from collections.abc import Callable, Iterable, Sequence

from .explanation import ELSEWHERE, SAME_WEIGHTS, Compared, Estimate, Explanation, Slice, UnitGroup
from .record import lower_is_better

# Parts of the names of metrics that are shares, and shown in percent.
_SHARES = frozenset({"accuracy", "precision", "recall", "f1", "agreement", "match"})

MINUS = "−"

# The most characters of a slice's name in a sentence.
_LONGEST_NAME = 60


def is_share(name: str, value: float) -> bool:
    """Whether a metric of this name and value is a share, which is shown in percent: accuracy, recall, F1."""
    return 0 <= value <= 1 and not _SHARES.isdisjoint(re.split(r"[^a-z0-9]+", name.lower()))


def percent(value: float, decimals: int = 1) -> str:
    """A share in percent, with more decimals where it would seem to be nothing or everything, and is not."""
    for places in (decimals, 2, 3):
        text = f"{abs(value):.{places}%}"
        if float(text[:-1]) not in (0.0, 100.0) or abs(value) in (0.0, 1.0):
            return f"{MINUS if value < 0 and float(text[:-1]) else ''}{text}"
    if abs(value) > 0.5:
        return "over 99.999%"
    return f"under {MINUS if value < 0 else ''}0.001%"


def number(value: float) -> str:
    """A figure that is no share: three decimals, fewer for large ones."""
    text = f"{abs(value):,.3f}" if abs(value) < 100 else f"{abs(value):,.1f}"
    if value and not float(text.replace(",", "")):
        text = f"{abs(value):.1e}"
    return f"{MINUS if value < 0 else ''}{text}"


def three_digits(value: float) -> str:
    """A measured amount with three significant digits: `0.0412`, `4.12`, `41,200`."""
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def as_share(estimate: Estimate) -> str:
    """A share with its interval: `74.0% (70.1 to 77.6)`."""
    return percent(estimate.value) + _interval(estimate, lambda end: _fixed(100 * end))


def as_number(estimate: Estimate) -> str:
    """A figure that is no share, with its interval: `0.412 (0.398 to 0.427)`."""
    return number(estimate.value) + _interval(estimate, number)


def figure(name: str, estimate: Estimate | None) -> str:
    """A metric of one model with its interval; empty for None."""
    if estimate is None:
        return ""
    return as_share(estimate) if is_share(name, estimate.value) else as_number(estimate)


def difference(metric: Compared) -> str:
    """Pruned - dense with its interval: `−7.0 points (−9.9 to −4.1)`; empty without a dense model."""
    return "" if metric.difference is None else change(metric.name, metric.pruned.value, metric.difference)


def change(name: str, value: float, difference: Estimate) -> str:
    """A difference of a metric, in percentage points where the metric, which is `value`, is a share."""
    if is_share(name, value):
        return f"{_points(difference.value)} points{_interval(difference, _points)}"
    return f"{_signed(difference.value)}{_interval(difference, _signed)}"


def _fixed(value: float) -> str:
    text = f"{abs(value):.1f}"
    return f"{MINUS if value < 0 and float(text) else ''}{text}"


def _points(value: float) -> str:
    text = _fixed(100 * value)
    return text if text.startswith(MINUS) or not float(text) else f"+{text}"


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(value)}"


def _interval(estimate: Estimate, shown: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" ({shown(estimate.low)} to {shown(estimate.high)})"


def estimate_ends(estimate: Estimate) -> tuple[float, float]:
    """The ends of an interval; twice the value where there is none."""
    low, high = estimate.low, estimate.high
    return (estimate.value if low is None else low, estimate.value if high is None else high)


def complement(share: Estimate) -> Estimate:
    """1 - a share, with its interval."""
    low, high = share.low, share.high
    return Estimate(
        value=1 - share.value,
        low=None if high is None else 1 - high,
        high=None if low is None else 1 - low,
    )


def may_be_chance(difference: Estimate) -> bool | None:
    """Whether the interval of a difference has zero in it; None where there is no interval."""
    if difference.low is None or difference.high is None:
        return None
    return difference.low <= 0 <= difference.high


def is_of_language(explanation: Explanation) -> bool:
    """Whether the explanation is one of a language model."""
    return explanation.task == "text-generation"


def slice_name(one: Slice) -> str:
    """What the samples of a slice have in common, for a reader."""
    return f"{one.value} {one.by}" if one.value in ("with", "without") else f"{one.by}: {one.value}"


def worst_first(explanation: Explanation) -> list[Slice]:
    """The slices: those that are worse than the dense model's first, then by what was lost, or by the metric alone."""
    sign = 1 if lower_is_better(explanation.metric) else -1

    def key(one: Slice) -> tuple[bool, float]:
        compared = one.metric.difference if one.metric.difference is not None else one.metric.pruned
        return (not one.is_worse, -sign * compared.value)

    return sorted(explanation.slices, key=key)


def by_kind(explanation: Explanation) -> list[list[Slice]]:
    """The slices by what they have in common; in each, those whose values are or begin with numbers in their order."""
    groups: dict[str, list[Slice]] = {}
    for one in explanation.slices:
        groups.setdefault(one.by, []).append(one)
    ordered = []
    for some in groups.values():
        numbers = [re.search(r"\d[\d,]*", one.value) for one in some]
        if all(numbers):
            found = {
                id(one): int(number[0].replace(",", "")) for one, number in zip(some, numbers, strict=True) if number
            }
            some = sorted(some, key=lambda one: found[id(one)])
        ordered.append(some)
    return ordered


def worse_slices(explanation: Explanation) -> list[Slice]:
    """The slices on which the pruned model is significantly worse than the dense one, worst first."""
    return [one for one in worst_first(explanation) if one.is_worse]


def main_metric(explanation: Explanation) -> Compared | None:
    """The metric that slices have, over all samples."""
    return next((one for one in explanation.metrics if one.name == explanation.metric), None)


def summary(explanation: Explanation) -> list[str]:
    """The sentences that sum an explanation up: what changed in the answers, where most, and what was taken."""
    warning = SAME_WEIGHTS if SAME_WEIGHTS in explanation.notes else ""
    sentences = [warning, answers_words(explanation), slices_words(explanation), metric_words(explanation)]
    sentences += [calibration_words(explanation), taken_words(explanation)]
    return [sentence for sentence in sentences if sentence]


def answers_words(explanation: Explanation) -> str:
    """How many answers changed, and in which direction."""
    answers = explanation.answers
    if answers.agreement is None:
        return "No dense model was compared, so it is unknown which answers pruning changed."
    changed = as_share(complement(answers.agreement))
    if is_of_language(explanation):
        told = f"For {changed} of the tokens the most likely next token changed"
        diverged = answers.divergence
        return f"{told}; KL(dense || pruned) is {as_number(diverged)} nats." if diverged is not None else f"{told}."
    flips = {"from right to wrong": answers.to_wrong, "from wrong to right": answers.to_right}
    if answers.other is not None and answers.other.value > 0:
        flips["from one wrong answer to another"] = answers.other
    parts = [f"{percent(share.value)} {direction}" for direction, share in flips.items() if share is not None]
    if answers.agreement.value == 1:
        return f"Of {explanation.samples:,} answers none changed: {changed}."
    told = f"Of {explanation.samples:,} answers {changed} changed"
    return f"{told}: {', '.join(parts)}." if parts else f"{told}."


def metric_words(explanation: Explanation) -> str:
    """The metric of both models, and whether chance may explain the difference."""
    metric = main_metric(explanation)
    if metric is None:
        return ""
    name = f"{metric.name[:1].upper()}{metric.name[1:]}"
    told = f"{name} is {figure(metric.name, metric.pruned)}"
    if metric.dense is None or metric.difference is None:
        return f"{told}."
    told += f", and {figure(metric.name, metric.dense)} with the dense model, a difference of {difference(metric)}"
    is_explained = metric.difference.value != 0 and may_be_chance(metric.difference)
    return f"{told}; it may be due to chance." if is_explained else f"{told}."


def slices_words(explanation: Explanation, most: int = 2) -> str:
    """The worst slices with both metrics, or that none is significantly worse."""
    if not explanation.slices:
        return ""
    if explanation.answers.agreement is None:
        lowest = worst_first(explanation)[0]
        which = "Highest" if lower_is_better(explanation.metric) else "Lowest"
        return f"{which} {explanation.metric} of {_slices(explanation)}: {_slice_words(lowest)}."
    worse = worse_slices(explanation)
    if not worse:
        return f"On none of {_slices(explanation)} is the pruned model significantly worse than the dense one."
    told = ", ".join(map(_slice_words, worst_first(explanation)[: min(most, len(worse))]))
    return (
        f"The pruned model is significantly worse than the dense one on {len(worse):,} of {_slices(explanation)}. "
        f"Worst {explanation.metric}: {told}."
    )


def _slices(explanation: Explanation) -> str:
    number = len(explanation.slices)
    return f"{number:,} slice{'' if number == 1 else 's'} of the data"


def _slice_words(one: Slice) -> str:
    metric = one.metric
    dense = f" (dense {_plain(metric.name, metric.dense)})" if metric.dense is not None else ""
    return f"“{_shortened(slice_name(one))}” {_plain(metric.name, metric.pruned)}{dense}"


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


def _plain(name: str, estimate: Estimate) -> str:
    return percent(estimate.value) if is_share(name, estimate.value) else number(estimate.value)


def calibration_words(explanation: Explanation) -> str:
    """How far confidence is from accuracy, with both models."""
    pruned, dense = explanation.answers.calibration, explanation.answers.dense_calibration
    if pruned is None:
        return ""
    told = f"Confidence and accuracy differ by {as_share(pruned.error)} on average (expected calibration error)"
    return f"{told}; with the dense model by {as_share(dense.error)}." if dense is not None else f"{told}."


def taken_words(explanation: Explanation) -> str:
    """What was taken: removed units, zeros, and units that have nothing but zeros."""
    weights = sum(matrix.weights for matrix in explanation.matrices)
    zeros = sum(matrix.zeros for matrix in explanation.matrices)
    parts = []
    if explanation.removed_words:
        parts.append(f"{explanation.removed_words} were removed")
    if weights and (zeros or not parts):
        number = f"{len(explanation.matrices):,} prunable tensor{'' if len(explanation.matrices) == 1 else 's'}"
        parts.append(f"{percent(zeros / weights)} of the weights in {number} are zero")
    dead = [f"{gone:,} of {of:,} {structure}" for structure, gone, of in dead_units(explanation.units) if gone]
    if dead:
        parts.append(f"{' and '.join(dead)} have only zero weights")
    return f"{'; '.join(parts)}." if parts else ""


def layers_words(explanation: Explanation) -> str:
    """How layers are numbered where some were removed; empty where none was."""
    if not explanation.layers_left:
        return ""
    left = [f"Of the {one.of:,} layers in {one.path}, {_listed(one.kept)} left." for one in explanation.layers_left]
    return " ".join(["Layers are numbered from 0, as in the dense model.", *left])


def _listed(numbers: Sequence[int]) -> str:
    """Numbers with their verb: `0, 2 and 5 are`."""
    texts = [str(number) for number in numbers]
    if len(texts) < 2:
        return f"{texts[0]} is" if texts else "none is"
    return f"{', '.join(texts[:-1])} and {texts[-1]} are"


def command_words(explanation: Explanation) -> str:
    """What is said before the command that measures an explanation again: where it is run."""
    if not explanation.command.startswith("hf-prune "):
        return "This call measures it again, in Python:"
    told = "This command measures it again. Run it in the model's folder, the one that has config.json"
    return f"{told}; put the real paths where it says {ELSEWHERE}:" if ELSEWHERE in explanation.command else f"{told}:"


def dead_units(units: Iterable[UnitGroup]) -> list[tuple[str, int, int]]:
    """For each structure how many units have nothing but zeros, and how many there are."""
    totals: dict[str, tuple[int, int]] = {}
    for group in units:
        dead, of = totals.get(group.structure, (0, 0))
        totals[group.structure] = (dead + group.dead, of + group.units)
    return [(structure, dead, of) for structure, (dead, of) in totals.items()]
