"""The progress bar of one-shot pruning."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .tables import console

if TYPE_CHECKING:
    from ..oneshot.prune import PrunedLayer


@contextlib.contextmanager
def tensors_done() -> Iterator[Callable[[int, int, str], None]]:
    """Show how many tensors are measured, the last one's name, and the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left:"), TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("Computing the loss of the dense model", total=None)

        def show(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=name)

        yield show


@contextlib.contextmanager
def layers_done() -> Iterator[Callable[[int, int, "PrunedLayer"], None]]:
    """Show how many of the layers are done, the last one's name and error, and the time that is left, on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    columns = (*columns, TextColumn("left:"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Computing the inputs of the first layer", total=None)

        def show(done: int, total: int, layer: "PrunedLayer") -> None:
            error = f", error {layer.error:.2%}" if layer.error is not None else ""
            progress.update(task, completed=done, total=total, description=f"{layer.name}{error}")

        yield show
