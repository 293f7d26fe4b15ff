"""`Filing`: what is written beside the weights of a checkpoint, and read from there."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from ..config.checks import as_path
from ..config.pruning import PruningConfig
from ..engines.processes import rank
from ..model.targets import FROZEN
from ..saved.pruning_state import PruningState, load_pruning, save_pruning
from ..structure.chosen import Chosen, write_chosen
from .groups import Group, Window
from .masks import Masks
from .readings import Readings
from .resuming import check_state, check_zeros, continue_schedule
from .sharing import Sharing, split_residuals
from .structures import Structures
from .watch import Watch

logger = logging.getLogger(__name__)


class Filing:
    """Masks, configurations, state and what methods remember, as they lie in a directory.

    If tensors are sharded, every process must make the same calls.

    Args:
        groups: all groups of tensors to prune.
        left_out: parameter name -> why it is not pruned.
        masks, readings, sharing, structures, watch: what is saved, and changed by loading.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        left_out: Mapping[str, str],
        masks: Masks,
        readings: Readings,
        sharing: Sharing,
        structures: Structures,
        watch: Watch,
    ):
        self._groups, self._left_out, self._masks, self._readings = groups, left_out, masks, readings
        self._sharing, self._structures, self._watch = sharing, structures, watch

    def save(
        self,
        directory: str | os.PathLike,
        configs: Sequence[PruningConfig],
        state: PruningState,
        chosen: Chosen | None,
        remembering: bool,
        goes_on: bool,
    ) -> None:
        """Write the files.

        `remembering` says whether what methods remember is needed after this step, `goes_on` whether training does.
        """
        changed = self._watch.changed(
            lambda name: self._masks.engine.part(self._masks.parameters[name]), self._masks.parameters
        )
        if changed and not self._masks.engine.steps_in_backward:
            logger.warning(
                "%s: masked weights of %s are not zero: something has changed them since the last step. Call "
                "hold_zeros() and save the model again, or it is less sparse than the masks that are saved here.",
                directory,
                changed[0],
            )
        weights = sum(target.weights for target in self._masks.targets.values())
        notes = {"sparsity": sum(self._masks.masked.values()) / max(weights, 1)}  # without what was cut out
        masks, regions = self._masks.parts, None
        if self._masks.sharded:
            masks = {name: mask for name, mask in masks.items() if self._masks.counts(name) and mask.numel()}
            regions = self._masks.regions
        memory = self._readings.memory.saved(masks) if remembering else {}
        if goes_on:
            memory |= self._sharing.saved_residuals(masks)
        if not self._masks.sharded or rank() == 0:
            self._structures.save(as_path(directory))
            write_chosen(as_path(directory), chosen)
        frozen = [name for name, reason in self._left_out.items() if reason == FROZEN]
        state = replace(state, codebooks=self._sharing.codebooks)
        save_pruning(directory, configs, state, masks, regions, notes, memory, frozen)

    def load(
        self,
        directory: str | os.PathLike,
        configs: Sequence[PruningConfig],
        windows: Sequence[Window],
        total_steps: int | None,
        zeros_loaded: bool,
        model: nn.Module,
    ) -> PruningState:
        """Take what was saved, and return the state, for a training of `total_steps` if it is known.

        The weights are left as they are. Raises PruningStateError, before anything is changed, for what `Pruner.load`
        and `Pruner.resume` name.
        """
        shapes = {target.name: target.shape for target in self._masks.targets.values()}
        masks, memory, state, sparsity = load_pruning(directory, configs, shapes, self._masks.regions)
        here = sum(mask.numel() - int(mask.sum()) for name, mask in masks.items() if self._masks.counts(name))
        share = self._masks.add_up([here])[0] / max(sum(target.weights for target in self._masks.targets.values()), 1)
        check_state(directory, state, sparsity, share, self._groups)
        self._sharing.check_saved(directory, state.codebooks)
        if total_steps is not None:
            state = continue_schedule(state, configs, self._groups, windows, total_steps, directory)
        if zeros_loaded:
            check_zeros(directory, self._masks.not_zero(masks))
        self._masks.take(masks)
        residuals, memory = split_residuals(memory)
        self._readings.memory.take(memory, self._masks.parameters)
        self._sharing.take(state.codebooks, residuals)
        self._structures.load(as_path(directory), self._groups)
        self._structures.pass_by(self._groups, self._masks, model)
        return state
