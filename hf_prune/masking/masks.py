"""`Masks`: the masks of the tensors to prune, for this process's shards, and their counts over all processes."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from ..engines.engine import Engine
from ..engines.processes import all_reduce
from ..engines.regions import Region
from ..errors import PlacementError, PruningStateError
from ..model.layouts import Target
from .agreement import compare_replicas
from .local import LocalTensor
from .selection import alone


class Masks:
    """The masks of the tensors to prune; initially they mask the zeros that the model has.

    If tensors are sharded, every process must make the same calls.

    Args:
        targets: the tensors, in the model's order.
        parameters: parameter name -> parameter.
        engine: how the parameters are held and trained.
        by_unit: names of tensors whose single zeros are not masked: whole units are removed from them.
        trained: names of tensors that, if they are all zeros, are taken to be trained from zero and are not masked; for
            a fused tensor of experts, each expert that is.

    Attributes:
        targets: parameter name -> the tensor, in the model's order.
        parameters, engine: as above.
        parts: parameter name -> bool tensor, True where a weight is kept: the mask of this process's shard.
        masked: parameter name -> number of masked weights, on all processes together.
        holdings: parameter name -> how this process holds it.
        fresh: those of the `trained` tensors that were all zeros, and "NAME (expert 3)" for experts that were.
        sharded: whether the parameters are sharded over processes.
        all_reduce: adds up the counts of all processes, if tensors are sharded.

    Raises: PlacementError if the shards of all processes do not cover each tensor exactly once.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        parameters: Mapping[str, nn.Parameter],
        engine: Engine,
        trained: Collection[str] = (),
        by_unit: Collection[str] = (),
    ):
        self.targets = {target.name: target for target in targets}
        self.parameters, self.engine = parameters, engine
        self.holdings = {name: engine.holding(name, parameter) for name, parameter in parameters.items()}
        self.sharded = any(holding.sharded for holding in self.holdings.values())
        self.all_reduce = all_reduce if self.sharded else alone
        self._check_holdings()
        self.parts: dict[str, torch.Tensor] = {}
        self.masked: dict[str, int] = {}
        self._masked_here: dict[str, int] = {}
        self.take(
            {
                name: torch.ones_like(self._weight(name), dtype=torch.bool)
                if name in by_unit
                else (self._weight(name) != 0).contiguous()
                for name in parameters
            }
        )
        self.fresh = self._unmask_fresh([name for name in parameters if name in trained])

    def take(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Replace the masks with these."""
        self.parts = {name: parts[name].to(parameter.device) for name, parameter in self.parameters.items()}
        self._masked_here = {name: _count_masked(mask) for name, mask in self.parts.items()}
        self.count(self.parts)

    def _unmask_fresh(self, trained: Sequence[str]) -> list[str]:
        """Unmask the tensors and experts of these that are all zeros; returns what is to be said of them."""
        matrices = {
            name: self.holdings[name].region.slices(self.targets[name].experts)
            for name in trained
            if self.masked[name] and self.masked[name] >= self.targets[name].weights // self.targets[name].experts
        }
        kept = [
            _count_kept(self.parts[name].view(-1)[one]) * self.counts(name)
            for name, of_one in matrices.items()
            for one in of_one
        ]
        sums = iter(self.add_up(kept))
        fresh = []
        for name, of_one in matrices.items():
            zero = [index for index in range(len(of_one)) if next(sums) == 0]
            for index in zero:
                self.parts[name].view(-1)[of_one[index]] = True
            self.note_change(name, None)
            fresh += [name] if len(zero) == len(of_one) else [f"{name} (expert {index})" for index in zero]
        self.count(matrices)
        return fresh

    def for_tensor(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A mask on the device of `like`, to which it is moved permanently."""
        if self.parts[name].device != like.device:
            self.parts[name] = self.parts[name].to(like.device)
        return self.parts[name]

    def note_change(self, name: str, positions: torch.Tensor | None) -> None:
        """Update the count of masked weights here, from the newly masked positions if they are known."""
        if positions is None:
            self._masked_here[name] = _count_masked(self.parts[name])
        else:
            self._masked_here[name] += len(positions)

    def count(self, names: Iterable[str]) -> None:
        """Sum the numbers of masked weights of these tensors over all processes."""
        names = list(names)
        here = [self._masked_here[name] if self.counts(name) else 0 for name in names]
        self.masked.update(zip(names, self.add_up(here), strict=True))

    def compare(self, names: Iterable[str]) -> None:
        """Raise PruningStateError if processes that hold the same weights have different masks of these tensors."""
        compare_replicas({name: self.parts[name] for name in names}, self.holdings)

    def not_zero(self, masks: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """How many weights are not zero where these masks are False, by tensor, on all processes together."""
        here = []
        for name, parameter in self.parameters.items():
            part = self.engine.part(parameter).reshape(-1)
            mask = masks[name].to(part.device).reshape(-1)
            here.append(int(((part != 0) & ~mask).sum()) if self.counts(name) and not part.is_meta else 0)
        counts = dict(zip(self.parameters, self.add_up(here), strict=True))
        return {name: count for name, count in counts.items() if count}

    def check_finite(self, names: Iterable[str], completed_steps: int) -> None:
        """Raise PruningStateError, naming the tensor, if a weight is NaN or infinite on any process."""
        names = list(dict.fromkeys(names))
        bad = self.add_up([int(not _is_finite(self.engine.part(self.parameters[name]))) for name in names])
        for name, is_bad in zip(names, bad, strict=True):
            if is_bad:
                raise PruningStateError(
                    f"{name}: expected finite weights, got NaN or infinite ones after {completed_steps} "
                    "optimizer steps; nothing was pruned. Lower the learning rate, or start from an earlier checkpoint."
                )

    def local(self, name: str) -> LocalTensor:
        """A tensor as this process holds it."""
        weight = self._weight(name).reshape(-1)
        return LocalTensor(
            target=self.targets[name],
            holding=self.holdings[name],
            weight=weight,
            mask=self.for_tensor(name, weight).reshape(-1),
            masked=self.masked[name],
            counted=self.counts(name),
        )

    def counts(self, name: str) -> bool:
        """Whether this process counts its shard of a tensor; without sharding every process counts for itself."""
        return self.holdings[name].counted or not self.sharded

    @property
    def regions(self) -> dict[str, Region]:
        """The shard of each tensor that this process holds."""
        return {name: holding.region for name, holding in self.holdings.items()}

    def _weight(self, name: str) -> torch.Tensor:
        return self.engine.weight(self.parameters[name])

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        """The sums of numbers over all processes, if tensors are sharded; else the numbers."""
        return self.all_reduce(torch.tensor(numbers, dtype=torch.int64)).tolist()

    def _check_holdings(self) -> None:
        held = [holding.region.weights * self.counts(name) for name, holding in self.holdings.items()]
        for target, weights in zip(self.targets.values(), self.add_up(held), strict=True):
            if weights != target.weights:
                raise PlacementError(
                    f"{target.name}: expected {target.weights} weights on all processes together, got {weights}; this "
                    "way of sharding is not supported"
                )


def _is_finite(weight: torch.Tensor) -> bool:
    return math.isfinite(weight.sum(dtype=torch.float32)) or bool(weight.isfinite().all())


def _count_masked(mask: torch.Tensor) -> int:
    """The number of masked weights; a mask without data (on the meta device) counts as dense."""
    return mask.numel() - _count_kept(mask)


def _count_kept(mask: torch.Tensor) -> int:
    return mask.numel() if mask.is_meta else int(mask.count_nonzero())
