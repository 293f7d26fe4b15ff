"""Resuming pruning in a training of another length than the one that was saved."""

import os
from collections.abc import Sequence
from dataclasses import replace

from ..config.pruning import PruningConfig
from ..errors import PruningStateError
from ..saved.pruning_state import PruningState
from .plan import Group, Window, make_windows


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
