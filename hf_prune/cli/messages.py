"""What commands print of errors, and what they keep other libraries from printing."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import typer

from ..engines.launched import is_first_process
from ..errors import HfPruneError, PushError

_SECONDS_FOR_THE_FIRST_PROCESS = 30.0


@contextlib.contextmanager
def errors_as_lines() -> Iterator[None]:
    """Print an error as one line per problem on standard error, and exit: with code 1 for a failed push, else with 2.

    This includes files that cannot be read or written. Anything else is a bug and ends in a traceback.
    """
    try:
        yield
    except (HfPruneError, OSError) as error:
        name = "hf-prune"
        if not is_first_process():
            # Usually the first process fails with the same error, and the launcher ends this one while it waits here.
            time.sleep(_SECONDS_FOR_THE_FIRST_PROCESS)
            name = f"hf-prune, process {os.environ['RANK']}"
        for line in str(error).splitlines():
            print(f"{name}: {line}", file=sys.stderr)
        raise typer.Exit(1 if isinstance(error, PushError) else 2) from error


def quiet(progress: bool = False, data: bool = False) -> None:
    """Show only errors of transformers, as its notices would hide ours; with `data`, no messages of datasets."""
    import transformers

    transformers.logging.set_verbosity_error()
    if not progress:
        transformers.logging.disable_progress_bar()
    if data:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, by us
        if not progress:
            datasets.disable_progress_bars()
