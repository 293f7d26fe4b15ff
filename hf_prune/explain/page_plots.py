"""The pictures of an explanation as PNG files, for cards and Markdown: zeros, slices and calibration."""

import io

import matplotlib
import matplotlib.ticker
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from ..publish.explanation import Calibration, Explanation, Slice
from ..publish.explanation_words import by_kind, estimate_ends, is_of_language, is_share, slice_name, worst_first
from ..publish.markdown import single_line
from .page_colors import STEPS, palette, step_of
from .page_heat import Heat, heads_by_layer, shapes_by_layer, zeros_by_layer
from .page_pictures import lowest_confidence

_PRUNED_COLOR, _DENSE_COLOR = "#b5432b", "#2b6cb5"

_LONGEST_NAME = 34

# The page has all of them.
_MOST_SLICES, _MOST_ROWS, _MOST_COLUMNS = 25, 60, 100

# Fewer and wider cells have their figures in them.
_MOST_COLUMNS_WITH_TEXT, _MOST_CELLS_WITH_TEXT = 16, 300


def make_plots(explanation: Explanation) -> dict[str, bytes | None]:
    """The PNG files by name; None for one that there is nothing to show in."""
    return {
        "taken.png": _taken(explanation),
        "slices.png": _slices(explanation),
        "calibration.png": _calibration(explanation),
    }


