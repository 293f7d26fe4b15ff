"""Pure functions of rows: which points no other beats, and which is best within limits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..config.checks import is_number
from ..errors import CompareError
from .measures import Measure
from .models import ComparedModel


def pareto_front(points: Sequence[tuple[float, float]], lower_x: bool, lower_y: bool) -> list[int]:
    """The indices of the points that no other beats, in the order of x from its best value on.

    A point (x, y) is beaten by another that is at least as good in both, and better in one. With `lower_x`, lower x are
    better, with `lower_y`, lower y. Equal points are all on the front, or none is.
    """
    signs = (1 if lower_x else -1, 1 if lower_y else -1)
    best_first = sorted(range(len(points)), key=lambda at: (signs[0] * points[at][0], signs[1] * points[at][1], at))
    front: list[int] = []
    for at in best_first:
        last = points[front[-1]] if front else None
        if last is None or points[at] == last or signs[1] * points[at][1] < signs[1] * last[1]:
            front.append(at)
    return front


@dataclass(frozen=True)
class Axis:
    """What a metric is traded for.

    Attributes:
        key: its name in files.
        words: its title, with the unit.
        value: its value for a model; None if it is not known.
        lower_is_better: whether lower values are better.
        is_share: whether values are shares, shown in percent.
        samples: of a time, for how many samples it is.
    """

    key: str
    words: str
    value: Callable[[ComparedModel], float | None]
    lower_is_better: bool
    is_share: bool = False
    samples: int | None = None


def axes_of(models: Sequence[ComparedModel]) -> list[Axis]:
    """Sparsity, bytes, the times for one sample and for several, and the tokens a second of models that generate text.

    Several samples are the number that most models were timed with. It depends on the time there was; where no two of
    the models have the same, there is no such axis.
    """
    axes = [
        Axis("sparsity", "sparsity of the prunable weights", lambda model: model.sparsity, False, is_share=True),
        Axis("megabytes", "megabytes of the weight files", lambda model: model.megabytes, True),
        Axis("milliseconds_1", "milliseconds, 1 sample", lambda model: model.milliseconds(1), True, samples=1),
    ]
    counts = [cost.samples for model in models for cost in model.costs if cost.samples > 1]
    several = max(sorted(set(counts)), key=counts.count, default=0)
    if counts.count(several) > 1 or (counts and len(models) == 1):
        words = f"milliseconds, {several} samples"
        key = f"milliseconds_{several}"
        axes.append(Axis(key, words, lambda model: model.milliseconds(several), True, samples=several))
    axes.append(Axis("tokens_per_second", "generated tokens a second", lambda model: model.tokens_per_second, False))
    return [axis for axis in axes if any(axis.value(model) is not None for model in models)]


@dataclass(frozen=True)
class Limits:
    """What the best model must keep to; None where anything may be.

    Attributes:
        latency_ms: the longest median time of a forward pass on one sample, in milliseconds.
        max_mb: the most millions of bytes of its weight files.
        min_sparsity: the least share of the dense model's prunable weights that are zero or removed.
    """

    latency_ms: float | None = None
    max_mb: float | None = None
    min_sparsity: float | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, option in (("latency_ms", "--latency-ms"), ("max_mb", "--max-mb")):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                problems.append((option, f"expected a number above 0, got {value!r}"))
        if self.min_sparsity is not None and not (is_number(self.min_sparsity) and 0 <= self.min_sparsity <= 1):
            problems.append(("--min-sparsity", f"expected a share from 0 to 1, got {self.min_sparsity!r}"))
        if problems:
            raise CompareError(problems=problems)

    @property
    def words(self) -> str:
        """The limits in words; empty where there are none."""
        parts = [
            f"at most {self.latency_ms:g} ms for one sample" if self.latency_ms is not None else "",
            f"at most {self.max_mb:g} MB" if self.max_mb is not None else "",
            f"at least {100 * self.min_sparsity:.4g}% sparsity" if self.min_sparsity is not None else "",
        ]
        *others, last = [part for part in parts if part] or [""]
        return f"{', '.join(others)} and {last}" if others else last

    def excess(self, model: ComparedModel) -> float | None:
        """By which share a model is beyond the limits, in total; 0 if it keeps to them, None if that is not known."""
        excess = 0.0
        for value, most in ((model.milliseconds(1), self.latency_ms), (model.megabytes, self.max_mb)):
            if most is not None:
                if value is None:
                    return None
                excess += max(0.0, value / most - 1)
        if self.min_sparsity is not None:
            if model.sparsity is None:
                return None
            excess += max(0.0, self.min_sparsity - model.sparsity)
        return excess


@dataclass(frozen=True)
class Choice:
    """The best of the models that are not dense: `best` within the limits; or else the `closest` to them."""

    best: ComparedModel | None
    closest: ComparedModel | None
    candidates: int


def choose(models: Sequence[ComparedModel], measure: Measure | None, limits: Limits) -> Choice:
    """The pruned model with the best metric that keeps to the limits.

    Of equal ones it is the smallest, then the sparsest, then the fastest: times differ a little whenever they are
    measured. Models without the metric, or without what a limit is about, are not chosen.
    """
    if measure is None:
        return Choice(None, None, 0)
    sign = 1 if measure.lower_is_better else -1
    found = [(value, model) for model in models if model.is_pruned and (value := measure.value(model)) is not None]
    known = [(limits.excess(model), value, model) for value, model in found]
    within = [(sign * value, *_size(model), model) for excess, value, model in known if excess == 0]
    if within:
        best = min(within, key=lambda entry: entry[:-1])[-1]
        return Choice(best, None, len(within))
    beyond = [(excess, sign * value, model) for excess, value, model in known if excess is not None]
    closest = min(beyond, key=lambda entry: entry[:-1])[-1] if beyond else None
    return Choice(None, closest, 0)


def _size(model: ComparedModel) -> tuple[float, float, float]:
    """What breaks ties, lower values first: bytes, sparsity, milliseconds."""
    unknown = float("inf")
    milliseconds = model.milliseconds(1)
    return (
        float(model.file_bytes) if model.file_bytes is not None else unknown,
        -model.sparsity if model.sparsity is not None else unknown,
        milliseconds if milliseconds is not None else unknown,
    )
