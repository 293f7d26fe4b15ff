"""`hf-prune compare`: saved models side by side, and the best of them within limits."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .messages import errors_as_lines, quiet

if TYPE_CHECKING:
    from ..compare.pareto import Limits

Metric = Annotated[str | None, typer.Option(help="The metric to compare by (default: the models' main metric).")]
LatencyMs = Annotated[
    float | None, typer.Option(help="The best must take at most so many milliseconds for one sample.")
]
MaxMb = Annotated[float | None, typer.Option(help="The best must have at most so many megabytes of weight files.")]
MinSparsity = Annotated[
    float | None, typer.Option(help="At least this share of the best one's prunable weights must be zero or removed.")
]


def compare_command(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders with saved models, or those of recipes' runs or of sweeps."),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write the page into.")] = Path("comparison"),
    metric: Metric = None,
    latency_ms: LatencyMs = None,
    max_mb: MaxMb = None,
    min_sparsity: MinSparsity = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and write nothing.")] = False,
) -> None:
    """Compare saved models, and name the best.

    Writes a page (index.html), which opens without a network, a picture, JSON and Markdown: the metric of each model
    against its sparsity, bytes and latency, and which no other beats. Models must have been evaluated on the same data;
    a model without measurements of its weights is only counted.

    Where all models were evaluated on a validation split, as those of hf-prune sweep, that chooses the best.
    """
    with errors_as_lines():
        from ..compare.pareto import Limits

        limits = Limits(latency_ms, max_mb, min_sparsity)
        quiet()
        from ..compare.comparison import compare_models
        from ..compare.models import read_models
        from ..compare.page import check_output, write_comparison

        if not as_json:
            check_output(output)
        options = {"--output": told(str(output)), "--metric": metric, **limit_options(limits)}
        read = read_models(models)
        count = len([model for model in read if model.folder is not None])
        comparison = compare_models(
            read,
            metric=metric,
            limits=limits,
            title=f"Comparison of {count} model{'s' * (count != 1)}",
            command=command_of(["compare", *(told(str(model)) for model in models)], options),
        )
        files = [] if as_json else write_comparison(comparison, output)
    if as_json:
        print(json.dumps(comparison.to_dict()))
        return
    from .print_compare import print_comparison

    print_comparison(comparison, files)


def limit_options(limits: "Limits") -> dict[str, float | None]:
    """Limits as options of a command."""
    return {
        "--latency-ms": limits.latency_ms,
        "--max-mb": limits.max_mb,
        "--min-sparsity": limits.min_sparsity,
    }


def told(name: str) -> str:
    """A path for a command that is run in the working directory: an absolute one as it is called from there.

    So that no folders of this machine are named, only the last part of one that lies elsewhere is told, after
    `path/to/`. What is no absolute path is told as it was typed.
    """
    from ..publish.explanation import ELSEWHERE

    if not Path(name).is_absolute():
        return name
    place = Path(os.path.normpath(name))
    return str(place.relative_to(Path.cwd())) if place.is_relative_to(Path.cwd()) else f"{ELSEWHERE}{place.name}"


def command_of(words: Sequence[str], options: Mapping[str, object]) -> str:
    """A command of hf-prune as it is typed, without the options that are None."""
    given = [str(word) for name, value in options.items() if value is not None for word in (name, value)]
    return shlex.join(["hf-prune", *words, *given])
