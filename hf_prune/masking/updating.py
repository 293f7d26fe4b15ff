"""`Updates`: which weights go at a due step: groups are ranked, and masks, weights and moments are changed."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import nn

from ..engines.engine import Engine
from ..methods.scopes import Pool
from ..model.anatomy import blocks_of
from ..saved.pruning_state import PruningState
from .allotting import allot
from .groups import Group, Window
from .local import LocalTensor
from .masks import Masks
from .ranking import Change, update_masks
from .readings import Readings
from .solving import biases_of
from .structures import Structures
from .unit_ranking import update_units

logger = logging.getLogger(__name__)

# Groups that are ranked at once if tensors are sharded: they share the all-reduces.
_GROUPS_AT_ONCE = 64


class Updates:
    """Updates the masks of a model's groups. If tensors are sharded, every process must make the same calls.

    Args:
        model: the model that is trained.
        groups: all groups.
        parameters: parameter name -> parameter.
        masks: the masks of the parameters, which are changed.
        engine: how the parameters are held and trained.
        readings: what methods have read.
        structures: the structures that are pruned, with the scores of their units.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Group],
        parameters: Mapping[str, nn.Parameter],
        masks: Masks,
        engine: Engine,
        readings: Readings,
        structures: Structures,
    ):
        self._model, self._groups, self._parameters, self._masks = model, groups, parameters, masks
        self._engine, self._readings, self._structures = engine, readings, structures
        self._biases = biases_of(model, groups)

    def names(self, due: Iterable[int]) -> list[str]:
        """The names of the tensors in groups."""
        return [target.name for index in due for target in self._groups[index].members]

    @torch.no_grad()
    def make(
        self,
        due: Sequence[int],
        state: PruningState,
        windows: Sequence[Window],
        optimizer: torch.optim.Optimizer | None,
        moments_known: bool,
    ) -> list[str]:
        """Update masks, weights and moments of groups that are due; returns the names of the tensors that were ranked.

        The state, after `completed_steps` of it, is changed: which groups are owed an update as their methods have not
        read what they need, which are finished, and with what share each began.
        """
        step = state.completed_steps
        due = self._take_readings(due, state)
        changed: list[str] = []
        for batch in self._batches(due):
            names = self._update_batch(batch, state, windows, optimizer, moments_known)
            self._masks.count(names)
            changed += names
        state.finished = (state.finished or set()).union(
            index for index in due if step >= windows[self._groups[index].config_index].end
        )
        if any(self._groups[index].config.structure in ("layers", "experts", "hidden") for index in due):
            self._structures.pass_by(self._groups, self._masks, self._model)
        return changed

    def _take_readings(self, due: Sequence[int], state: PruningState) -> list[int]:
        """The groups for which all that their methods read was collected; the update of the others is owed."""
        missing = {index: self._readings.missing(index) for index in due}
        for index in due:
            if self._structures.lacks_scores(self._groups[index]):
                missing[index].update(self._groups[index].read_names)
        owed = {index for index, names in missing.items() if names}
        state.owed = (state.owed - set(due)) | owed
        if owed:
            logger.warning(
                "%s: what the method reads is missing or not finite in this step; its mask is updated in a later one.",
                min(name for names in missing.values() for name in names),
            )
        return [index for index in due if index not in owed]

    def _batches(self, due: Sequence[int]) -> Iterator[list[int]]:
        """Groups that are ranked at once: one without sharding, several with; never two with a tensor in common."""
        batch: list[int] = []
        names: set[str] = set()
        for index in due:
            members = set(self.names([index]))
            if batch and (not self._masks.sharded or len(batch) == _GROUPS_AT_ONCE or names & members):
                yield batch
                batch, names = [], set()
            batch.append(index)
            names |= members
        if batch:
            yield batch

    def _update_batch(
        self,
        due: Sequence[int],
        state: PruningState,
        windows: Sequence[Window],
        optimizer: torch.optim.Optimizer | None,
        moments_known: bool,
    ) -> list[str]:
        index_of = {target.name: index for index in due for target in self._groups[index].members}
        local = {name: self._readings.local(index, name) for name, index in index_of.items()}

        def pools_of(index: int, gone: Sequence[int]) -> list[Pool]:
            group = self._groups[index]
            start = state.starts.setdefault(index, group.share_dropped(gone))
            inputs = None if group.coupled else [local[target.name].inputs for target in group.members]
            if group.allots and index not in state.allotted:
                collected, blocks = self._readings.collected, blocks_of(self._model, self.names([index]))
                state.allotted[index] = allot(group, local, gone, collected, blocks, self._masks.all_reduce)
            window = windows[group.config_index]
            return group.pools(window, state.completed_steps, start, gone, inputs, state.allotted.get(index))

        changed = []
        for change in self._changes(due, local, pools_of):
            name = change.target.name
            changed.append(name)
            parameter, mask = self._parameters[name], self._masks.parts[name]
            self._readings.keep_masked_values(index_of[name], local[name])  # before they are zero
            if change.values is None:
                self._engine.mask_weight(parameter, mask, change.positions)
            else:
                self._engine.write_weight(parameter, change.values, mask)
            if change.shift is not None:
                self._shift_bias(name, change.shift)
            if moments_known:
                self._engine.mask_moments(optimizer, parameter, mask, change.positions)
            self._masks.note_change(name, change.positions)
        return changed

    def _changes(
        self,
        due: Sequence[int],
        local: Mapping[str, LocalTensor],
        pools_of: Callable[[int, Sequence[int]], list[Pool]],
    ) -> Iterator[Change]:
        """Update the masks of groups: of weights, and of units."""
        of_weights = [index for index in due if not self._groups[index].coupled]
        groups = [self._groups[index] for index in of_weights]
        if groups:
            yield from update_masks(
                groups, local, lambda place, gone: pools_of(of_weights[place], gone), self._masks.all_reduce
            )
        for index in due:
            if self._groups[index].coupled:
                given = self._readings.similarity_scores(self._groups[index]) or self._structures.sums
                yield from update_units(
                    self._groups[index],
                    local,
                    partial(pools_of, index),
                    self._masks.all_reduce,
                    given,
                    biased=self._biases,
                )

    def _shift_bias(self, name: str, shift: torch.Tensor) -> None:
        """Add to the bias of the layer that has this weight; masked values stay zero."""
        bias_name, bias = self._biases[name]
        part = self._engine.part(bias)
        part.add_(shift.to(part))
        if bias_name in self._masks.parts:
            self._engine.mask_weight(bias, self._masks.parts[bias_name])
