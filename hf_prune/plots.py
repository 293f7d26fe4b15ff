"""Pictures of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

_SPARSITY_COLOR = "#b5432b"
_LOSS_COLOR = "#2b6cb5"
_METRIC_COLOR = "#3d7a3d"

# With more, names could not be read, and the picture would outgrow what a PNG may hold.
_NAMED_TENSORS = 250


def plot_schedule(
    log_history: Sequence[Mapping[str, Any]], path: Path | BinaryIO, title: str, metric: str | None = None
) -> None:
    """Sparsity and losses over optimizer steps, from a Trainer's `log_history`; below it `metric`, if it is there."""
    with_metric = metric is not None and metric != "loss" and any(f"eval_{metric}" in entry for entry in log_history)
    figure = Figure(figsize=(8, 6.5 if with_metric else 4), layout="constrained")
    panels = figure.subplots(2 if with_metric else 1, sharex=True, squeeze=False)[:, 0]
    lines = _draw_beside_sparsity(
        panels[0],
        log_history,
        "loss",
        (("loss", "training loss", _LOSS_COLOR, "-"), ("eval_loss", "validation loss", _LOSS_COLOR, "o--")),
    )
    if with_metric:
        name = str(metric).replace("$", r"\$")  # or matplotlib would take it for a formula
        label = f"validation: {name}"
        drawn = _draw_beside_sparsity(panels[1], log_history, name, ((f"eval_{metric}", label, _METRIC_COLOR, "o-"),))
        lines += [line for line in drawn if line.get_label() == label]
    panels[0].set_title(title)
    panels[-1].set_xlabel("optimizer step")
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def _draw_beside_sparsity(
    left: Axes, log_history: Sequence[Mapping[str, Any]], label: str, curves: Sequence[tuple[str, str, str, str]]
) -> list[Line2D]:
    """Sparsity on the left axis, curves (name in the log, label, color, style) on the right; the lines drawn."""
    right = left.twinx()
    lines: list[Line2D] = []
    sparsity = (
        ("sparsity", "sparsity", _SPARSITY_COLOR, "-"),
        ("target_sparsity", "target sparsity", _SPARSITY_COLOR, ":"),
    )
    for axis, drawn in ((left, sparsity), (right, curves)):
        for name, text, color, style in drawn:
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
            if points:
                steps, values = zip(*points, strict=True)
                lines += axis.plot(steps, values, style, color=color, label=text)
    left.set(ylabel="sparsity", ylim=(0, 1))
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    right.set(ylabel=label)
    if label == "loss":
        right.set_ylim(bottom=0)
    return lines


def plot_layers(sparsities: Mapping[str, float], path: Path | BinaryIO, title: str) -> None:
    """One bar a tensor: the share of its weights that are zero. More than `_NAMED_TENSORS` make an outline, unnamed."""
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


def _plot_outline(sparsities: Sequence[float], path: Path | BinaryIO, title: str) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.stairs(sparsities, fill=True, color=_SPARSITY_COLOR)
    axis.set(xlabel="tensor, in the model's order", ylabel="share of weights that are zero", title=title)
    axis.set(xlim=(0, len(sparsities)), ylim=(0, 1))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    _save(figure, path)


def _save(figure: Figure, path: Path | BinaryIO) -> None:
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})  # the same bytes, whatever the version
