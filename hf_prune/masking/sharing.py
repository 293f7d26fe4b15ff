"""`Sharing`: weights that share few values in training, by straight-through clustering with a residual for each weight.

From the last mask update on, the weights that are kept in a tensor have the values of a codebook. After every optimizer
step, which moves each weight by its own gradient:

    wanted   = weight + residual                      # what training would have made of it
    codebook = means of the wanted weights of each value, once each has the nearest value
    weight   = the value of its cluster, residual = wanted - weight

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
from ..quantise.codebooks import MOST_VALUES, cluster_means, distinct_values, nearest, share
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
        numbers: parameter name -> how many values the weights of this tensor share at most.
        parameters: parameter name -> parameter.
        masks: the masks of the parameters, which do not change once sharing has begun.
        engine: how the parameters are held and trained.

    Attributes:
        numbers: as above, of these parameters.
        codebooks: parameter name -> the values, ascending (float32, on the CPU); empty before sharing begins.

    Raises: PruningConfigError if weights cannot be set with this way of training.
    """

    def __init__(
        self, numbers: Mapping[str, int], parameters: Mapping[str, nn.Parameter], masks: Masks, engine: Engine
    ):
        self.numbers = {name: number for name, number in numbers.items() if name in parameters}
        self._parameters, self._masks, self._engine = parameters, masks, engine
        self.codebooks: dict[str, torch.Tensor] = {}
        self._residuals: dict[str, torch.Tensor] = {}  # of this process's shards
        if self.numbers and not engine.writes_weights:
            raise PruningConfigError(
                "shared_values",
                "cannot be used with DeepSpeed, which keeps weights of its own, nor with adapters; use DDP or FSDP2",
            )

    def check_optimizer(self, optimizer: Any) -> None:
        """Raise PruningConfigError for an optimizer that saves other weights than those it trains."""
        if self.numbers and averages_weights(optimizer):
            raise PruningConfigError(
                "shared_values",
                "expected an optimizer that saves the weights that it trains, got a schedule-free one, which saves "
                "averages, and averages share no values; use another, such as adamw_torch",
            )

    # ---- In training ----

    @torch.no_grad()
    def begin(self) -> None:
        """Cluster the weights that are kept, and give each its value. Values that they share already stay."""
        if self.codebooks or not self.numbers:
            return
        found = self._values_there()
        for name, number in self.numbers.items():
            codebook = found[name]
            if codebook is None or len(codebook) > number:
                codebook = kmeans(self._kept(name, self._weight(name)), number, self._masks.all_reduce)
            self._write(name, self._weight(name), codebook)
        values = sum(map(len, self.codebooks.values()))
        logger.info("The weights of %d tensors share %d values from now on.", len(self.codebooks), values)

    @torch.no_grad()
    def step(self) -> None:
        """After an optimizer step: cluster the weights anew, starting from the values that they had.

        Where no weight has one of the values any more, all values of the tensor are found from the start.
        """
        names = list(self.codebooks)
        number = _TENSORS_AT_ONCE if self._masks.sharded else 1
        for start in range(0, len(names), number):
            self._step(names[start : start + number])

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
            if len(codebook) and bool(codebook.isnan().all()):
                raise PruningStateError(
                    f"{name}: expected finite weights, got NaN or infinite ones after an optimizer step, which share "
                    "no values. Lower the learning rate, or start from an earlier checkpoint."
                )
        for (name, weight), codebook in zip(wanted.items(), means, strict=True):
            if bool(codebook.isnan().any()):
                codebook = kmeans(kept[name], self.numbers[name], self._masks.all_reduce)
            self._write(name, weight, codebook)

    def _write(self, name: str, wanted: torch.Tensor, codebook: torch.Tensor) -> None:
        """Give each weight the value that is nearest to what is wanted, and keep the difference."""
        parameter = self._parameters[name]
        codebook = codebook.to(parameter.dtype).float()  # as the weights can have them
        mask = self._masks.for_tensor(name, wanted).view_as(wanted)
        shared = share(wanted, mask, codebook)
        self._residuals[name] = (wanted - shared).masked_fill_(~mask, 0)
        self._engine.write_weight(parameter, shared, mask)
        self.codebooks[name] = codebook

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
        if not self.codebooks:
            return
        for name, values in self._values_there().items():
            number, codebook = self.numbers[name], self.codebooks[name]
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

    def _values_there(self) -> dict[str, torch.Tensor | None]:
        """The distinct values that the kept weights have, on all processes; None for more than can be asked for."""
        table = torch.full((len(self.numbers), MOST_VALUES + 1), math.nan)
        for row, name in zip(table, self.numbers, strict=True):
            values = distinct_values([self._kept(name, self._weight(name))])
            row[-1] = values is None
            row[: len(values) if values is not None else 0] = values if values is not None else 0.0
        tables = gather(table) if self._masks.sharded else [table]
        found: dict[str, torch.Tensor | None] = {}
        for index, name in enumerate(self.numbers):
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
        for name, codebook in codebooks.items():
            if len(codebook) > self.numbers.get(name, 0):
                raise PruningStateError(
                    f"{path}: expected at most {self.numbers.get(name, 0)} shared values of {name!r}, got "
                    f"{len(codebook)}"
                )
        if codebooks and (missing := self.numbers.keys() - codebooks.keys()):
            raise PruningStateError(f"{path}: expected shared values of {min(missing)!r}, found none")

    def take(self, codebooks: Mapping[str, torch.Tensor], residuals: Mapping[str, torch.Tensor]) -> None:
        """Replace the codebooks and residuals; a tensor without a residual goes on from its shared values."""
        self.codebooks = dict(codebooks)
        self._residuals = {
            name: residuals[name].to(self._parameters[name].device)
            if name in residuals
            else torch.zeros_like(self._weight(name))
            for name in codebooks
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
