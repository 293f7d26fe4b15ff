"""`hf-prune sweep`: one recipe with many settings, and the page that compares the models."""

from pathlib import Path
from typing import Annotated

import typer

from ..recipe.shipped import find_recipe
from .compare import LatencyMs, MaxMb, Metric, MinSparsity, command_of, limit_options, told
from .messages import errors_as_lines, quiet
from .progress import layers_done
from .tables import console, print_line


def sweep_command(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name (see hf-prune recipes).")],
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=VALUE,VALUE...",
            help="What differs, such as pruning.sparsity=0.5,0.7; with --trials ranges, such as 0.5..0.9; and what is "
            "set for all points, KEY=VALUE.",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="The folder (default: the recipe's output_dir + _sweep).")] = None,
    trials: Annotated[int | None, typer.Option(help="Draw so many points with optuna, in place of all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    against: Annotated[
        str | None, typer.Option(help="What trials trade the metric for: sparsity, bytes or latency.")
    ] = None,
    metric: Metric = None,
    latency_ms: LatencyMs = None,
    max_mb: MaxMb = None,
    min_sparsity: MinSparsity = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the points, and stop.")] = False,
) -> None:
    """Run a recipe with many settings, and compare.

    Points that have results are not run again: the same command continues a sweep that was stopped. The dense model is
    trained once for all points whose settings leave it as it is. The best is chosen on the validation split.

    Ends with a page as that of hf-prune compare, in comparison/. Exits with code 1 if a point failed.
    """
    with errors_as_lines():
        path = find_recipe(recipe)
        from ..recipe.yaml12 import read_recipe

        read_recipe(path)  # refused at once, before torch and transformers are loaded
        quiet(progress=not dry_run, data=True)
        from ..compare.pareto import Limits
        from ..sweep.plan import plan_sweep
        from ..sweep.sweep import run_sweep
        from .print_compare import print_comparison, print_points

        limits = Limits(latency_ms, max_mb, min_sparsity)
        plan = plan_sweep(path, settings, output, trials, seed, against)
        if dry_run:
            print_points(plan)
            return
        options: dict[str, object] = {
            "--output": told(str(output)) if output is not None else None,
            "--trials": trials,
            "--seed": seed if trials is not None else None,
            "--against": against,
            "--metric": metric,
            **limit_options(limits),
        }
        command = command_of(["sweep", told(recipe), *map(told_setting, settings)], options)
        result = run_sweep(plan, limits, metric, command, say=print_line, show_layers=layers_done)
    if result.comparison is not None:
        print_comparison(result.comparison, result.files)
    else:
        console.print("\nNo point was finished: there is nothing to compare.")
    for name, error in result.failed.items():
        console.print(f"\n{name} failed: {error}", soft_wrap=True)
    if result.failed:
        console.print(
            f"\nThe whole error of a point is in {plan.output}/points/NAME/error.txt. The same command tries it again.",
            soft_wrap=True,
        )
        raise typer.Exit(1)


def told_setting(setting: str) -> str:
    """A setting for a command, whose value may be a path, such as that of a model."""
    key, equals, value = setting.partition("=")
    return f"{key}{equals}{told(value) if Path(value).exists() else value}"
