"""What the commands print tables with."""

import os
import re

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Characters of a line that no name of a tensor reaches.
_NO_LIMIT = 100_000

console = Console(highlight=False, markup=False, emoji=False)


def print_line(text: str) -> None:
    """Print a text as a heading, or as plain lines if it is too long for one."""
    if len(text) < console.width - 5:
        console.rule(text, align="left")
    else:
        console.print(text)


def make_table(title: str, *columns: str) -> Table:
    """A table whose first column is text that may be folded, and whose others are figures."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="right" if index else "left", no_wrap=bool(index))
    return table


def shown_name(name: str, width: int = 46) -> str:
    """A tensor's name: whole if it fits, or if no terminal shows it; else on several lines, broken before a dot.

    `width` is what there is for a name in 80 columns.
    """
    if _is_piped():
        return name
    lines = [""]
    for part in re.findall(r"\.?[^.]+", name):
        if len(lines[-1]) + len(part) > max(width, width + console.width - 80):
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


def _is_piped() -> bool:
    """Whether what is printed is read by a program or file, for which no width is asked."""
    return not console.is_terminal and "COLUMNS" not in os.environ


def print_names(table: Table) -> None:
    """Print a table with names of tensors; into a pipe or file, each row is one line, however long."""
    if _is_piped():
        table.width = Measurement.get(console, console.options.update(max_width=_NO_LIMIT), table).maximum
    console.print(table, soft_wrap=_is_piped())


def shown_shape(shape: tuple[int, ...]) -> str:
    """A tensor's shape, as 384x1536."""
    return "x".join(map(str, shape)) or "-"


def counted(count: int, what: str) -> str:
    """A number of things: 1 tensor, 2 tensors."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
