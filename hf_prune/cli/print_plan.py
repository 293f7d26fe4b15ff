"""The output of `hf-prune plan` and `hf-prune prune --dry-run`: what would be pruned, and the memory that it takes."""

import json
from typing import TYPE_CHECKING

from .tables import console, counted, make_table, print_names, shown_name, shown_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..config.calibration import CalibrationConfig
    from ..masking.plan import Plan, PlannedTensor
    from ..oneshot.planning import OneShotPlan
    from ..structure.chosen import Chosen


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
        f"{counted(tensors, 'tensor')} with {plan.weights:,} of the model's {plan.all_weights:,} weights; "
        f"{counted(len(plan.updates), 'mask update')} in {counted(plan.total_steps, 'step')}; final sparsity "
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
            f"{counted(len(plan.shared_values), 'tensor')} share values: {'; '.join(plan.shared_as)}."
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
        f"{counted(len(plan.tensors), 'tensor')} with {plan.weights:,} of the model's {plan.all_weights:,} weights; "
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
            *([(f"weights on {calibration.device} at once", memory.onloaded)] if calibration.device else []),
            ("masks", memory.masks),
            ("all but the weights", memory.peak),
            *([(f"of paused passes, {_PLACES[calibration.offload]}", memory.offloaded)] if calibration.offload else []),
        ):
            table.add_row(shown_name(name, 60), f"{size / 1e9:,.2f}")
        console.print(table)
        if 8 * memory.masks < plan.weights:
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
    return f"forward passes over {counted(calibration.samples, 'sample')}"


def _print_planned_tensors(tensors: "Sequence[PlannedTensor]", left_out: "Mapping[str, str]") -> None:
    table = make_table("Tensors to prune", "tensor", "shape", "now", "final")
    for tensor in tensors:
        final = "by ranking" if tensor.final_sparsity is None else f"{tensor.final_sparsity:.2%}"
        final = final if tensor.decided_at is None else f"decided at step {tensor.decided_at}"
        table.add_row(
            shown_name(tensor.name), shown_shape(tensor.shape), f"{tensor.masked / max(tensor.weights, 1):.2%}", final
        )
    print_names(table)
    console.print()
    if left_out:
        others = make_table("Not pruned by default", "tensor", "reason")
        for name, reason in left_out.items():
            others.add_row(shown_name(name), reason)
        print_names(others)
        console.print()


def _print_planned_units(plan: "Plan") -> None:
    from ..structure.units import words_for

    table = make_table("Units to remove", "", "now", "removed", "left")
    for one in [one for one in plan.units if one.removed] or plan.units:  # for a target, other layers may lose none
        name = f"{words_for(one.structure)} of {one.path}"
        table.add_row(shown_name(name), f"{one.of:,}", f"{one.removed:,}", f"{one.left:,}")
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
            of_layers.add_row(shown_name(path), *left)
        print_names(of_layers)
    console.print(f"\n{sentence_about(chosen)}")
    if not of_data:
        console.print("The changes are those on random inputs; a recipe is planned with its data.")
