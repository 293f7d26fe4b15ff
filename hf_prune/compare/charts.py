"""The charts of a comparison: where each point, tick and line lies, for the page; and the same as a PNG."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO

import matplotlib.ticker
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .comparison import Comparison, figure, shown
from .models import ComparedModel
from .pareto import Axis

WIDTH, HEIGHT = 480, 340  # of a chart, in units of its picture

_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 30, 24, 58

_MOST_DECIMALS, _LARGE = 6, 1e6  # beyond these, ticks are written with an exponent

_NEAR = 12  # points that are nearer to each other share a label

_DENSE_COLOR, _PRUNED_COLOR, _BEST_COLOR = "#6b7280", "#2b6cb5", "#b5432b"


@dataclass(frozen=True)
class Point:
    """A model in a chart: its number in the table, its place, what is said of it, and what is written beside it.

    Of points that lie on each other, the first has the numbers of all beside it, and the others have none.
    """

    number: int
    x: float
    y: float
    words: str
    kind: str
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart of the metric over an axis, in units of `WIDTH` and `HEIGHT` from the upper left corner."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    points: tuple[Point, ...]
    front: str
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM

    @property
    def description(self) -> str:
        """What the chart shows, for who does not see it."""
        return f"{self.title}: {'; '.join(point.words for point in self.points)}"


def charts_of(comparison: Comparison) -> list[Chart]:
    """A chart for each axis on which models can be placed; none if nothing was measured."""
    return [] if comparison.measure is None else [_chart(comparison, axis) for axis in comparison.axes]


def _placed(comparison: Comparison, axis: Axis) -> list[tuple[int, ComparedModel, float, float]]:
    """Number in the table, model, x and y of all models that have both."""
    measure = comparison.measure
    return [
        (number, model, x, y)
        for number, model in enumerate(comparison.models, start=1)
        if measure is not None and (x := axis.value(model)) is not None and (y := measure.value(model)) is not None
    ]


def _chart(comparison: Comparison, axis: Axis) -> Chart:
    measure = comparison.measure
    assert measure is not None
    placed = _placed(comparison, axis)
    x_ticks = _ticks([x for *_, x, _ in placed], axis.is_share)
    y_ticks = _ticks([y for *_, y in placed])
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM

    def at_x(value: float) -> float:
        return round(_LEFT + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - _LEFT), 1)

    def at_y(value: float) -> float:
        return round(bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - _TOP), 1)

    on_front = comparison.front(axis)
    corners = [(at_x(x), at_y(y)) for model in on_front for _, one, x, y in placed if one is model]
    return Chart(
        title=f"{measure.name} over {axis.words}",
        x_label=f"{axis.words} ({'← lower' if axis.lower_is_better else 'higher →'} is better)",
        y_label=f"{measure.name} ({measure.part}){', lower is better' if measure.lower_is_better else ''}",
        x_ticks=tuple(
            (at_x(tick), label) for tick, label in zip(x_ticks, _labels(x_ticks, axis.is_share), strict=True)
        ),
        y_ticks=tuple((at_y(tick), label) for tick, label in zip(y_ticks, _labels(y_ticks), strict=True)),
        points=_labelled(
            [
                Point(
                    number,
                    at_x(x),
                    at_y(y),
                    f"{number} {model.name}: {measure.name} {figure(y)}, {axis.words} {shown(axis, model)}",
                    _kind(comparison, model, any(model is one for one in on_front)),
                )
                for number, model, x, y in placed
            ]
        ),
        front=" ".join(f"{x},{y}" for x, y in corners),
    )


def _labelled(points: Sequence[Point]) -> tuple[Point, ...]:
    """The points with what is written beside them."""
    groups: list[list[Point]] = []
    for point in points:
        near = (group for group in groups if math.hypot(point.x - group[0].x, point.y - group[0].y) < _NEAR)
        group = next(near, None)
        if group is None:
            groups.append([point])
        else:
            group.append(point)
    labels = {group[0].number: ", ".join(str(point.number) for point in group) for group in groups}
    return tuple(replace(point, label=labels.get(point.number, "")) for point in points)


def _kind(comparison: Comparison, model: ComparedModel, on_front: bool) -> str:
    kinds = ["pruned" if model.is_pruned else "dense", "front" if on_front else "beaten"]
    return " ".join([*kinds, *(["best"] if model is comparison.choice.best else [])])


def _ticks(values: Sequence[float], is_share: bool = False) -> list[float]:
    """Round numbers around all values, at least two of them; for shares, from 0 to 1."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if math.isclose(low, high):
        width = abs(low) / 10 or 1.0
        low, high = low - width / 2, high + width / 2
        if is_share:
            low, high = max(0.0, low), min(1.0, high)
    margin = 0.05 * (high - low)
    found = matplotlib.ticker.MaxNLocator(6).tick_values(low - margin, high + margin)
    return [float(tick) for tick in found if not is_share or -1e-9 <= tick <= 1 + 1e-9]


def _labels(ticks: Sequence[float], is_share: bool = False) -> list[str]:
    """What is written at ticks, with as many digits as tell them apart; shares in percent."""
    factor, unit = (100, "%") if is_share else (1, "")
    values = [factor * tick for tick in ticks]
    step, largest = min(high - low for low, high in itertools.pairwise(values)), max(map(abs, values))
    # Steps are round numbers of two digits at most, such as 2.5.
    fits = (count for count in range(_MOST_DECIMALS + 1) if math.isclose(round(step, count), step, rel_tol=1e-6))
    decimals = next(fits, None)
    if decimals is None or largest >= _LARGE:
        digits = math.ceil(math.log10(largest / step)) + 2
        return [f"{value:.{digits}g}{unit}" for value in values]
    return [f"{round(value, decimals) + 0.0:.{decimals}f}{unit}" for value in values]


def draw_png(comparison: Comparison) -> bytes | None:
    """All charts in one picture; None if nothing was measured."""
    measure = comparison.measure
    axes = [axis for axis in comparison.axes if _placed(comparison, axis)]
    if measure is None or not axes:
        return None
    columns = min(2, len(axes))
    rows = -(-len(axes) // columns)
    picture = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    panels = picture.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, axis in zip(panels, axes, strict=False):
        placed = _placed(comparison, axis)
        where = {id(model): (x, y) for _, model, x, y in placed}
        front = [where[id(model)] for model in comparison.front(axis)]
        panel.plot(*zip(*front, strict=True), "-", color=_PRUNED_COLOR, alpha=0.5, zorder=1)
        for _, model, x, y in placed:
            is_best = model is comparison.choice.best
            color = _BEST_COLOR if is_best else _PRUNED_COLOR if model.is_pruned else _DENSE_COLOR
            panel.plot([x], [y], "o" if model.is_pruned else "s", color=color, markersize=9 if is_best else 6)
        for point, (_, _, x, y) in zip(_chart(comparison, axis).points, placed, strict=True):
            panel.annotate(point.label, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=8)
        panel.margins(0.12)
        better = "lower" if axis.lower_is_better else "higher"
        panel.set_xlabel(f"{axis.words} ({better} is better)", fontsize=9, parse_math=False)
        panel.set_ylabel(f"{measure.name} ({measure.part})", fontsize=9, parse_math=False)
        if axis.is_share:
            panel.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        panel.grid(alpha=0.3)
    for panel in panels[len(axes) :]:
        panel.remove()
    picture.dpi = 120
    file = BytesIO()
    FigureCanvasAgg(picture).print_png(file, metadata={"Software": None})
    return file.getvalue()
