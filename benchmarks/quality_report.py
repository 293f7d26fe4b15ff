"""Tables and figures of the rows that `quality.py` has measured."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

Rows = Sequence[dict[str, Any]]

# Whose accuracy on the training part is measured and drawn, with their colors.
VARIANTS_DRAWN = {"dense": "#555555", "defaults": "#b5432b", "without distillation": "#2b6cb5"}


def of(rows: Rows, **wanted: Any) -> list[dict[str, Any]]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def values(rows: Rows, column: str = "test", **wanted: Any) -> list[float]:
    """A column of the rows with these values, by seed."""
    return [row[column] for row in sorted(of(rows, **wanted), key=lambda row: row["seed"])]


def spread(found: Sequence[float]) -> str:
    """Mean, and highest less lowest."""
    return f"{statistics.mean(found):.4f} ± {(max(found) - min(found)) / 2:.4f}" if found else ""


def distinct(rows: Rows, column: str) -> list[str]:
    """What a column holds, in the order of the rows; dense rows left out."""
    return list(dict.fromkeys(row[column] for row in rows if row["variant"] != "dense"))


def write_report(rows: Rows, folder: Path) -> str:
    """Write `report.md` and the figures into a folder; the text of the former."""
    parts = {part: of(rows, part=part) for part in dict.fromkeys(row["part"] for row in rows)}
    sections = [table(part, found) for part, found in parts.items() if part != "ablation"]
    if "ablation" in parts and "sentences" in parts:
        sections.append(ablation_table(parts["ablation"], parts["sentences"]))
    if "sentences" in parts:
        draw_sparsities(parts["sentences"], folder / "accuracy.png")
        draw_generalisation(parts["sentences"], folder / "generalisation.png")
    if "language" in parts:
        draw_perplexity(parts["language"], folder / "perplexity.png")
    text = "\n\n".join(sections) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def table(part: str, rows: Rows) -> str:
    """A line for each sparsity, a column for each variant."""
    variants = distinct(rows, "variant")
    dense = values(rows, variant="dense")
    lines = [f"{part}: {rows[0]['metric']}, dense {spread(dense)}", ""]
    shared = "dense over defaults" if rows[0]["metric"] == "perplexity" else "defaults over dense"
    lines.append("| | " + " | ".join(variants) + f" | {shared} |")
    lines.append("|---" * (len(variants) + 2) + "|")
    for setting in distinct(rows, "setting"):
        cells = [spread(values(rows, setting=setting, variant=variant)) for variant in variants]
        ours = values(rows, setting=setting, variant="defaults")
        share = statistics.mean(ours) / statistics.mean(dense) if ours and dense else 0.0
        if rows[0]["metric"] == "perplexity" and share:
            share = 1 / share
        lines.append(f"| {setting} | " + " | ".join(cells) + (f" | {share:.1%} |" if share else " | |"))
    return "\n".join(lines)


def ablation_table(rows: Rows, sentences: Rows) -> str:
    """What each change of a default comes to, and its difference from the defaults on the same seeds."""
    defaults = values(sentences, setting=rows[0]["setting"], variant="defaults")
    without = values(sentences, setting=rows[0]["setting"], variant="without distillation")
    lines = [f"ablation at {rows[0]['setting']}: {rows[0]['metric']}", "", "| | | points |", "|---|---|---|"]
    found = {"defaults": defaults, "without distillation": without}
    found |= {variant: values(rows, variant=variant) for variant in distinct(rows, "variant")}
    for name, accuracies in found.items():
        if not accuracies or not defaults:
            continue
        points = 100 * (statistics.mean(accuracies) - statistics.mean(defaults))
        lines.append(f"| {name} | {spread(accuracies)} | {points:+.1f} |")
    return "\n".join(lines)


def sparsities(rows: Rows) -> list[str]:
    """The settings that are a share of single weights, ascending."""
    return sorted(setting for setting in distinct(rows, "setting") if setting.rstrip("%").isdigit())


def draw_sparsities(rows: Rows, path: Path) -> None:
    """Test accuracy of each variant over sparsity: means, with the lowest and highest seed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    settings = sparsities(rows)
    for variant in distinct(rows, "variant"):
        points = [(float(one.rstrip("%")) / 100, values(rows, setting=one, variant=variant)) for one in settings]
        points = [(share, found) for share, found in points if found]
        if points:
            means = [statistics.mean(found) for _, found in points]
            below = [mean - min(found) for mean, (_, found) in zip(means, points, strict=True)]
            above = [max(found) - mean for mean, (_, found) in zip(means, points, strict=True)]
            axes.errorbar([share for share, _ in points], means, [below, above], marker="o", capsize=3, label=variant)
    dense = values(rows, variant="dense")
    if dense:
        axes.axhline(statistics.mean(dense), color="black", linestyle=":", label="dense")
    axes.set(xlabel="sparsity", ylabel="accuracy on the test part", title="MiniLM on Rotten Tomatoes")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_generalisation(rows: Rows, path: Path) -> None:
    """Accuracy on the training and the test part over sparsity, dense at zero: the gap between the two."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    settings = sparsities(rows)
    for variant, color in list(VARIANTS_DRAWN.items())[1:]:
        for column, style in (("train", "s--"), ("test", "o-")):
            points = [(0.0, values(rows, column, variant="dense"))]
            points += [
                (float(one.rstrip("%")) / 100, values(rows, column, setting=one, variant=variant)) for one in settings
            ]
            shown = [(share, statistics.mean(found)) for share, found in points if found]
            axes.plot(*zip(*shown, strict=True), style, color=color, label=f"{variant}: {column}")
    axes.set(xlabel="sparsity", ylabel="accuracy", title="Training and test part, dense (0%) and pruned")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def draw_perplexity(rows: Rows, path: Path) -> None:
    """Held-out perplexity over the seconds of training; pruned runs go on where their dense run ended."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        dense = of(rows, variant="dense", seed=row["seed"])
        before = dense[0]["seconds"] if row["variant"] != "dense" and dense else 0.0
        shown = [(before + seconds, perplexity) for seconds, perplexity in row["curve"]]
        first = row["seed"] == rows[0]["seed"]
        if shown:
            label = row["variant"] if first else None
            axes.plot(*zip(*shown, strict=True), "o-", color=VARIANTS_DRAWN[row["variant"]], alpha=0.8, label=label)
    axes.set(xlabel="seconds of training", ylabel="perplexity on the held-out part", yscale="log")
    axes.set_title("SmolLM2-135M on IMDb, half of the weights pruned")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which("{x:.0f}")  # and no powers of ten
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
