"""Table and figure of the rows that `structure.py` has measured."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from quality_report import spread

COLORS = {
    "dense": "#555555",
    "neurons": "#2b6cb5",
    "layers": "#3a9188",
    "hidden": "#6b8e23",
    "neurons and layers": "#b5432b",
    "per layer": "#7b3fa0",
    "at random, at once": "#c9a227",
    "new small model": "#8a8a8a",
    "Torch-Pruning": "#e08214",
    "Torch-Pruning, hidden states too": "#8c510a",
    "zeros": "#d98880",
}

Rows = Sequence[Mapping[str, Any]]


def write_report(rows: Rows, sizes: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Write `report.md` and `structure.png` into a folder; the text of the former."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    text = "\n\n".join(table([row for row in rows if row["task"] == task], sizes) for task in tasks) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw([row for row in rows if row["task"] == "sentences"], sizes, folder / "structure.png")
    return text


def relative(rows: Rows, setting: str, to: str = "dense") -> list[float]:
    """The accuracies of a setting over those of the dense models they started from, or over another setting's.

    Another setting is compared seed by seed, each relative to its dense model.
    """
    others = {row["seed"]: 1.0 if to == "dense" else _of_dense(row) for row in rows if row["setting"] == to}
    found = [row for row in rows if row["setting"] == setting and row["seed"] in others]
    return [_of_dense(row) / others[row["seed"]] for row in found]


def _of_dense(row: Mapping[str, Any]) -> float:
    return float(row["test"] / (row["dense"] or row["test"]))


def faster(rows: Rows, sizes: Mapping[str, Mapping[str, Any]], setting: str, what: str) -> list[float]:
    """How many times faster the models of a setting are than the dense ones of their seeds; `what`: 1, 32 or flops."""
    folders = [row["folder"] for row in rows if row["setting"] == setting and row["folder"] in sizes]
    return [float(sizes[folder]["faster"][what]) for folder in folders]


def table(rows: Rows, sizes: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each setting: accuracy, its shares of dense, parameters, and how many times faster."""
    lines = [
        f"{rows[0]['task']}: accuracy (mean of seeds ± half of the range)",
        "",
        "| | seeds | accuracy | of dense | of dense, as many steps | parameters (millions) | faster, 1 text | 32 texts "
        "| fewer multiply-adds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        of_setting = [row for row in rows if row["setting"] == setting]
        shares = relative(rows, setting)
        of_as_many = relative(rows, setting, "dense, as many steps")
        numbers = [sizes[row["folder"]]["parameters"] / 1e6 for row in of_setting if row["folder"] in sizes]
        cells = [
            f"{len(of_setting)}",
            spread([row["test"] for row in of_setting]),
            f"{statistics.mean(shares):.1%}" if shares else "",
            f"{statistics.mean(of_as_many):.1%}" if of_as_many else "",
            f"{statistics.mean(numbers):.1f}" if numbers else "",
        ]
        for what in ("1", "32", "flops"):
            times = faster(rows, sizes, setting, what)
            cells.append(f"{statistics.mean(times):.1f}" if times else "")
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Rows, sizes: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Accuracy relative to dense against how many times faster: the mean of the seeds, and their range."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = {row["setting"]: row["kind"] for row in rows}
    for kind, color in COLORS.items():
        points = []
        for setting in (setting for setting, of in kinds.items() if of == kind):
            shares, times = relative(rows, setting), faster(rows, sizes, setting, "32")
            if shares and times:
                points.append((statistics.mean(times), statistics.mean(shares), min(shares), max(shares)))
        points.sort()
        if points:
            x, y, low, high = zip(*points, strict=True)
            errors = [[one - least for one, least in zip(y, low, strict=True)]]
            errors.append([most - one for one, most in zip(y, high, strict=True)])
            axes.errorbar(x, y, errors, label=kind, color=color, marker="o", capsize=3, linewidth=1.5)
    axes.set_xlabel("times faster than the dense model (CPU time of 32 texts of 128 tokens)")
    axes.set_ylabel("accuracy relative to dense")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
