"""Where the weights that are trained lie, and how they are read and changed: in torch's parameters, or with DeepSpeed.

An engine is what `Pruner` needs of one way of training; `engine_of` says which one trains a model. DeepSpeed's ZeRO
keeps float32 master weights of its own and makes the parameters anew from them after each step, so those are what is
ranked and masked, through DeepSpeed's public functions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..model.adapters import MaskedDelta
from .holdings import Holding, holding_of, is_shared, local_part, reshard
from .optimizers import parameters_of, zero_masked, zero_moments

# Changes the gradient of a parameter in place, by its name; it was scaled by a number against the underflow of fp16.
Edit = Callable[[str, torch.Tensor, float], None]


class Engine:
    """Parameters as torch has them: whole, replicated (DDP) or sharded (FSDP2)."""

    # Whether the optimizer steps inside backward: then gradients can be masked by hooks alone.
    steps_in_backward = False

    # Whether moments can be zeroed from the beginning, not only after the first step.
    reaches_moments = True

    # Whether weights can be given other values than zero.
    writes_weights = True

    def prepare(self, model: nn.Module) -> None:
        """Make the parameters what they are between two steps; every process must call it."""
        reshard(model)

    def holding(self, name: str, parameter: nn.Parameter) -> Holding:
        """How this process holds a parameter. Raises PlacementError where that is not known."""
        return holding_of(name, parameter)

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether processes hold parts of a tensor."""
        return is_shared(tensor)

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """What this process holds of a tensor, as forward passes see it."""
        return local_part(tensor.detach())

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this process holds of a parameter, as it is trained."""
        return self.part(parameter)

    @torch.no_grad()
    def write_weight(self, parameter: nn.Parameter, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Give the weights that this process holds new values (flat), and zero where they are masked."""
        part = self.part(parameter)
        part.copy_(values.view_as(part))
        self.mask_weight(parameter, mask)

    def mask_weight(self, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Set masked weights to zero; with positions, those alone."""
        zero_masked(self.part(parameter), mask, positions)

    def mask_moments(
        self, optimizer: Any, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> None:
        """Zero what the optimizer remembers of masked weights; with positions, of those alone."""
        zero_moments(optimizer, parameter, mask, positions)

    def trained_by(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> set[torch.Tensor]:
        """Which of the parameters the optimizer changes."""
        return parameters_of(optimizer).intersection(parameters)

    def hook_gradients(self, parameters: Mapping[str, nn.Parameter], edit: Edit, optimizer: Any) -> Iterator[Any]:
        """Edit each gradient as soon as backward has accumulated it; yields what is to be removed in the end."""

        def hook_for(name: str) -> Callable[[torch.Tensor], None]:
            @torch.no_grad()
            def edit_gradient(parameter: torch.Tensor) -> None:
                if parameter.grad is not None:
                    edit(name, local_part(parameter.grad), 1.0)

            return edit_gradient

        for name, parameter in parameters.items():
            if parameter.requires_grad:
                yield parameter.register_post_accumulate_grad_hook(hook_for(name))


class Adapted(Engine):
    """Frozen parameters under adapters of PEFT that mask what they add: weights are ranked as they would be merged."""

    writes_weights = False  # what is ranked is not what lies in the parameter

    def __init__(self, model: nn.Module):
        layers = [module for module in model.modules() if isinstance(module, MaskedDelta)]
        self._layers = {layer.get_base_layer().weight: layer for layer in layers}

    @torch.no_grad()
    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """What this process holds of a parameter, with what the active adapters add to it."""
        layer = self._layers.get(parameter)
        return self.part(parameter) if layer is None else layer.effective_weight()
