"""`Engine`: how trained weights, gradients and moments are read and changed, in torch's parameters or in DeepSpeed.

An engine is what `Pruner` needs to know about the way of training; `engine_of` determines it. DeepSpeed's ZeRO keeps
its own float32 master weights and copies them to the parameters after each step, so these are ranked and masked,
through DeepSpeed's public functions.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..model.adapters import MaskedDelta
from .holdings import Holding, holding_of, is_shared, local_part, reshard
from .optimizers import parameters_of, zero_masked, zero_moments

# Changes the gradient of a parameter, given by name, in place; the number is the loss scale of fp16.
Edit = Callable[[str, torch.Tensor, float], None]


class Engine:
    """Parameters of torch: on one process, replicated (DDP) or sharded (FSDP2)."""

    # Whether the optimizer steps inside backward: then gradients can be masked by hooks alone.
    steps_in_backward = False

    # Whether moments can be zeroed before the first optimizer step.
    reaches_moments = True

    # Whether weights can be set to other values than zero, by `write_weight`.
    writes_weights = True

    def prepare(self, model: nn.Module) -> None:
        """Bring the parameters into the state that they have between two steps; every process must call it."""
        reshard(model)

    def holding(self, name: str, parameter: nn.Parameter) -> Holding:
        """How this process holds a parameter. Raises PlacementError if its placement is not supported."""
        return holding_of(name, parameter)

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is sharded over processes."""
        return is_shared(tensor)

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's shard of a tensor (all of it without sharding), as forward passes see it."""
        return local_part(tensor.detach())

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """This process's shard of a parameter, as it is trained."""
        return self.part(parameter)

    @torch.no_grad()
    def write_weight(self, parameter: nn.Parameter, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Set the weights that this process holds to new values (flat), and to zero where they are masked."""
        part = self.part(parameter)
        part.copy_(values.view_as(part))
        self.mask_weight(parameter, mask)

    def mask_weight(self, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Set masked weights to zero; with positions, only those."""
        zero_masked(self.part(parameter), mask, positions)

    def mask_moments(
        self, optimizer: Any, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> None:
        """Zero the optimizer's moments of masked weights; with positions, only those."""
        zero_moments(optimizer, parameter, mask, positions)

    def trained_by(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> set[torch.Tensor]:
        """The parameters that the optimizer updates."""
        return parameters_of(optimizer).intersection(parameters)

    def hook_gradients(self, parameters: Mapping[str, nn.Parameter], edit: Edit, optimizer: Any) -> Iterator[Any]:
        """Edit each gradient as soon as backward has accumulated it; yields handles with `remove()`."""

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
    """Frozen parameters under PEFT adapters with masked updates: weights are ranked as they would be after merging."""

    writes_weights = False  # what is ranked is not what lies in the parameter

    def __init__(self, model: nn.Module):
        layers = [module for module in model.modules() if isinstance(module, MaskedDelta)]
        self._layers = {layer.get_base_layer().weight: layer for layer in layers}

    @torch.no_grad()
    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """A parameter with the active adapters merged into it."""
        layer = self._layers.get(parameter)
        return self.part(parameter) if layer is None else layer.effective_weight()
