"""What criteria read beside the weights: inputs of layers and gradients, of the optimizer step before a mask update.

They are collected over the micro-batches of that one step and added up over processes, so that they depend on the
global batch and not on how it was split; and as the next update collects anew, there is nothing to be saved.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .distributed import total
from .mask_files import PruningStateError
from .targets import TargetError, named_modules_of


class Statistics:
    """Collects from `begin` to `finish` what criteria need to know of some parameters.

    Args:
        model: the model that is trained.
        inputs: names of parameters of which the squares of their layers' inputs are added up, by input feature.
        gradients: names of parameters whose gradients are kept.

    Raises: TargetError, naming the parameter, where it is not the weight of a linear layer, whose inputs could be seen.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[str], gradients: Iterable[str]):
        self._model = model
        self._modules = named_modules_of(model, set(inputs))
        for name, module in self._modules.items():
            if not isinstance(module, (nn.Linear, Conv1D)):
                raise TargetError(
                    f"{name}: expected the weight of a linear layer for a method that reads inputs, got one of "
                    f"{type(module).__name__}; exclude it or choose another method"
                )
        self.gradient_names = set(gradients)
        self._squares: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._in_forward = False
        self._attention: torch.Tensor | None = None

    @property
    def is_collecting(self) -> bool:
        """Whether a step is being collected."""
        return bool(self._hooks)

    def begin(self) -> None:
        """Collect from now on: the next optimizer step is the one before a mask update."""
        self.stop()
        self._squares, self._gradients = {}, {}
        self._hooks = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._leave, always_call=True),
            *(module.register_forward_pre_hook(self._see(name)) for name, module in self._modules.items()),
        ]

    def stop(self) -> None:
        """Collect no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def keep_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Keep the gradient of the whole batch, or of this process's part of it, if it is wanted."""
        if self.is_collecting and name in self.gradient_names:
            self._gradients[name] = gradient.detach().float().reshape(-1).clone()

    def finish(self) -> dict[str, torch.Tensor]:
        """What was collected, and stop: norms of inputs by feature over all processes, or gradients, by parameter name.

        Every process must call it. Raises PruningStateError, naming the parameter, where nothing was seen of it.
        """
        self.stop()
        for name in (*self._modules, *sorted(self.gradient_names)):
            if name not in self._squares and name not in self._gradients:
                raise PruningStateError(
                    f"{name}: expected its {'gradient' if name in self.gradient_names else 'inputs'} in the optimizer "
                    "step before a mask update, saw none; it is frozen, not used, or in a compiled model"
                )
        norms = {name: total(self._squares[name]).sqrt().float() for name in self._modules}
        return norms | self._gradients

    def _enter(self, model: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
        self._in_forward = model.training
        mask = options.get("attention_mask")
        self._attention = mask if torch.is_tensor(mask) and mask.dim() == 2 else None

    def _leave(self, *arguments: Any) -> None:
        self._in_forward = False  # what checkpointing computes again in backward is not counted again

    def _see(self, name: str) -> Callable[[nn.Module, Any], None]:
        @torch.no_grad()
        def add_squares(module: nn.Module, arguments: Any) -> None:
            if not self._in_forward:
                return
            seen = arguments[0].detach().double()
            if self._attention is not None and seen.shape[:2] == self._attention.shape:
                seen = seen * self._attention[:, :, None].bool()  # padding is not data
            squares = seen.square().reshape(-1, seen.shape[-1]).sum(0)
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

        return add_squares
