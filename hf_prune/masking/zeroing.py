"""`Zeroing`: masked weights, and the optimizer's moments of them, are zero after every step and before saving."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from ..engines.engine import Engine
from ..engines.optimizers import leaves_zeros
from .masks import Masks
from .watch import Watch, warn_of_changes


class Zeroing:
    """Keeps masked weights at zero. If tensors are sharded, every process must make the same calls.

    Args:
        parameters: parameter name -> parameter.
        masks: the masks of the parameters.
        engine: how the parameters are held and trained.
        watch: the sample of masked weights in which changes are noticed.

    Attributes:
        moments_known: whether the optimizer's moments can be reached now.
        gradients_masked: the names of parameters whose gradients were masked since the last optimizer step.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], masks: Masks, engine: Engine, watch: Watch):
        self._parameters, self._masks, self._engine, self._watch = parameters, masks, engine, watch
        self._told_of_changes = False
        self.moments_known = engine.reaches_moments
        self.gradients_masked: set[str] = set()

    def mask_weights(self, names: Iterable[str]) -> None:
        """Set masked weights of these tensors to exactly +0.0."""
        for name in names:
            parameter = self._parameters[name]
            self._engine.mask_weight(parameter, self._masks.for_tensor(name, self._engine.part(parameter)))

    def mask_moments(self, optimizer: torch.optim.Optimizer | None, names: Iterable[str]) -> None:
        """Zero the optimizer's moments of masked weights of these tensors, once they can be reached."""
        for name in names if self.moments_known else ():
            parameter = self._parameters[name]
            self._engine.mask_moments(optimizer, parameter, self._masks.for_tensor(name, self._engine.part(parameter)))

    def hold(self) -> int:
        """Set masked weights to zero that are not, with a warning; returns how many, on all processes together."""
        found = self._masks.not_zero(self._masks.parts)
        if found:
            self.mask_weights(self._parameters)
            warn_of_changes(found)
        return sum(found.values())

    def after_optimizer_step(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Set masked weights back to zero where the optimizer, or anything else, may have changed them.

        When it may have is told in `Pruner.after_optimizer_step`.
        """
        names = list(self._parameters)
        if optimizer is not None and leaves_zeros(optimizer) and self.moments_known:
            safe = self._engine.trained_by(optimizer, self._parameters.values())
            names = [
                name
                for name, parameter in self._parameters.items()
                if parameter.requires_grad and not (name in self.gradients_masked and parameter in safe)
            ]
            unsafe = set(names)
            names += self._came_back([name for name in self._parameters if name not in unsafe])
        if not getattr(optimizer, "step_was_skipped", False):  # by accelerate, for gradients that are not finite
            self.moments_known = True
        self.mask_weights(names)
        self.mask_moments(optimizer, names)
        self.gradients_masked.clear()

    def _came_back(self, names: Iterable[str]) -> list[str]:
        """Which of these tensors have masked weights that are not zero, in a sample."""
        if self._engine.steps_in_backward:  # DeepSpeed writes its own master weights into the parameters
            return []
        found = self._watch.changed(lambda name: self._engine.part(self._parameters[name]), names)
        if found and not self._told_of_changes:
            self._told_of_changes = True
            parts = {name: self._engine.part(self._parameters[name]) for name in found}
            warn_of_changes(
                {name: int(((part != 0) & ~self._masks.for_tensor(name, part)).sum()) for name, part in parts.items()}
            )
        return found
