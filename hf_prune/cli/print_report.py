"""The output of `hf-prune report`: zeros, what was removed, and what a forward pass costs."""

from typing import TYPE_CHECKING

from .tables import console, counted, make_table, print_names, shown_name, shown_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..publish.record import Cost
    from ..saved.removed import Removed
    from ..saved.report import Report
    from ..saved.zeros import TensorReport


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
        table.add_row(shown_name(f"{words_for(one.structure)} of {one.path}"), f"{one.of:,}", f"{one.left:,}")
    for stack in removed.layers:
        table.add_row(shown_name(f"layers of {stack.path}"), f"{stack.of:,}", f"{len(stack.kept):,}")
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
        table.add_row(shown_name(tensor.name), shown_shape(tensor.shape), *figures)
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
        f"\n{len(names)} of {counted(of, 'prunable tensor')} {'has' if len(names) == 1 else 'have'} the pattern 2:4"
        f"{which}.",
        soft_wrap=True,
    )
