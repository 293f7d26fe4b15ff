"""The output of `hf-prune explain`: a few tables; the rest is in the files that it writes."""

from pathlib import Path
from typing import TYPE_CHECKING

from .tables import console, make_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from ..publish.explanation import Compared, Estimate, Explanation

# How many slices are printed.
_MOST_SLICES = 8


def print_explanation(explanation: "Explanation", files: "Sequence[Path]") -> None:
    """Print the metrics, the flips and the worst slices, and the files that were written."""
    beside = f", beside {explanation.dense_model}" if explanation.dense_model is not None else ""
    of_language = explanation.task == "text-generation"
    counted = "tokens" if of_language else "samples"
    on = f"{explanation.samples:,} {'texts' if of_language else 'samples'}"
    console.print(f"{explanation.model}{beside}, on {on}", soft_wrap=True)
    has_dense = explanation.dense_model is not None
    console.print(_table("Metrics, with 95% intervals (loss in nats)", explanation.metrics, has_dense, counted))
    answers = explanation.answers
    told = {"Same answer": answers.agreement, "Right to wrong": answers.to_wrong, "Wrong to right": answers.to_right}
    if answers.agreement is not None:
        table = make_table(
            "Most likely next token of both" if of_language else "Answers of both", "", "share", "95% interval"
        )
        for name, share in told.items():
            if share is not None:
                table.add_row(name, f"{share.value:.2%}", _interval(share, "{:.2%}"))
        console.print(table)
    if explanation.slices:
        worst = [
            one.metric.model_copy(update={"name": f"{one.by}: {one.value}{' *' if one.is_worse else ''}"})
            for one in explanation.slices[:_MOST_SLICES]
        ]
        title = f"{explanation.metric.capitalize()} on the worst of {len(explanation.slices)} slices"
        console.print(_table(title, worst, has_dense, counted))
        if has_dense:
            console.print("* worse than dense, where all slices are tested together (Holm, 5%)")
    for note in explanation.notes:
        console.print(note, soft_wrap=True)
    for file in files:
        console.print(str(file), soft_wrap=True)


def _table(title: str, figures: "Sequence[Compared]", has_dense: bool, counted: str) -> "Table":
    table = make_table(
        title, "", counted, *(["dense"] if has_dense else []), "pruned", *(["difference"] if has_dense else [])
    )
    for one in figures:
        dense = [f"{one.dense.value:.4f}"] if one.dense is not None else []
        change = [f"{one.difference.value:+.4f} {_interval(one.difference, '{:+.4f}')}"] if one.difference else []
        table.add_row(one.name, f"{one.samples:,}", *dense, f"{one.pruned.value:.4f}", *change)
    return table


def _interval(figure: "Estimate", form: str) -> str:
    if figure.low is None or figure.high is None:
        return ""
    return f"({form.format(figure.low)} to {form.format(figure.high)})"
