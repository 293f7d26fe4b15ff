"""`Sharing`: weights that share few values in training, by straight-through clustering with a residual for each weight.

From the last mask update on, the weights that are kept in a tensor have the values of a codebook. After every optimizer
step, which moves each weight by its own gradient:

    wanted   = weight + residual                      # what training would have made of it
    codebook = means of the wanted weights of each value, once each has the nearest value
    weight   = the value of its cluster, residual = wanted - weight

Where groups of weights, such as rows, have values of their own, or values are whole numbers times a scale, the values
follow from the wanted weights of the group alone, and no codebook is kept.

Without the rounding to values this is training as usual, so the residual is a float copy in another form (straight-
through, Courbariaux et al., arXiv 1511.00363; the residual is that of error feedback, Seide et al., Interspeech 2014),
and it works with any optimizer that changes the weights in its step.
"""

import logging
import math
import os
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engines.engine import Engine
from ..engines.optimizers import averages_weights
from ..engines.processes import gather
from ..errors import PruningConfigError, PruningStateError
from ..model.layouts import group_indices
from ..quantise.codebooks import MOST_VALUES, cluster_means, distinct_values, nearest, not_zero, share
from ..quantise.forms import SharedValues
from ..quantise.groups import cluster_in_groups, whole_numbers
from ..quantise.kmeans import kmeans
from ..saved.masks import Remembered
from ..saved.pruning_state import STATE_NAME
from ..structure.shrink import Cut
from .masks import Masks

logger = logging.getLogger(__name__)

# Tensors that are clustered at once if tensors are sharded: they share the all-reduces.
_TENSORS_AT_ONCE = 64

# What residuals are saved under, followed by the parameter's name.
_RESIDUAL = "shared_values.residual/"


