"""`WeightPenalties`: adds the gradients of penalties to those of the weights to prune, shard by shard."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..engines.engine import Engine
from ..errors import PruningConfigError
from ..methods.penalties import PENALTIES
from ..model.layouts import Target
from ..saved.pruning_state import PruningState
from .groups import Group, Window
from .masks import Masks
from .units import divide, share_units


class WeightPenalties:
    """The penalties of a model's groups: they are added to the gradient of each tensor once in an optimizer step.

    If tensors are sharded, every process must make the same calls.

    Args:
        groups: all groups, including those without a penalty.
        parameters: parameter name -> parameter.
        masks: the masks, which know the shard of each process.
        engine: how the parameters are held and trained.

    Attributes:
        terms: name such as `l1_penalty` -> what was added to the loss in this step, for the weights counted here.

    Raises: PruningConfigError if there is a penalty on weights that are not trained.
    """

    def __init__(self, groups: Sequence[Group], parameters: Mapping[str, nn.Parameter], masks: Masks, engine: Engine):
        self._parameters, self._masks, self._engine = parameters, masks, engine
        self._members: dict[str, list[tuple[int, Group, Target]]] = {}
        for index, group in enumerate(groups):
            for target in group.members if group.config.penalty is not None else ():
                if not parameters[target.name].requires_grad:
                    raise PruningConfigError(
                        "penalty",
                        f"must not be set for weights that are not trained, got {group.config.penalty!r} for "
                        f"{target.name}; exclude it",
                    )
                self._members.setdefault(target.name, []).append((index, group, target))
        self._in_parts = self._find_units_in_parts()
        self.terms: dict[str, torch.Tensor] = {}
        self._added: set[str] = set()

    def __bool__(self) -> bool:
        """Whether there is a penalty on any weight."""
        return bool(self._members)

    def start_step(self) -> None:
        """Begin a new optimizer step."""
        self.terms = {}
        self._added.clear()

    @torch.no_grad()
    def add(
        self, name: str, gradient: torch.Tensor, windows: Sequence[Window], state: PruningState, loss_scale: float
    ) -> None:
        """Add the gradient of a tensor's penalties, times `loss_scale`, to its own, once in an optimizer step.

        `gradient` is of this process's shard; it is changed in place. Nothing is done without windows, before the
        start.
        """
        if name in self._added or not windows:
            return
        self._added.add(name)
        for index, group, target in self._members.get(name, ()):
            factor = group.penalty_weight(
                windows[group.config_index], state.completed_steps, state.starts.get(index, 0.0)
            )
            if factor:
                added, value = self._penalty(group, target)
                gradient.add_(added.mul_(factor * loss_scale).to(gradient.device, gradient.dtype).view_as(gradient))
                counted = value * factor if self._masks.counts(name) else torch.zeros_like(value)
                term = f"{group.config.penalty}_penalty"
                self.terms[term] = self.terms.get(term, 0.0) + counted.to(gradient.device)

    def _penalty(self, group: Group, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of the penalty (flat, float32) and its value, for this process's shard."""
        penalty, sides = PENALTIES[str(group.config.penalty)], group.pattern.sides
        weight = self._engine.part(self._parameters[target.name]).reshape(-1)
        if not penalty.of_units:
            return penalty.gradient(weight, sides), penalty.value(weight, sides)
        holding = self._masks.holdings[target.name]
        division = divide(target, group.pattern, holding.region)
        whole = division.whole_units(weight)
        gradient, value = torch.zeros_like(weight, dtype=torch.float32), penalty.value(whole, sides)
        division.write(gradient, penalty.gradient(whole, sides))
        if target.name in self._in_parts:
            mask = self._masks.for_tensor(target.name, weight).reshape(-1)
            shared = share_units(division, holding, weight.float(), mask)
            shared.give_back(penalty.gradient(shared.scores, sides), gradient)
            value = value + penalty.value(shared.scores, sides)
        return gradient, value

    def _find_units_in_parts(self) -> set[str]:
        """The names of tensors with a penalty on units of which some are split between processes."""
        if not self._masks.sharded:
            return set()
        members = [
            (target, len(divide(target, group.pattern, self._masks.holdings[target.name].region).shared_positions()))
            for entries in self._members.values()
            for _, group, target in entries
            if PENALTIES[str(group.config.penalty)].of_units
        ]
        found = self._masks.all_reduce(torch.tensor([weights for _, weights in members], dtype=torch.int64)).tolist()
        return {target.name for (target, _), weights in zip(members, found, strict=True) if weights}
