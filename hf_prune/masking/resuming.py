"""Resuming: whether a saved state fits its masks, and how it goes on in a training of another length."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.pruning import PruningConfig
from ..errors import PruningStateError
from ..saved.pruning_state import STATE_NAME, PruningState
from .finding import identities
from .groups import Group, Window, make_windows


def check_state(
    directory: str | os.PathLike, state: PruningState, noted: float | None, sparsity: float, groups: Sequence[Group]
) -> None:
    """Raise PruningStateError, naming the file, if a saved state contradicts the masks beside it or the groups.

    Args:
        noted: the share of masked weights that was saved with the state, if it was.
        sparsity: the share of masked weights in the masks.
        groups: all groups of tensors.
    """
    path = Path(directory, STATE_NAME)
    if noted is not None and abs(sparsity - noted) > 1e-9:
        raise PruningStateError(f"{path}: expected a sparsity of {sparsity}, that of the masks beside it, got {noted}")
    known = {*state.starts, *state.allotted, *state.owed, *(state.finished or ())}
    unknown = sorted(index for index in known if index >= len(groups))
    if unknown:
        raise PruningStateError(f"{path}: expected groups of tensors below {len(groups)}, got {unknown[0]}")
    for index, counts in state.allotted.items():
        units = groups[index].ranked_units
        if len(counts) != len(units) or any(count > of for count, of in zip(counts, units, strict=True)):
            raise PruningStateError(
                f"{path}: expected {len(units)} numbers of units up to those of the tensors in the group {index}, got "
                f"{counts}"
            )


def check_zeros(directory: str | os.PathLike, found: Mapping[str, int]) -> None:
    """Raise PruningStateError if weights that the masks of a checkpoint set to zero are not zero in the model.

    `found` has the numbers of these weights by tensor.
    """
    if found:
        name, count = next(iter(found.items()))
        raise PruningStateError(
            f"{directory}: its masks set {sum(found.values()):,} weights to zero that are not zero in the model "
            f"({count:,} of them in {name}): training was resumed from another checkpoint. Set `resume_directory` of "
            "PruningCallback to the folder that is passed as resume_from_checkpoint"
        )


def continue_schedule(
    state: PruningState,
    configs: Sequence[PruningConfig],
    groups: Sequence[Group],
    windows: Sequence[Window],
    total_steps: int,
    directory: str | os.PathLike,
) -> PruningState:
    """A state that was saved in `directory`, for a training of `total_steps` optimizer steps with these windows.

    If the windows differ from those of the saved training, every group that they would have begun to prune by now is
    owed an update, made after the next step. Raises PruningStateError if a group is not finished and no step is left.
    """
    before = make_windows(configs, groups, state.total_steps) if state.total_steps else windows
    finished = state.finished
    if finished is None:
        ends = [before[group.config_index].end for group in groups]
        finished = {index for index, end in enumerate(ends) if end <= state.completed_steps} - state.owed
    unfinished = {index: group for index, group in enumerate(groups) if index not in finished}
    owed = set(state.owed)
    if before != windows:
        if unfinished and state.completed_steps >= total_steps:
            raise PruningStateError(
                f"{directory}: saved after {state.completed_steps} of {state.total_steps} optimizer steps, before "
                f"pruning had ended; this training has {total_steps} steps, so none is left to prune in. Train for "
                f"more than {state.completed_steps} steps"
            )
        begun = (
            index for index, group in unfinished.items() if windows[group.config_index].begin <= state.completed_steps
        )
        owed.update(begun)
    return replace(state, total_steps=total_steps, owed=owed, finished=finished)


def state_of_what_is_left(
    state: PruningState,
    before: Sequence[tuple[Any, ...]],
    shapes: Mapping[str | None, tuple[int, ...]],
    groups: Sequence[Group],
) -> PruningState:
    """A state after units were cut out of the model, for the groups that are left.

    Args:
        state: the state until now.
        before: what the groups were then, as `identities` has it, by the names that tensors have now.
        shapes: the name that a tensor has now -> the shape that it had.
        groups: the groups that are left.
    """
    places = {identity: index for index, identity in enumerate(identities(groups))}
    moved = {index: places[identity] for index, identity in enumerate(before) if identity in places}
    starts = {moved[index]: share for index, share in state.starts.items() if index in moved}
    allotted = {moved[index]: counts for index, counts in state.allotted.items() if index in moved}
    for index, group in enumerate(groups):
        if any(shapes.get(target.name) != target.shape for target in group.members):
            starts.pop(index, None)  # the share of what is left is counted anew
        if index not in starts or len(allotted.get(index, ())) != len(group.members):
            allotted.pop(index, None)
    return replace(
        state,
        starts=starts,
        allotted=allotted,
        owed={moved[index] for index in state.owed if index in moved},
        finished={moved[index] for index in state.finished or () if index in moved},
    )
