"""The output of commands: tables of plans, reports, results and pushes."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..config.calibration import CalibrationConfig
    from ..masking.plan import Plan, PlannedTensor
    from ..oneshot.planning import OneShotPlan
    from ..publish.push import PushResult
    from ..publish.push_plan import PushPlan
    from ..publish.record import Cost
    from ..recipe.one_shot import OneShotResult, SensitivityResult
    from ..recipe.outcome import RunResult
    from ..runtimes.export_report import ExportReport
    from ..saved.removed import Removed
    from ..saved.report import Report
    from ..saved.zeros import TensorReport
    from ..structure.chosen import Chosen

# How many tensors are named of those that add most to the loss.
_MOST_SENSITIVE = 10

# Characters of a line that no name of a tensor reaches.
_NO_LIMIT = 100_000

console = Console(highlight=False, markup=False, emoji=False)


def print_push_plan(plan: "PushPlan") -> None:
    """Print what a push would upload, file by file."""
    state = {True: " (will be created)", False: "", None: " (not known whether it exists)"}
    console.print(f"{plan.repo_id}{state[plan.is_new]}", soft_wrap=True)
    table = make_table("", "file", "bytes", "")
    for name in plan.files:
        table.add_row(name, f"{plan.size_of(name):,}", "" if name in plan.changed else "unchanged")
    for name in plan.removed:
        table.add_row(name, "", "will be removed")
    console.print(table)
    if plan.left_out:
        console.print()
        left_out = make_table("Not uploaded", "", "")
        for name, reason in plan.left_out.items():
            left_out.add_row(name, reason)
        console.print(left_out)
        console.print("\nhf-prune push --include NAME uploads a file of these too.", soft_wrap=True)
    if plan.sparsity is not None:
        console.print(f"\n{plan.sparsity:.2%} of all weights are zero, counted in these files.")
    else:
        console.print("\nThe zeros in these files could not be counted; the card says why.")
    if plan.shown_texts:
        console.print(f"explain/ shows the texts of {plan.shown_texts} samples of the data.", soft_wrap=True)


def print_push(result: "PushResult") -> None:
    """Print the address of a commit or pull request."""
    console.print(result.commit.pr_url or result.commit.commit_url, soft_wrap=True)


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


def _name(name: str, width: int = 46) -> str:
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


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "-"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def print_plan(plan: "Plan") -> None:
    """Print the tensors of a plan with their shapes and sparsities, and its mask updates."""
    _print_planned_tensors(plan.tensors, plan.left_out)
    updates = make_table("Mask updates", "after optimizer step", "sparsity")
    shown = plan.updates if len(plan.updates) <= 12 else [*plan.updates[:6], None, *plan.updates[-5:]]
    for update in shown:
        if update is None:
            updates.add_row("...", "")
        else:
            updates.add_row(str(update.step), f"{update.sparsity:.2%}")
    console.print(updates)
    console.print()
    if plan.units:
        _print_planned_units(plan)
    of_model = plan.final_sparsity * plan.weights / max(plan.all_weights, 1)
    tensors = sum(tensor.counted for tensor in plan.tensors)
    console.print(
        f"{_number(tensors, 'tensor')} with {plan.weights:,} of the model's {plan.all_weights:,} weights; "
        f"{_number(len(plan.updates), 'mask update')} in {_number(plan.total_steps, 'step')}; final sparsity "
        f"{plan.final_sparsity:.2%} of these tensors, {of_model:.2%} of the model."
    )
    if plan.sparsity_left is not None:
        console.print(
            f"That is of removed units and masked weights together; of the weights that are left once the units are "
            f"cut out, {plan.sparsity_left:.2%} are masked."
        )
    if plan.shared_values:
        console.print(
            f"From step {plan.shared_from} on, the weights that are kept in "
            f"{_number(len(plan.shared_values), 'tensor')} share values: {'; '.join(plan.shared_as)}."
        )


def show_plan_at_once(plan: "OneShotPlan", as_json: bool) -> None:
    """Print what would be pruned at once, as tables or as JSON."""
    if as_json:
        print(json.dumps(plan.to_dict()))
    else:
        print_plan_at_once(plan)


def print_plan_at_once(plan: "OneShotPlan") -> None:
    """Print what is pruned at once: the tensors, with their sparsities now and then."""
    _print_planned_tensors(plan.tensors, plan.left_out)
    of_model = plan.final_sparsity * plan.weights / max(plan.all_weights, 1)
    most = "at most " if plan.target_quality is not None else ""
    console.print(
        f"{_number(len(plan.tensors), 'tensor')} with {plan.weights:,} of the model's {plan.all_weights:,} weights; "
        f"pruned at once to {most}{plan.final_sparsity:.2%} of these tensors, {of_model:.2%} of the model."
    )
    memory, calibration = plan.memory, plan.calibration
    if memory is not None and calibration is not None:
        console.print()
        table = make_table("Memory at the peak", "", "gigabytes")
        for name, size in (
            ("weights of the model", memory.model),
            (_passes_over(calibration), memory.passes),
            (f"second moments and solver, at {memory.at}", memory.solver),
            ("masks", memory.masks),
            ("all but the weights", memory.peak),
            *([(f"of paused passes, {_PLACES[calibration.offload]}", memory.offloaded)] if calibration.offload else []),
        ):
            table.add_row(_name(name, 60), f"{size / 1e9:,.2f}")
        console.print(table)
        if memory.masks < plan.weights:
            console.print(
                "Masks, and the weights of a model on the CPU in the type it is saved in, are mapped from files; they "
                "need not fit into memory.",
                soft_wrap=True,
            )
    if plan.memory_note is not None:
        console.print(f"\nThe memory is not known in advance: {plan.memory_note}", soft_wrap=True)


_PLACES = {"cpu": "in memory of the CPU", "disk": "on disk"}


def _passes_over(calibration: "CalibrationConfig") -> str:
    if calibration.offload is not None:
        return "the forward pass that runs"
    return f"forward passes over {_number(calibration.samples, 'sample')}"


def _print_planned_tensors(tensors: "Sequence[PlannedTensor]", left_out: "Mapping[str, str]") -> None:
    table = make_table("Tensors to prune", "tensor", "shape", "now", "final")
    for tensor in tensors:
        final = "by ranking" if tensor.final_sparsity is None else f"{tensor.final_sparsity:.2%}"
        final = final if tensor.decided_at is None else f"decided at step {tensor.decided_at}"
        table.add_row(_name(tensor.name), _shape(tensor.shape), f"{tensor.masked / max(tensor.weights, 1):.2%}", final)
    print_names(table)
    console.print()
    if left_out:
        others = make_table("Not pruned by default", "tensor", "reason")
        for name, reason in left_out.items():
            others.add_row(_name(name), reason)
        print_names(others)
        console.print()


def _print_planned_units(plan: "Plan") -> None:
    from ..structure.units import words_for

    table = make_table("Units to remove", "", "now", "removed", "left")
    for one in [one for one in plan.units if one.removed] or plan.units:  # for a target, other layers may lose none
        name = f"{words_for(one.structure)} of {one.path}"
        table.add_row(_name(name), f"{one.of:,}", f"{one.removed:,}", f"{one.left:,}")
    print_names(table)
    if plan.weights_left is not None:
        share = plan.weights_left / max(plan.all_weights, 1)
        console.print(
            f"\nThe model that is left has {plan.weights_left:,} of {plan.all_weights:,} parameters ({share:.2%})."
        )
    console.print()


def print_chosen(chosen: "Chosen", of_data: bool) -> None:
    """Print the structures that were considered for a target, and the one that was chosen; measured on data or not."""
    from ..masking.searching import rows_of, sentence_about, widths_of

    console.print()
    table = make_table("Structures that change the outputs least, untrained", *rows_of(chosen)[0])
    for row in rows_of(chosen)[1:]:
        table.add_row(*row)
    print_names(table)
    widths = widths_of(chosen)
    if widths:
        console.print()
        of_layers = make_table("Chosen for each layer", *widths[0])
        for path, *left in widths[1:]:
            of_layers.add_row(_name(path), *left)
        print_names(of_layers)
    console.print(f"\n{sentence_about(chosen)}")
    if not of_data:
        console.print("The changes are those on random inputs; a recipe is planned with its data.")


def print_report(report: "Report", costs: "Sequence[Cost]" = ()) -> None:
    """Print the zeros of a saved model, tensor by tensor, with totals; what was removed; what a forward pass costs."""
    if report.tensors:
        _print_zeros(report)
    else:
        console.print(f"{report.model}: {report.note}.", soft_wrap=True)
    if report.removed is not None:
        _print_removed(report.removed)
    if report.chosen is not None:
        console.print(f"\n{report.chosen.told()}")
    if costs:
        _print_costs(costs, report.removed is not None)


def _print_costs(costs: "Sequence[Cost]", is_smaller: bool) -> None:
    """Print the medians; models that are not smaller are not compared, as they differ by the noise of the clock."""
    console.print()
    table = make_table("A forward pass, as measured with these weights", "", "dense", "pruned", "")
    for cost in costs:
        batch = "1 sample" if cost.samples == 1 else f"{cost.samples} samples"
        for what, name, unit in (
            ("milliseconds", "seconds", 1e-3),
            ("million operations", "flops", 1e6),
            ("megabytes of memory", "memory_bytes", 1e6),
        ):
            values = [getattr(one, name, None) for one in (cost.dense, cost.model)]
            if values[1] is None:
                continue
            share = f"{values[1] / values[0]:.1%}" if values[0] and is_smaller else ""
            shown = [f"{value / unit:,.1f}" if value is not None else "" for value in values]
            table.add_row(f"{batch}, {what}", *shown, share)
    console.print(table)


def _print_removed(removed: "Removed") -> None:
    from ..structure.units import words_for

    console.print()
    table = make_table("Removed", "", "before", "after")
    for one in removed.units:
        table.add_row(_name(f"{words_for(one.structure)} of {one.path}"), f"{one.of:,}", f"{one.left:,}")
    for stack in removed.layers:
        table.add_row(_name(f"layers of {stack.path}"), f"{stack.of:,}", f"{len(stack.kept):,}")
    before, after = removed.parameters
    table.add_row("parameters", f"{before:,}", f"{after:,}")
    print_names(table)
    for stack in removed.layers:
        console.print(f"\nLayers of {stack.path} that are left: {', '.join(map(str, stack.kept))}.")


def _print_zeros(report: "Report") -> None:
    shown = [tensor for tensor in report.tensors if tensor.prunable or tensor.prunable is None or tensor.group]
    with_values = any(tensor.shares_values for tensor in shown)
    table = make_table(report.model, "tensor", "shape", "zeros", "sparsity", *(["values"] if with_values else []))
    for tensor in shown:
        values = [_values(tensor)] if with_values else []
        figures = [f"{tensor.zeros:,}", f"{tensor.sparsity:.2%}", *values]
        table.add_row(_name(tensor.name), _shape(tensor.shape), *figures)
    print_names(table)
    console.print()
    totals = make_table("Totals", "", "weights", "zeros", "sparsity")
    others = [tensor for tensor in report.tensors if tensor.prunable is False]
    rows = [("prunable", report.prunable), ("other tensors", others)] if report.note is None else []
    for name, tensors in [*rows, ("overall", report.tensors)]:
        weights = sum(tensor.weights for tensor in tensors)
        zeros = sum(tensor.zeros for tensor in tensors)
        totals.add_row(name, f"{weights:,}", f"{zeros:,}", f"{zeros / max(weights, 1):.2%}")
    console.print(totals)
    if with_values:
        groups = sorted({str(tensor.group) for tensor in shown if tensor.values_in_group is not None})
        where = f", at most, in each {' or '.join(groups)}" if groups else ""
        console.print(f"\nvalues: the number of distinct values other than zero{where}, where there are few.")
    if report.two_of_four:
        _print_two_of_four(report)
    if report.note:
        console.print(f"\nIt is unknown which tensors are prunable: {report.note}.")


def _values(tensor: "TensorReport") -> str:
    """The number of distinct values of a tensor, or of a group of its weights, where they are few."""
    number = tensor.distinct_values if tensor.values_in_group is None else tensor.values_in_group
    return str(number) if tensor.shares_values else ""


def _print_two_of_four(report: "Report") -> None:
    """Say which tensors have the pattern 2:4: all of them, or by name."""
    names, of = report.two_of_four, len(report.prunable)
    which = "" if len(names) == of else f": {', '.join(names)}"
    console.print(
        f"\n{len(names)} of {_number(of, 'prunable tensor')} {'has' if len(names) == 1 else 'have'} the pattern 2:4"
        f"{which}.",
        soft_wrap=True,
    )


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
        table.add_row(_name(name), f"{added[name]:.4f}", f"{result.shares[name]:.1%}")
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
