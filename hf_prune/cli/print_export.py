"""The output of `hf-prune export`: size, latency and outputs of the exported model."""

from pathlib import Path
from typing import TYPE_CHECKING

from .tables import console, make_table

if TYPE_CHECKING:
    from ..runtimes.export_report import ExportReport


def print_export(report: "ExportReport", folder: Path) -> None:
    """Print what was measured of an exported model, as in its card, and the folder."""
    from ..runtimes.export_card import cells_of, notes

    columns, *rows = cells_of(report)
    compared = columns.index("difference")
    times, outputs = [*range(3, compared)], [2, *range(compared, len(columns))]
    for title, shown in (("Latency", times), ("Size and outputs", outputs)):
        measured = make_table(title, "", *(columns[index] for index in shown))
        for row in rows:
            measured.add_row(f"{row[0]}, {row[1]}", *(row[index] for index in shown))
        console.print(measured)
        console.print()
    console.print(notes(report), soft_wrap=True)
    console.print(f"The model is in {folder}.", soft_wrap=True)
