"""The progress bars of one-shot pruning and of its measurements."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .tables import console

if TYPE_CHECKING:
    from ..oneshot.pruned import PrunedLayer


@contextlib.contextmanager
def tensors_done() -> Iterator[Callable[[int, int, str], None]]:
    """Show how many tensors are measured, the last one's name, and the time that is left."""
    with _progress() as progress:
        task = progress.add_task("Computing the loss of the dense model", total=None)

        def show(done: int, total: int, name: str) -> None:
            progress.update(task, completed=done, total=total, description=name)

        yield show


@contextlib.contextmanager
def layers_done() -> Iterator[Callable[[int, int, "PrunedLayer"], None]]:
    """Show how many of the layers are done, the last one's name and error, and the time that is left."""
    with _progress() as progress:
        task = progress.add_task("Computing the inputs of the first layer", total=None)

        def show(done: int, total: int, layer: "PrunedLayer") -> None:
            error = f", error {layer.error:.2%}" if layer.error is not None else ""
            progress.update(task, completed=done, total=total, description=f"{layer.name}{error}")

        yield show


def _progress() -> Progress:
    """A bar that is gone at the end, and that is shown on a terminal only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