def _taken(explanation: Explanation) -> bytes | None:
    """Heat maps of zeros by layer and matrix and by head; of sizes, where only units were removed."""
    if any(matrix.zeros for matrix in explanation.matrices):
        panels = [("Zeros by layer and matrix, percent", map) for map in zeros_by_layer(explanation.matrices)]
        panels += [("Zeros in each head, percent", map) for map in heads_by_layer(explanation.units)]
    else:
        panels = [("Sizes by layer and matrix", map) for map in shapes_by_layer(explanation.matrices)]
    panels = panels[:4]
    if not panels:
        return None
    heights = [min(len(map.rows), _MOST_ROWS) + 3.0 for _, map in panels]
    figure = Figure(figsize=(8, max(2.0, 0.24 * sum(heights))), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (title, map) in zip(axes, panels, strict=True):
        _draw_heat(axis, map, f"{title}: {map.of}" if map.of else title)
    return _png(figure)


def _draw_heat(axis: Axes, map: Heat, title: str) -> None:
    rows = map.rows[:_MOST_ROWS]
    columns = map.columns[:_MOST_COLUMNS]
    colors = palette(is_dark=False)
    with_text = len(columns) <= _MOST_COLUMNS_WITH_TEXT and len(columns) * len(rows) <= _MOST_CELLS_WITH_TEXT
    values = np.full((len(rows), len(columns)), np.nan)
    for down, (_, cells) in enumerate(rows):
        for across, cell in enumerate(cells[: len(columns)]):
            if cell is None:
                continue
            step = step_of(cell.value)
            values[down, across] = step
            if with_text:
                text = _drawable(cell.text)
                axis.text(across, down, text, ha="center", va="center", fontsize=7, color=colors[step][1])
    axis.imshow(values, cmap=ListedColormap([color for color, _ in colors]), vmin=0, vmax=STEPS, aspect="auto")
    axis.set_title(_drawable(title), fontsize=9, parse_math=False)
    axis.set_yticks(range(len(rows)), [_short(name) for name, _ in rows], fontsize=7, parse_math=False)
    every = -(-len(columns) // 24)
    axis.set_xticks(range(0, len(columns), every), columns[::every], fontsize=7, parse_math=False)
    axis.tick_params(length=0)
    axis.set_xlabel("head" if "head" in map.corner else "layer", fontsize=8)
    axis.spines[:].set_visible(False)
    if with_text:
        axis.set_xticks(np.arange(1, len(columns)) - 0.5, minor=True)
        axis.set_yticks(np.arange(1, len(rows)) - 0.5, minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="minor", length=0)


def _slices(explanation: Explanation) -> bytes | None:
    """The metric of both models on each slice, the worst first; for language models in their order."""
    kinds = by_kind(explanation) if is_of_language(explanation) else [worst_first(explanation)]
    some = [one for kind in kinds for one in kind]
    if not some:
        return None
    shown = some[:_MOST_SLICES]
    figure = Figure(figsize=(8, 1.4 + 0.3 * len(shown)), layout="constrained")
    axis = figure.add_subplot()
    for place, one in enumerate(shown):
        _draw_slice(axis, place, one)
    names = [f"{_short(slice_name(one))}  ({one.metric.samples:,})" for one in shown]
    axis.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
    for label, one in zip(axis.get_yticklabels(), shown, strict=True):
        label.set_fontweight("bold" if one.is_worse else "normal")
    axis.set_ylim(len(shown) - 0.4, -0.6)
    if is_share(explanation.metric, shown[0].metric.pruned.value):
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.grid(axis="x", alpha=0.3)
    order = "in order" if is_of_language(explanation) else "the worst first"
    left_out = f"; {len(shown)} of {len(some)}" if len(shown) < len(some) else ""
    axis.set_title(_drawable(f"{explanation.metric} of each slice, {order}{left_out}"), fontsize=10, parse_math=False)
    if any(one.is_worse for one in shown):
        axis.set_xlabel("95% intervals; bold: significantly worse", fontsize=8)
    else:
        axis.set_xlabel("95% intervals", fontsize=8)
    handles, labels = axis.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return _png(figure)


def _draw_slice(axis: Axes, place: int, one: Slice) -> None:
    for name, estimate, color, at in (
        ("dense", one.metric.dense, _DENSE_COLOR, place - 0.16),
        ("pruned", one.metric.pruned, _PRUNED_COLOR, place + 0.16 if one.metric.dense is not None else place),
    ):
        if estimate is not None:
            axis.plot(estimate_ends(estimate), (at, at), color=color, linewidth=1.5)
            filled = color if name == "pruned" else "white"
            axis.plot([estimate.value], [at], "o", color=color, markerfacecolor=filled, markersize=5, label=name)


def _calibration(explanation: Explanation) -> bytes | None:
    """Reliability pictures of the dense and the pruned model, on the same axes."""
    answers = explanation.answers
    found = [
        (name, one, color)
        for name, one, color in (
            ("dense", answers.dense_calibration, _DENSE_COLOR),
            ("pruned", answers.calibration, _PRUNED_COLOR),
        )
        if one is not None and any(bin.samples for bin in one.bins)
    ]
    if not found:
        return None
    lowest = lowest_confidence([one for _, one, _ in found])
    figure = Figure(figsize=(4 * len(found), 3.8), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False, sharey=True)[0]
    for axis, (name, one, color) in zip(axes, found, strict=True):
        _draw_reliability(axis, one, lowest, color)
        axis.set_title(f"{name}: off by {one.error.value:.1%}", fontsize=10)
    axes[0].set_ylabel("share answered right")
    return _png(figure)


def _draw_reliability(axis: Axes, calibration: Calibration, lowest: float, color: str) -> None:
    bins = [one for one in calibration.bins if one.samples]
    lows, widths = [one.low for one in bins], [one.high - one.low for one in bins]
    axis.bar(lows, [one.accuracy for one in bins], widths, align="edge", color=color, alpha=0.25, edgecolor=color)
    axis.plot((lowest, 1), (lowest, 1), "--", color="gray", linewidth=1)
    axis.plot([one.confidence for one in bins], [one.accuracy for one in bins], "o", color=color, markersize=4)
    axis.set(xlim=(lowest, 1), ylim=(0, 1), xlabel="confidence")
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.grid(alpha=0.3)


def _short(name: str) -> str:
    """A name that fits beside an axis, in characters that can be drawn."""
    name = single_line(name)
    return _drawable(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…")


def _drawable(text: str) -> str:
    """The text with an empty box for each character that matplotlib's font lacks."""
    font = get_font(findfont(FontProperties()))
    return "".join(char if font.get_char_index(ord(char)) else "□" for char in text)


def _png(figure: Figure) -> bytes:
    figure.dpi = 120
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": None})
    return content.getvalue()
