"""Plots of a run, as PNG files."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..methods.penalties import PENALTIES
from ..saved.removed import Removed
from ..structure.chosen import Chosen
from ..structure.units import words_for

_SPARSITY_COLOR = "#b5432b"

_LOSS_COLOR = "#2b6cb5"

_METRIC_COLOR = "#3d7a3d"

_PENALTY_COLOR = "#8a6d1d"

_REMOVED_COLOR = "#dddddd"

# With more, names would be illegible, and the plot larger than a PNG can be.
_NAMED_TENSORS = 250

_LONGEST_NAME = 30


def plot_schedule(
    log_history: Sequence[Mapping[str, Any]], path: Path | BinaryIO, title: str, metric: str | None = None
) -> None:
    """Plot sparsity and losses over optimizer steps, from a Trainer's `log_history`; below them `metric`, if logged.

    With distillation, the training loss shown is the task loss, which is comparable with the validation loss; the
    distillation losses and penalties are lines of their own.
    """
    distilled = any("task_loss" in entry for entry in log_history)
    training_loss = "task_loss" if distilled else "loss"
    values = [entry[f"eval_{metric}"] for entry in log_history if f"eval_{metric}" in entry]
    with_metric = bool(values) and metric != "loss"
    figure = Figure(figsize=(8, 6 if with_metric else 4), layout="constrained")
    heights = (3, 2) if with_metric else (3,)
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    left, right = panels[0], panels[0].twinx()
    lines: list[Line2D] = []
    for axis, name, label, color, style in (
        (left, "sparsity", "sparsity", _SPARSITY_COLOR, "-"),
        (left, "target_sparsity", "target sparsity", _SPARSITY_COLOR, ":"),
        (right, training_loss, "training loss of the task" if distilled else "training loss", _LOSS_COLOR, "-"),
        (right, "eval_loss", "validation loss", _LOSS_COLOR, "o--"),
        (right, "distillation_loss", "distillation loss", _LOSS_COLOR, ":"),
        (right, "hidden_loss", "hidden-state loss", _LOSS_COLOR, "-."),
        *((right, f"{name}_penalty", f"penalty ({name})", _PENALTY_COLOR, "-.") for name in PENALTIES),
    ):
        lines += _draw(axis, log_history, name, label, color, style)
    left.set(ylabel="sparsity", ylim=(0, 1), title=title)
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    right.set(ylabel="loss")
    losses = [entry[name] for entry in log_history for name in (training_loss, "eval_loss") if name in entry]
    if not any(loss < 0 for loss in losses):
        right.set_ylim(bottom=0)
    if with_metric:
        shown = _short(str(metric))
        lines += _draw(panels[1], log_history, f"eval_{metric}", f"validation: {shown}", _METRIC_COLOR, "o-")
        panels[1].set(ylabel=shown)
        if min(values) >= 0 and max(values) <= 1:
            panels[1].set_ylim(0, 1)  # or a small change would look like a large one
        panels[1].grid(axis="y", alpha=0.3)
    panels[-1].set_xlabel("optimizer step")
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def _draw(
    axis: Axes, log_history: Sequence[Mapping[str, Any]], name: str, label: str, color: str, style: str
) -> list[Line2D]:
    points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    return axis.plot(steps, values, style, color=color, label=label)


def _short(name: str) -> str:
    """A name that fits beside an axis, never rendered as a formula."""
    name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
    return name.replace("$", r"\$")


def plot_layers(sparsities: Mapping[str, float], path: Path | BinaryIO, title: str) -> None:
    """Plot a bar per tensor, the share of its weights that are zero; without names above `_NAMED_TENSORS` tensors."""
    if len(sparsities) > _NAMED_TENSORS:
        _plot_outline(list(sparsities.values()), path, title)
        return
    names = list(sparsities)
    figure = Figure(figsize=(8, max(2.0, 0.8 + 0.17 * len(names))), layout="constrained")
    axis = figure.add_subplot()
    axis.barh(names, [sparsities[name] for name in names], color=_SPARSITY_COLOR)
    axis.invert_yaxis()
    axis.set(xlabel="share of weights that are zero", xlim=(0, 1), title=title)
    axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axis.tick_params(axis="y", labelsize=7)
    for label in axis.get_yticklabels():
        label.set_parse_math(False)  # names are names, never formulas
    axis.margins(y=0.01)
    _save(figure, path)


def plot_units(removed: Removed, path: Path | BinaryIO) -> None:
    """Plot a bar per layer: the share of its units that are left, a panel for each kind. Removed layers are marked.

    Without names above `_NAMED_TENSORS` bars.
    """
    panels = _panels_of(removed)
    number = sum(map(len, panels.values()))
    height = min(0.9 * len(panels) + 0.19 * number, 0.9 * len(panels) + 0.19 * _NAMED_TENSORS)
    figure = Figure(figsize=(8, max(2.0, height)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(bars) + 3 for bars in panels.values()])[:, 0]
    for axis, (structure, bars) in zip(axes, panels.items(), strict=True):
        places = range(len(bars))
        axis.barh(places, [1.0] * len(bars), color=_REMOVED_COLOR)
        axis.barh(places, [share for _, share, _ in bars], color=_LOSS_COLOR)
        axis.set_yticks([])
        if number <= _NAMED_TENSORS:
            axis.set_yticks(places, [name for name, _, _ in bars], parse_math=False, fontsize=7)
            for place, (_, _, said) in enumerate(bars):
                axis.annotate(said, (1.01, place), va="center", fontsize=7, annotation_clip=False)
        axis.invert_yaxis()
        axis.set(xlim=(0, 1), title=f"{words_for(structure).capitalize()} that are left")
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axis.margins(y=0.01)
    _save(figure, path)


def plot_search(chosen: Chosen, path: Path | BinaryIO) -> None:
    """Plot for the structures that a target was searched among how fast they are, and how much they change the outputs.

    Those are the structures than which no other is as fast and changes less; the chosen one is marked, and how fast the
    trained model is, if it was measured.
    """
    dense = chosen.dense.seconds
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    speeds = [dense / one.seconds for one in chosen.frontier]
    changes = [one.change for one in chosen.frontier]
    axis.plot(speeds, changes, ".-", color=_LOSS_COLOR, label="best structures")
    axis.plot(
        [chosen.speedup],
        [chosen.candidate.change],
        "*",
        markersize=14,
        color=_SPARSITY_COLOR,
        label=f"chosen: {chosen.words_of(chosen.candidate)}",
    )
    if chosen.reached_speedup is not None:
        axis.axvline(
            chosen.reached_speedup, linestyle=":", color=_METRIC_COLOR, label=f"trained: {chosen.reached_speedup:.2f}"
        )
    axis.set(
        xlabel="times as fast as the dense model",
        ylabel="predicted change of the outputs",
        title=f"Structures considered for {chosen.target.words}",
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, frameon=False)  # in one row they may be wider than the picture
    _save(figure, path)


def plot_curves(curves: Mapping[str, Mapping[float, float]], dense: float, path: Path | BinaryIO, title: str) -> None:
    """Plot for each tensor what pruning it alone adds to the loss, over its sparsity.

    `curves` maps names to sparsity -> loss. Tensors whose names differ in numbers alone, as those of a stack of layers
    do, share a panel: the darker, the later in the stack.
    """
    panels: dict[str, list[Mapping[float, float]]] = {}
    for name, losses in curves.items():
        panels.setdefault(re.sub(r"\b\d+\b", "*", name), []).append(losses)
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 * columns + 1, 2.4 * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    colors = LinearSegmentedColormap.from_list("depth", ["#c9dcf2", _LOSS_COLOR, "#0d2540"])
    for axis, (name, some) in zip(axes, panels.items(), strict=False):
        for place, losses in enumerate(some):
            points = [(0.0, 0.0), *sorted((rate, loss - dense) for rate, loss in losses.items())]
            axis.plot(*zip(*points, strict=True), ".-", linewidth=1, color=colors(place / max(len(some) - 1, 1)))
        axis.set_title(name.removesuffix(".weight").rpartition("*.")[2], fontsize=8, parse_math=False)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("sparsity of this tensor alone", fontsize=9)
    figure.supylabel("added to the loss", fontsize=9)
    _save(figure, path)


def _panels_of(removed: Removed) -> dict[str, list[tuple[str, float, str]]]:
    """For each kind of units the bars: name, the share that is left, and what is written beside it.

    Layers have bars of their own where no other units were removed.
    """
    layers = [(f"{stack.path}.{index}", index in stack.kept) for stack in removed.layers for index in range(stack.of)]
    if removed.structures == ["layers"]:
        return {"layers": [(path, float(is_kept), "" if is_kept else "removed") for path, is_kept in layers]}
    gone = [(path, 0.0, "layer removed") for path, is_kept in layers if not is_kept]
    panels = {}
    for structure in (name for name in removed.structures if name != "layers"):
        units = [one for one in removed.units if one.structure == structure]
        bars = [(one.path, one.left / one.of, f"{one.left:,} of {one.of:,}") for one in units]
        panels[structure] = sorted([*bars, *gone], key=lambda bar: _natural(bar[0]))
    return panels


def _natural(path: str) -> list[tuple[int, str]]:
    """A key that sorts paths as they are counted: layer 2 before layer 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)]


def _plot_outline(sparsities: Sequence[float], path: Path | BinaryIO, title: str) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.stairs(sparsities, fill=True, color=_SPARSITY_COLOR)
    axis.set(xlabel="tensor, in the model's order", ylabel="share of weights that are zero", title=title)
    axis.set(xlim=(0, len(sparsities)), ylim=(0, 1))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    _save(figure, path)


def _save(figure: Figure, path: Path | BinaryIO) -> None:
    figure.dpi = 120
    # Drawn once, where `savefig` would draw twice for the same bytes; without the version, which would change them.
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})
