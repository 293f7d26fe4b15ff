"""The output of `hf-prune run`, `prune` and `sensitivity`: metrics, sizes, and the files that were written."""

from typing import TYPE_CHECKING

from .print_push import print_push
from .tables import console, make_table, print_names, shown_name

if TYPE_CHECKING:
    from ..recipe.one_shot import OneShotResult, SensitivityResult
    from ..recipe.outcome import RunResult

# How many tensors are named of those that add most to the loss.
_MOST_SENSITIVE = 10


def print_result(result: "RunResult") -> None:
    """Print the metrics of a run, dense and pruned, and the files that it wrote."""
    console.rule("Results on the test split", align="left")
    of_all = result.base is not None or result.at_once is not None
    if of_all:
        _print_all_models(result)
    compared = ["recovery"] if result.dense and not of_all else [""] if result.dense else []
    table = make_table("", "", *(["dense"] if result.dense else []), "pruned", *compared)
    for name, value in result.pruned.items() if not of_all else ():
        table.add_row(
            name, *([f"{result.dense[name]:.4f}"] if result.dense else []), f"{value:.4f}", *_kept(result, name)
        )
    empty = [""] if result.dense else []
    for name, share in (("prunable", result.report.prunable_sparsity), ("all", result.report.sparsity)):
        table.add_row(f"zeros in {name} tensors", *empty, f"{share:.2%}" if share is not None else "-", *empty)
    for name, sizes, unit in (
        *((("tokens of the vocabulary", result.vocabulary, 1),) if result.vocabulary else ()),
        ("parameters", result.parameters, 1),
        ("megabytes", result.file_bytes, 1e6),
    ):
        left = [f"{sizes['pruned'] / sizes['dense']:.1%}" if "dense" in sizes else ""] if result.dense else []
        models = ["dense", "pruned"] if result.dense else ["pruned"]
        shown = [f"{sizes[model] / unit:,.{0 if unit == 1 else 1}f}" if model in sizes else "" for model in models]
        table.add_row(name, *shown, *left)
    for cost in result.costs:
        dense_ms, speed = empty, empty
        if cost.dense is not None and cost.speedup is not None:
            dense_ms, speed = [f"{1000 * cost.dense.seconds:.1f}"], [f"{cost.speedup:.2f}x the speed"]
        of = "a sample" if cost.samples == 1 else f"{cost.samples} samples"
        table.add_row(f"milliseconds, {of}", *dense_ms, f"{1000 * cost.model.seconds:.1f}", *speed)
    table.add_row(
        "seconds of training",
        *([f"{result.seconds.get('dense', 0):.0f}"] if result.dense else []),
        f"{result.seconds['pruned']:.0f}",
        *empty,
    )
    if "pruning" in result.seconds:
        table.add_row("seconds of pruning at once", *empty, f"{result.seconds['pruning']:.0f}", *empty)
    console.print(table)
    console.print(f"\n{result.test_samples:,} test samples. Files written:")
    for path in result.files:
        files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files)
        many = f"{len(files)} files, " if path.is_dir() else ""
        console.print(f"  {path}{'/' if path.is_dir() else ''} ({many}{size:,} bytes)", soft_wrap=True)
    if result.pushed is not None:
        print_push(result.pushed)


def _print_all_models(result: "RunResult") -> None:
    """Print the metrics of each model of a run that prunes at once, in the order in which they came to be."""
    models = {
        "without training": result.base,
        "dense": result.dense,
        "pruned at once": result.at_once,
        "pruned": result.pruned,
    }
    shown = {name: metrics for name, metrics in models.items() if metrics is not None}
    table = make_table("", "", *shown, *(["recovery"] if result.dense else []))
    for name in result.pruned:
        table.add_row(name, *(f"{metrics[name]:.4f}" for metrics in shown.values()), *_kept(result, name))
    console.print(table)
    console.print()


def _kept(result: "RunResult", name: str) -> list[str]:
    """The cell with the recovery of a metric, where there is a dense model to compare with."""
    from ..publish.record import recovery

    if result.dense is None:
        return []
    kept = recovery(name, result.dense[name], result.pruned[name])
    return [f"{kept:.1%}" if kept is not None else "-"]


def print_pruned(result: "OneShotResult") -> None:
    """Print what one-shot pruning did: sparsity, perplexity, what was pruned otherwise, and the folder."""
    console.rule("Results", align="left")
    with_dense = bool(result.dense_metrics)
    table = make_table("", "", *(["dense"] if with_dense else []), "pruned")
    for name, value in result.metrics.items():
        table.add_row(f"{name} on other texts", f"{result.dense_metrics[name]:.3f}", f"{value:.3f}")
    for name, share in (("prunable", result.report.prunable_sparsity), ("all", result.report.sparsity)):
        empty = [""] if with_dense else []
        table.add_row(f"zeros in {name} tensors", *empty, f"{share:.2%}" if share is not None else "-")
    console.print(table)
    for note in result.pruned.notes:
        console.print(note, soft_wrap=True)
    console.print(f"\n{result.pruned.tokens:,} tokens of calibration. The model is in {result.folder}.", soft_wrap=True)


def print_sensitivity(result: "SensitivityResult") -> None:
    """Print which tensors add most to the loss, the allocation, and the files."""
    found = result.found
    highest = max(rate for curve in found.curves.values() for rate in curve.losses)
    added = {name: curve.losses[highest] - found.dense for name, curve in found.curves.items()}
    console.rule("Tensors that add most to the loss", align="left")
    table = make_table("", "tensor", f"added at {highest:.0%}", "allocated")
    for name in sorted(added, key=lambda name: -added[name])[:_MOST_SENSITIVE]:
        table.add_row(shown_name(name), f"{added[name]:.4f}", f"{result.shares[name]:.1%}")
    print_names(table)
    console.print(
        f"\nLoss of the dense model: {found.dense:.4f}. Predicted with {result.sparsity:.0%} of all weights masked as "
        f"allocated: {result.predicted:.4f}, the sum of what single tensors add.",
        soft_wrap=True,
    )
    console.print(f"Curves and allocation are in {result.folder}. To prune with the allocation:", soft_wrap=True)
    console.print(
        f"  hf-prune prune … --sparsity {result.sparsity:g} --set overrides=@{result.folder / 'allocation.json'}",
        soft_wrap=True,
    )
