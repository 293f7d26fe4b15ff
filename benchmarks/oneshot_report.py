"""Tables and figures of the rows that `oneshot.py` has measured."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, PercentFormatter

Rows = Sequence[Mapping[str, Any]]

RIVAL = "llm-compressor: SparseGPT"

# What is aimed at, of llm-compressor's SparseGPT: perplexity on text of the calibration's kind, and CPU seconds.
PERPLEXITY_AIMS: Mapping[str, Mapping[str, float]] = {
    "the best setting": {"50%": 0.82, "60%": 0.63, "2:4": 0.72},
    "the fast setting": {"50%": 0.87, "60%": 0.68, "2:4": 0.80},
    "sparsegpt, own targets": {"50%": 1.02, "60%": 1.02, "2:4": 1.02},
}
SECONDS_AIMS: Mapping[str, Mapping[str, float]] = {
    "the best setting": dict.fromkeys(("50%", "60%", "2:4"), 1.0),
    "the fast setting": dict.fromkeys(("50%", "60%", "2:4"), 0.7),
    "sparsegpt, own targets": dict.fromkeys(("50%", "60%", "2:4"), 0.5),
}

# The order of lines, columns and pictures.
PATTERNS = ("", "50%", "60%", "70%", "2:4", "4:8")

COLORS = (
    "#8a8a8a",
    "#c9a227",
    "#3a9188",
    "#2b6cb5",
    "#7b3fa0",
    "#b5432b",
    "#e0b184",
    "#e08214",
    "#8c510a",
    "#d98880",
    "#555555",
)


def write_report(rows: Rows, folder: Path) -> str:
    """Write `report.md` and the figures into a folder; the text of the former."""
    rows = sorted(rows, key=lambda row: PATTERNS.index(row["pattern"]))
    pruned = [row for row in rows if row["setting"] != "dense"]
    text = table(rows) + "\n"
    if any(row["setting"] == RIVAL for row in pruned):
        text += "\n" + compared(pruned) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    if pruned:
        draw_perplexity(rows, folder / "sparsity.png")
        draw_seconds(pruned, folder / "seconds.png")
        draw_drift(pruned, folder / "drift.png")
    return text


def table(rows: Rows) -> str:
    """A line for each pattern and setting, with means of the seeds ± half of the range."""
    kinds = list(rows[0]["perplexity"]) if rows else []
    columns = ["", "", "seeds", *(f"perplexity, {kind}" for kind in kinds), "zeros", "CPU s", "wall s", "memory (GB)"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        for setting in dict.fromkeys(row["setting"] for row in rows):
            found = rows_at(rows, setting, pattern)
            if not found:
                continue
            cells = [pattern, setting, f"{len(found)}"]
            cells += [spread([row["perplexity"][kind] for row in found], 2) for kind in kinds]
            cells.append(spread([100 * row["zeros"] for row in found], 2) + "%")
            if "seconds" in found[0]:
                cells += [spread([row[name] for row in found], 0) for name in ("cpu_seconds", "seconds")]
                cells.append(spread([row["bytes"] / 1e9 for row in found], 2))
            else:
                cells += [""] * 3
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def compared(rows: Rows) -> str:
    """Tables of perplexities, CPU seconds and memory relative to llm-compressor's SparseGPT, and what is aimed at.

    Each figure is the mean over the seeds that both have.
    """
    kinds = list(rows[0]["perplexity"])
    found = [
        compare(rows, f"perplexity, {kind}", lambda row, kind=kind: row["perplexity"][kind], aims)
        for kind, aims in zip(kinds, [PERPLEXITY_AIMS, *[{}] * (len(kinds) - 1)], strict=True)
    ]
    found.append(compare(rows, "CPU seconds", lambda row: row["cpu_seconds"], SECONDS_AIMS))
    found.append(compare(rows, "memory", lambda row: row["bytes"], {}))
    return "\n\n".join(found)


def compare(
    rows: Rows, title: str, figure: Callable[[Mapping[str, Any]], float], aims: Mapping[str, Mapping[str, float]]
) -> str:
    """A table of one figure relative to llm-compressor's SparseGPT: a line for each setting and aim."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    lines = [f"| {title}, of {RIVAL}'s | " + " | ".join(patterns) + " |", "|---" * (len(patterns) + 1) + "|"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = [number(relative(rows, setting, pattern, figure)) for pattern in patterns]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
    for name, of_patterns in aims.items():
        cells = [number([of_patterns[pattern]] if pattern in of_patterns else []) for pattern in patterns]
        lines.append(f"| aim: {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def relative(rows: Rows, setting: str, pattern: str, figure: Callable[[Mapping[str, Any]], float]) -> list[float]:
    """Figures of a setting over those of llm-compressor's SparseGPT with the same seeds."""
    of_rival = {row["seed"]: figure(row) for row in rows_at(rows, RIVAL, pattern)}
    found = rows_at(rows, setting, pattern)
    return [figure(row) / of_rival[row["seed"]] for row in found if row["seed"] in of_rival]


def rows_at(rows: Rows, setting: str, pattern: str) -> list[Mapping[str, Any]]:
    """The rows of a setting with a pattern, one for each seed."""
    return [row for row in rows if row["setting"] == setting and row["pattern"] == pattern]


def spread(found: Sequence[float], digits: int) -> str:
    """Mean ± half of the range; the number alone if there is one."""
    text = f"{statistics.mean(found):.{digits}f}"
    return f"{text} ± {(max(found) - min(found)) / 2:.{digits}f}" if len(found) > 1 else text


def number(found: Sequence[float]) -> str:
    """The mean with two digits; nothing if there is none."""
    return f"{statistics.mean(found):.2f}" if found else ""


def colors_of(rows: Rows) -> dict[str, str]:
    """A color for each setting."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    return {setting: COLORS[index % len(COLORS)] for index, setting in enumerate(settings)}


def draw_perplexity(rows: Rows, path: Path) -> None:
    """Perplexity on each kind of text over unstructured sparsity: mean and range of the seeds."""
    pruned = [row for row in rows if row["pattern"].endswith("%")]
    kinds = list(rows[0]["perplexity"])
    figure = Figure(figsize=(5 * len(kinds) + 2, 4.5), layout="constrained")
    for kind, axes in zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True):
        for setting, color in colors_of(pruned).items():
            points = []
            for pattern in dict.fromkeys(row["pattern"] for row in pruned):
                found = [row["perplexity"][kind] for row in rows_at(pruned, setting, pattern)]
                if found:
                    points.append((float(pattern.rstrip("%")) / 100, statistics.mean(found), min(found), max(found)))
            x, y, low, high = zip(*sorted(points), strict=True)
            errors = [[one - least for one, least in zip(y, low, strict=True)]]
            errors.append([most - one for one, most in zip(y, high, strict=True)])
            axes.errorbar(x, y, errors, label=setting, color=color, marker="o", capsize=3, linewidth=1.5)
        for row in rows_at(rows, "dense", ""):
            axes.axhline(row["perplexity"][kind], color="black", linestyle=":", linewidth=1, label="dense")
        axes.set_xticks(
            [float(pattern.rstrip("%")) / 100 for pattern in dict.fromkeys(row["pattern"] for row in pruned)]
        )
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        describe(axes, kind, "sparsity", f"perplexity on {kind}")
    save(figure, path)


def draw_seconds(rows: Rows, path: Path) -> None:
    """Perplexity on text of the calibration's kind over CPU seconds, for each pattern: means of the seeds."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    kind = next(iter(rows[0]["perplexity"]))
    figure = Figure(figsize=(3.2 * len(patterns) + 2, 3.8), layout="constrained")
    for pattern, axes in zip(patterns, figure.subplots(1, len(patterns), squeeze=False)[0], strict=True):
        for setting, color in colors_of(rows).items():
            found = rows_at(rows, setting, pattern)
            if found:
                seconds = statistics.mean(row["cpu_seconds"] for row in found)
                perplexity = statistics.mean(row["perplexity"][kind] for row in found)
                axes.plot([seconds], [perplexity], color=color, marker="o", linestyle="", label=setting)
        describe(axes, pattern, "CPU seconds", f"perplexity on {kind}")
    save(figure, path)


def draw_drift(rows: Rows, path: Path) -> None:
    """How far hidden states are from the dense model's, by depth, for each pattern: means of the seeds."""
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    kind = next(iter(rows[0]["drift"]))
    figure = Figure(figsize=(3.2 * len(patterns) + 2, 3.8), layout="constrained")
    for pattern, axes in zip(patterns, figure.subplots(1, len(patterns), squeeze=False)[0], strict=True):
        for setting, color in colors_of(rows).items():
            found = [row["drift"][kind] for row in rows_at(rows, setting, pattern)]
            if found:
                means = [statistics.mean(of_layer) for of_layer in zip(*found, strict=True)]
                axes.plot(range(1, len(means) + 1), means, color=color, linewidth=1.5, label=setting)
        describe(axes, pattern, "decoder layer", f"relative squared error of hidden states, {kind}")
    save(figure, path)


def describe(axes: Axes, title: str, x: str, y: str) -> None:
    """Set title and labels, and a logarithmic vertical axis with plain numbers."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y, fontsize=8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.6)))
    axes.tick_params(labelsize=8)
    axes.tick_params(which="minor", labelsize=7)
    axes.grid(alpha=0.3, which="both")


def save(figure: Figure, path: Path) -> None:
    """Save a figure with one legend for all its axes."""
    labelled: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(list(labelled.values()), list(labelled), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)
