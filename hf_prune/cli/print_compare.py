"""The output of `hf-prune compare` and `hf-prune sweep`: the table of models, the best, and the points of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.measure import Measurement

from .tables import console, make_table

if TYPE_CHECKING:
    from rich.table import Table

    from ..compare.comparison import Comparison
    from ..sweep.plan import SweepPlan


def print_comparison(comparison: "Comparison", files: Sequence[Path]) -> None:
    """Print the models with what was measured of them, the best, and the files of the page."""
    from ..compare.page import columns_of, rows_of

    console.rule(comparison.title, align="left")
    columns, rows = columns_of(comparison), rows_of(comparison)
    table = make_table("", "", *columns)
    for row in rows:
        table.add_row(f"{row.name}{' *' if row.is_best else ''}", *row.cells)
    if _width(table) <= console.width:
        console.print(table)
    else:  # narrow terminals: a table of two columns for each model
        for row in rows:
            one = make_table(f"{row.name}{' *' if row.is_best else ''}", "", "")
            for column, cell in zip(columns, row.cells, strict=True):
                one.add_row(column, cell)
            console.print(one)
    for sentence in comparison.verdict:
        console.print(f"\n{sentence}")
    push = comparison.push_command()
    if push is not None:
        console.print("\nTo push it:")
        console.print(f"  {push}", soft_wrap=True)
    console.print("\nFiles written:")
    for path in files:
        console.print(f"  {path}", soft_wrap=True)


def _width(table: "Table") -> int:
    """The columns of the terminal that a table takes with nothing cut off."""
    return Measurement.get(console, console.options.update(max_width=1000), table).maximum


def print_points(plan: "SweepPlan") -> None:
    """Print the points of a sweep, which of them are finished, and how often a dense model is trained."""
    from ..sweep.dense_runs import dense_key

    if plan.trials is not None:
        console.print(f"{plan.trials} trials, drawn from:")
        for one in plan.swept:
            console.print(f"  {one}", soft_wrap=True)
    else:
        table = make_table("", "point", "state")
        for point in plan.points:
            table.add_row(point.name, "finished" if plan.is_finished(point) else "to run")
        console.print(table)
        dense = {dense_key(point.recipe) for point in plan.points if point.recipe.dense is not None}
        console.print(f"\nDense runs for these points: {len(dense)}.")
    console.print(f"Folder: {plan.output}. Nothing was run.", soft_wrap=True)
