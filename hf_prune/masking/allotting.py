"""How many units each tensor of a group loses in the end, where the scope decides that from what a step has shown."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..engines.processes import of_first_process
from ..methods.patterns import Pattern
from ..methods.scopes import Seen
from .collectors import Collected
from .groups import Group
from .local import LocalTensor
from .selection import AllReduce
from .units import divide, share_units


@dataclass(frozen=True)
class LocalParts:
    """The parts of a tensor that this process counts, with what was seen of each weight; see `Seen`.

    If tensors are sharded, every process must go through the parts of the same tensors in the same order: of units that
    are split between processes, one gets the weights of all.

    Attributes:
        held: this process's shard.
        pattern: what is dropped together.
        squares: the mean over tokens of the square of each input feature (float32).
        gradients: the sum over tokens of the square of the gradient at each output feature, times any constant
            (float32); None if it was not read.
    """

    held: LocalTensor
    pattern: Pattern
    squares: torch.Tensor
    gradients: torch.Tensor | None

    def __iter__(self) -> Iterator[Seen]:
        parts = self._weights() if self.pattern.name == "unstructured" else self._units()
        return (part for part in parts if self.held.counted)

    def _weights(self) -> Iterator[Seen]:
        for piece in self.held.pieces():
            weight, squares, gradients = (one.view(1, 1, -1) for one in self._numbers(piece))
            yield self._seen(weight, self.held.mask[piece].view(1, 1, -1), squares, gradients)

    def _units(self) -> Iterator[Seen]:
        division = divide(self.held.target, self.pattern, self.held.holding.region)
        numbers, mask = self._numbers(slice(None)), self.held.mask
        yield self._seen(*map(division.whole_units, (numbers[0], mask, *numbers[1:])))
        if self.held.holding.sharded:
            weight, squares, gradients = (share_units(division, self.held.holding, one, mask) for one in numbers)
            yield self._seen(weight.scores, weight.kept, squares.scores, gradients.scores)

    def _numbers(self, piece: slice) -> list[torch.Tensor]:
        """Weight, square of the input and of the gradient, of each weight of a slice (float32, flat)."""
        weight = self.held.weight[piece].float()
        outputs, inputs = self.held.features(piece)
        squares = self.squares.to(weight.device)[inputs]
        gradients = squares if self.gradients is None else self.gradients.to(weight.device)[outputs]
        return [weight, squares, gradients]

    def _seen(self, weight: torch.Tensor, kept: torch.Tensor, squares: torch.Tensor, gradients: torch.Tensor) -> Seen:
        return Seen(weight, kept, squares, None if self.gradients is None else gradients)


def allot(
    group: Group,
    held: Mapping[str, LocalTensor],
    dropped: Sequence[int],
    collected: Collected,
    blocks: Mapping[str, str],
    all_reduce: AllReduce,
) -> list[int]:
    """How many units of each member are dropped in the end; every process must call it, and all get the same.

    Args:
        group: the tensors, with a scope that sees matrices.
        held: the tensors as this process holds them, by name.
        dropped: how many units of each member are dropped already.
        collected: what was read in the step before.
        blocks: name of a tensor -> the layer of the model's stack that it is in.
        all_reduce: adds up the counts of all processes, if tensors are sharded.
    """
    largest = max((float(one.max()) for one in collected.outputs.values() if one.numel()), default=0.0)
    matrices: list[LocalParts | tuple[()]] = []
    for target in group.members:
        if target.name in collected.unreached:
            matrices.append(())
            continue
        squares = collected.inputs[target.name].double().square() / max(collected.tokens[target.name], 1)
        gradients = collected.outputs.get(target.name)
        if gradients is not None:  # the scale of the loss, such as that of fp16, does not matter
            gradients = (gradients / (largest or 1.0)).float()
        matrices.append(LocalParts(held[target.name], group.pattern, squares.float(), gradients))
    of_members = [blocks[target.name] for target in group.members]
    counts = group.final_counts(dropped, matrices, of_members, add_up=all_reduce)
    return of_first_process(torch.tensor(counts, dtype=torch.int64))[0].tolist()