class Sharing:
    """The values that the weights of some tensors share.

    If tensors are sharded, every process must make the same calls.

    Args:
        forms: parameter name -> which values the weights of this tensor share.
        parameters: parameter name -> parameter.
        masks: the masks of the parameters, which do not change once sharing has begun.
        engine: how the parameters are held and trained.

    Attributes:
        forms: as above, of these parameters.
        codebooks: parameter name -> the values, ascending (float32, on the CPU), of tensors with one codebook; empty
            before sharing begins.

    Raises: PruningConfigError if weights cannot be set with this way of training, or if a group of weights that have
    values of their own lies on several processes.
    """

    def __init__(
        self, forms: Mapping[str, SharedValues], parameters: Mapping[str, nn.Parameter], masks: Masks, engine: Engine
    ):
        self.forms = {name: form for name, form in forms.items() if name in parameters}
        self._in_groups = [name for name, form in self.forms.items() if not form.is_one_codebook]
        self._parameters, self._masks, self._engine = parameters, masks, engine
        self.codebooks: dict[str, torch.Tensor] = {}
        self._residuals: dict[str, torch.Tensor] = {}  # of this process's shards
        self._now: tuple[int, int, int] | None = None  # completed steps, and between which values become fewer
        if self.forms and not engine.writes_weights:
            raise PruningConfigError(
                "shared_values",
                "cannot be used with adapters='sparse_merge', whose weights are sums; merge the adapters first",
            )
        if masks.sharded:
            self._check_groups()

    def check_optimizer(self, optimizer: Any) -> None:
        """Raise PruningConfigError for an optimizer that saves other weights than those it trains."""
        if self.forms and averages_weights(optimizer):
            raise PruningConfigError(
                "shared_values",
                "expected an optimizer that saves the weights that it trains, got a schedule-free one, which saves "
                "averages, and averages share no values; use another, such as adamw_torch",
            )

    # ---- In training ----

    def _number(self, name: str) -> int:
        """How many values the weights of a tensor may have now."""
        form = self.forms[name]
        return form.number_at(*self._now) if self._now is not None else form.first or form.number

    @torch.no_grad()
    def begin(self, step: int, window: tuple[int, int]) -> None:
        """After so many completed steps: cluster the weights that are kept, and give each its value.

        Between the steps of the window values become fewer, where there are more at first. Values that they share
        already stay. Nothing is done if sharing has begun.
        """
        if self._residuals or not self.forms:
            return
        self._now = (step, *window)
        found = self._values_there()
        for name, codebook in found.items():
            number = self._number(name)
            if codebook is None or len(codebook) > number:
                codebook = kmeans(self._kept(name, self._weight(name)), number, self._masks.all_reduce)
            self._write(name, self._weight(name), codebook)
        for name in self._in_groups:
            self._write_in_groups(name, self._weight(name), self._number(name))
        values = sum(map(len, self.codebooks.values()))
        logger.info(
            "The weights of %d tensors share values from now on: %d in %d codebooks.",
            len(self._residuals),
            values,
            len(self.codebooks),
        )

    @torch.no_grad()
    def step(self, step: int, window: tuple[int, int]) -> None:
        """After an optimizer step, the `step`-th: cluster the weights anew, starting from the values that they had.

        Where no weight has one of the values any more, and where there are to be fewer from now on, all values of the
        tensor are found from the start.
        """
        self._now = (step, *window)
        names = list(self.codebooks)
        number = _TENSORS_AT_ONCE if self._masks.sharded else 1
        for start in range(0, len(names), number):
            self._step(names[start : start + number])
        if self._residuals:
            self._step_in_groups()

    def _step(self, names: Sequence[str]) -> None:
        """Cluster the weights of some tensors anew."""
        weights = {name: self._weight(name) for name in names}
        wanted = {name: weight + self._residuals[name].view_as(weight) for name, weight in weights.items()}
        kept = {name: self._kept(name, weight) for name, weight in wanted.items()}
        means = cluster_means(
            list(kept.values()),
            [nearest(values, self.codebooks[name]) for name, values in kept.items()],
            [self.codebooks[name] for name in kept],
            [self._masks.holdings[name].region.all_weights for name in kept],
            self._masks.all_reduce,
        )
        for name, codebook in zip(wanted, means, strict=True):
            _check_finite(name, not len(codebook) or not bool(codebook.isnan().all()))
        for (name, weight), codebook in zip(wanted.items(), means, strict=True):
            number = self._number(name)
            if bool(codebook.isnan().any()) or len(codebook) > number:
                codebook = kmeans(kept[name], number, self._masks.all_reduce)
            self._write(name, weight, codebook)

    def _step_in_groups(self) -> None:
        """Find the values of groups of weights anew."""
        wanted = {name: self._weight(name) for name in self._in_groups}
        wanted = {name: weight + self._residuals[name].view_as(weight) for name, weight in wanted.items()}
        bad = self._masks.add_up(
            [int(not bool(self._kept(name, one).isfinite().all())) for name, one in wanted.items()]
        )
        for name, is_bad in zip(wanted, bad, strict=True):
            _check_finite(name, not is_bad)
        for name, weight in wanted.items():
            self._write_in_groups(name, weight, self._number(name))

    def _write(self, name: str, wanted: torch.Tensor, codebook: torch.Tensor) -> None:
        """Give each weight the value that is nearest to what is wanted, and keep the difference."""
        parameter = self._parameters[name]
        codebook = not_zero(codebook.to(parameter.dtype)).float()  # as the weights can have them
        mask = self._masks.for_tensor(name, wanted).view_as(wanted)
        shared = share(wanted, mask, codebook)
        self._residuals[name] = (wanted - shared).masked_fill_(~mask, 0)
        self._engine.write_weight(parameter, shared, mask)
        self.codebooks[name] = codebook

    def _write_in_groups(self, name: str, wanted: torch.Tensor, number: int) -> None:
        """Give each weight a value of its group, and keep the difference from what is wanted."""
        parameter = self._parameters[name]
        mask = self._masks.for_tensor(name, wanted).view_as(wanted)
        shared = torch.zeros_like(wanted)
        shared[mask] = self._shared_in_groups(name, wanted[mask], self._groups_of(name, mask), number)
        self._residuals[name] = (wanted - shared).masked_fill_(~mask, 0)
        self._engine.write_weight(parameter, shared, mask)

    def _shared_in_groups(self, name: str, kept: torch.Tensor, groups: torch.Tensor, number: int) -> torch.Tensor:
        """The values of groups for kept weights, as the parameter can have them (float32)."""
        form, dtype = self.forms[name], self._parameters[name].dtype
        if form.levels is not None:
            return whole_numbers(kept, groups, form.levels, dtype)
        return not_zero(cluster_in_groups(kept, groups, number).to(dtype)).float()

    def _groups_of(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        """The index of the group of each weight of this process's shard where the mask is True (flat, int64)."""
        form, target = self.forms[name], self._masks.targets[name]
        indices = self._masks.holdings[name].region.indices(mask.reshape(-1).nonzero().view(-1))
        return group_indices(indices, target, form.rows, form.columns)

    def _check_groups(self) -> None:
        """Raise PruningConfigError if the weights of a group are on several processes."""
        here, numbers = [], []
        for name in self._in_groups:
            groups = self._groups_of(name, torch.ones_like(self._masks.parts[name]))
            here.append(len(groups.unique()) if self._masks.counts(name) else 0)
            target, form = self._masks.targets[name], self.forms[name]
            last = group_indices(torch.tensor([target.weights - 1]), target, form.rows, form.columns)
            numbers.append(int(last) + 1)
        for name, present, number in zip(self._in_groups, self._masks.add_up(here), numbers, strict=True):
            if present > number:
                raise PruningConfigError(
                    "shared_values_granularity",
                    f"expected groups of weights that lie on one process each, got {name}, of which some "
                    f"{self.forms[name].words}s are cut; use one codebook for each tensor, or DDP or FSDP2",
                )

    def _weight(self, name: str) -> torch.Tensor:
        """This process's shard of a tensor (float32)."""
        return self._engine.weight(self._parameters[name]).float()

    def _kept(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The kept weights that this process counts, flat."""
        if not self._masks.counts(name):
            return weight.new_zeros(0)
        return weight[self._masks.for_tensor(name, weight).view_as(weight)]

    # ---- Before saving ----

    @torch.no_grad()
    def hold(self) -> None:
        """Before a model is saved: give weights their values again if something else has changed them.

        Weights that share as many values as they may, but others, are those of another checkpoint, such as the best
        one: they stay, and training would go on from them.
        """
        if not self._residuals:
            return
        for name, values in self._values_there().items():
            codebook = self.codebooks[name]
            number = len(codebook) if self.forms[name].first is not None else self.forms[name].number
            if values is None or len(values) > number:
                logger.warning(
                    "%s: its weights had more than %d values: something other than the optimizer has changed them. "
                    "Each has the nearest of its shared values again.",
                    name,
                    number,
                )
                self._write(name, self._weight(name), codebook)
            elif not bool(torch.isin(values, codebook).all()):
                self.codebooks[name] = values
                self._residuals[name].zero_()
        self._hold_in_groups()

    def _hold_in_groups(self) -> None:
        changed = []
        for name in self._in_groups:
            weight = self._weight(name)
            mask = self._masks.for_tensor(name, weight).view_as(weight)
            shared = self._shared_in_groups(name, weight[mask], self._groups_of(name, mask), self._number(name))
            changed.append(int(not torch.equal(shared, weight[mask])))
        for name, is_changed in zip(self._in_groups, self._masks.add_up(changed), strict=True):
            if is_changed:
                logger.warning(
                    "%s: its weights did not share the values of a %s: something other than the optimizer has changed "
                    "them. They do again.",
                    name,
                    self.forms[name].words,
                )
                self._write_in_groups(name, self._weight(name), self._number(name))

    def _values_there(self) -> dict[str, torch.Tensor | None]:
        """The distinct values of the kept weights of tensors with one codebook, on all processes; None for too many."""
        names = [name for name, form in self.forms.items() if form.is_one_codebook]
        table = torch.full((len(names), MOST_VALUES + 1), math.nan)
        for row, name in zip(table, names, strict=True):
            values = distinct_values([self._kept(name, self._weight(name))])
            row[-1] = values is None
            row[: len(values) if values is not None else 0] = values if values is not None else 0.0
        tables = gather(table) if self._masks.sharded else [table]
        found: dict[str, torch.Tensor | None] = {}
        for index, name in enumerate(names):
            rows = torch.stack([one[index] for one in tables])
            values = rows[:, :-1][~rows[:, :-1].isnan()].unique()
            found[name] = None if bool(rows[:, -1].any()) or len(values) > MOST_VALUES else values
        return found

    # ---- Saving, resuming, and a model that becomes smaller ----

    def saved_residuals(self, parameters: Container[str]) -> dict[str, Remembered]:
        """The residuals of these parameters, in the form in which they are saved."""
        return {
            f"{_RESIDUAL}{name}": Remembered(name, residual)
            for name, residual in self._residuals.items()
            if name in parameters
        }

    def check_saved(self, directory: str | os.PathLike, codebooks: Mapping[str, torch.Tensor]) -> None:
        """Raise PruningStateError, naming the file, if saved codebooks are not those of these tensors."""
        path = Path(directory, STATE_NAME)
        most = {name: form.first or form.number for name, form in self.forms.items() if form.is_one_codebook}
        for name, codebook in codebooks.items():
            if len(codebook) > most.get(name, 0):
                raise PruningStateError(
                    f"{path}: expected at most {most.get(name, 0)} shared values of {name!r}, got {len(codebook)}"
                )
        if codebooks and (missing := most.keys() - codebooks.keys()):
            raise PruningStateError(f"{path}: expected shared values of {min(missing)!r}, found none")

    def take(self, codebooks: Mapping[str, torch.Tensor], residuals: Mapping[str, torch.Tensor]) -> None:
        """Replace the codebooks and residuals; a tensor without a residual goes on from its shared values."""
        self.codebooks = dict(codebooks)
        self._residuals = {
            name: residuals[name].to(self._parameters[name].device)
            if name in residuals
            else torch.zeros_like(self._weight(name))
            for name in (self.forms if codebooks or residuals else ())
        }

    def cut(self, cut: Cut) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The codebooks and residuals of what is left of the model when units are cut out of it."""
        codebooks = {new: one for name, one in self.codebooks.items() if (new := cut.name_of(name)) is not None}
        return codebooks, cut.tensors(self._residuals)


def split_residuals(
    memory: Mapping[str, Remembered],
) -> tuple[dict[str, torch.Tensor], dict[str, Remembered]]:
    """What was saved with masks, as the residuals by parameter name, and the rest."""
    residuals = {one.parameter: one.values for key, one in memory.items() if key.startswith(_RESIDUAL)}
    return residuals, {key: one for key, one in memory.items() if not key.startswith(_RESIDUAL)}


def _check_finite(name: str, are_finite: bool) -> None:
    if not are_finite:
        raise PruningStateError(
            f"{name}: expected finite weights, got NaN or infinite ones after an optimizer step, which share no "
            "values. Lower the learning rate, or start from an earlier checkpoint."
        )
