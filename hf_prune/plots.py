"""Pictures of a run, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.ticker
from matplotlib.figure import Figure

_SPARSITY_COLOR = "#b5432b"
_LOSS_COLOR = "#2b6cb5"

# With more, names could not be read, and the picture would outgrow what a PNG may hold.
_NAMED_TENSORS = 250


def plot_schedule(log_history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Sparsity (left axis) and the losses (right axis) over optimizer steps, from a Trainer's `log_history`."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    left = figure.add_subplot()
    right = left.twinx()
    lines = []
    for axis, name, label, color, style in (
        (left, "sparsity", "sparsity", _SPARSITY_COLOR, "-"),
        (left, "target_sparsity", "target sparsity", _SPARSITY_COLOR, ":"),
        (right, "loss", "training loss", _LOSS_COLOR, "-"),
        (right, "eval_loss", "validation loss", _LOSS_COLOR, "o--"),
    ):
        points = [(entry["step"], entry[name]) for entry in log_history if name in entry]
        if points:
            steps, values = zip(*points, strict=True)
            lines += axis.plot(steps, values, style, color=color, label=label)
    left.set(xlabel="optimizer step", ylabel="sparsity of the pruned tensors", ylim=(0, 1))
    left.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    right.set(ylabel="loss")
    right.set_ylim(bottom=0)
    left.set_title(title)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    figure.savefig(path, dpi=120)


def plot_layers(sparsities: Mapping[str, float], path: Path, title: str) -> None:
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
    axis.margins(y=0.01)
    figure.savefig(path, dpi=120)


def _plot_outline(sparsities: Sequence[float], path: Path, title: str) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.add_subplot()
    axis.stairs(sparsities, fill=True, color=_SPARSITY_COLOR)
    axis.set(xlabel="tensor, in the model's order", ylabel="share of weights that are zero", title=title)
    axis.set(xlim=(0, len(sparsities)), ylim=(0, 1))
    axis.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    figure.savefig(path, dpi=120)
