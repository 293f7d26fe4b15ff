"""Collecting what methods and scopes read besides the weights: layer inputs and gradients of one optimizer step.

They are summed over the micro-batches of the step and over processes, so that they depend on the global batch and not
on how it was split.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..engines.holdings import is_shared
from ..engines.processes import all_reduce
from ..errors import PruningStateError, TargetError
from ..model.anatomy import expert_modules
from ..model.layouts import inputs_of
from ..model.names import named_modules_of

# The number of tokens whose inputs are squared at once.
_ROWS = 4096

# For how many collected steps in a row a layer may be skipped: LayerDrop with 0.2 reaches that once in millions.
_PATIENCE = 10


@dataclass(frozen=True)
class Collected:
    """What was read in one optimizer step, by parameter name.

    `inputs` has the norm of each input feature over all processes, `gradients` the gradient of each weight that this
    process holds, flat; for the parameters in `unusable`, nothing or a value that is not finite was collected.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)


class Statistics:
    """Collects, from `begin` to `finish`, what methods and scopes read for the given parameters.

    Args:
        model: the model that is trained.
        inputs: names of parameters for which the squares of their layers' inputs are summed, by input feature.
        gradients: names of parameters whose gradients are kept.

    Raises: TargetError, naming the parameter, if it is not the weight of a linear layer, whose inputs can be collected.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[str], gradients: Iterable[str]):
        self._model = model
        self._modules = named_modules_of(model, set(inputs))
        self._widths: dict[str, int] = {}  # the number of input features
        for name, module in self._modules.items():
            width = inputs_of(module)
            if width is None:
                raise TargetError(
                    f"{name}: expected the weight of a linear layer for a method that reads inputs, got one of "
                    f"{type(module).__name__}; exclude it or choose another method"
                )
            self._widths[name] = width
        experts = expert_modules(model) if self._modules else set()
        self._experts = {name for name, module in self._modules.items() if id(module) in experts}
        self._around = _modules_around(model, self._modules)
        self._called_around: set[str] = set()
        self._idle: dict[str, int] = {}  # for how many collected steps in a row a layer was not called
        self.gradient_names = set(gradients)
        self._squares: dict[str, torch.Tensor] = {}
        self._gradients: dict[str, torch.Tensor] = {}
        self._hooks: list[Any] = []
        self._in_forward = False
        self._attention: torch.Tensor | None = None

    @property
    def is_collecting(self) -> bool:
        """Whether collection is under way."""
        return bool(self._hooks)

    def begin(self) -> None:
        """Start to collect, for the next optimizer step."""
        self.stop()
        self._squares, self._gradients, self._called_around = {}, {}, set()
        self._hooks = [
            self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
            self._model.register_forward_hook(self._leave, always_call=True),
            *(module.register_forward_pre_hook(self._see(name)) for name, module in self._modules.items()),
            *(module.register_forward_pre_hook(self._see_around(name)) for name, module in self._around.items()),
        ]

    def stop(self) -> None:
        """Stop collecting."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def keep_gradient(self, name: str, gradient: torch.Tensor) -> None:
        """Keep the gradient of the whole batch, or this process's shard of it, if it is being collected."""
        if self.is_collecting and name in self.gradient_names:
            self._gradients[name] = gradient.detach().float().reshape(-1).clone()

    def finish(self) -> Collected:
        """Stop, and return what was collected; every process must call it.

        Raises PruningStateError if nothing was collected for any parameter, or if a layer that is no expert was not
        called.
        """
        self.stop()
        gradient_names = sorted(self.gradient_names)
        names = [*self._modules, *gradient_names]
        seen = [int(name in self._squares) for name in self._modules]
        seen += [int(name in self._gradients) for name in gradient_names]
        bad = [0] * len(self._modules)
        bad += [int(name in self._gradients and not self._gradients[name].isfinite().all()) for name in gradient_names]
        around = [int(name in self._called_around) for name in names]
        counts = all_reduce(torch.tensor([seen, bad, around], dtype=torch.int64)).tolist()
        if names and not any(counts[0]):
            what = "gradient" if names[0] in self.gradient_names else "inputs"
            raise PruningStateError(
                f"{names[0]}: expected its {what} in the optimizer step before a mask update, saw none for any "
                "parameter; the parameters are frozen, the model is compiled, or there was no step: use a method that "
                "reads only the weights, such as 'magnitude'"
            )
        self._check_called(counts[0], counts[2])
        unusable = {
            name for name, is_seen, is_bad in zip(names, counts[0], counts[1], strict=True) if is_bad or not is_seen
        }
        norms = self._norms()
        unusable |= {name for name, norm in norms.items() if not norm.isfinite().all()}
        return Collected(norms, self._gradients, unusable)

    def _check_called(self, seen: Sequence[int], around: Sequence[int]) -> None:
        """Raise PruningStateError for a layer that is never called, from what was seen on all processes in a step.

        A layer that is not called although the module around it is, is none that this step skipped (LayerDrop, experts
        without tokens). One that is skipped again and again is none either, unless it is an expert.
        """
        for name, is_seen, is_around in zip(self._modules, seen, around, strict=False):
            self._idle[name] = 0 if is_seen else self._idle.get(name, 0) + 1
            is_idle = self._idle[name] > _PATIENCE and name not in self._experts
            if not is_seen and (is_around or is_idle):
                raise PruningStateError(
                    f"{name}: expected a call of its layer in the optimizer step before a mask update, saw none: its "
                    "module uses the weight without calling the layer, as nn.MultiheadAttention does, or not at all; "
                    "exclude it, or use a method that reads only the weights, such as 'magnitude'"
                )

    def _norms(self) -> dict[str, torch.Tensor]:
        """The norm of each input feature over all processes, with one all-reduce."""
        if not self._modules:
            return {}
        squares = [
            self._squares[name].cpu() if name in self._squares else torch.zeros(width, dtype=torch.float64)
            for name, width in self._widths.items()
        ]
        norms = all_reduce(torch.cat(squares)).sqrt().float().split(list(self._widths.values()))
        return dict(zip(self._modules, norms, strict=True))

    def _enter(self, model: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
        self._in_forward = model.training
        mask = options.get("attention_mask")
        is_decoders = getattr(
            getattr(model, "config", None), "is_encoder_decoder", False
        )  # its decoder has other tokens
        self._attention = mask if torch.is_tensor(mask) and mask.dim() == 2 and not is_decoders else None

    def _leave(self, *arguments: Any) -> None:
        self._in_forward = False  # activation checkpointing runs layers again in backward

    def _see_around(self, name: str) -> Callable[[nn.Module, Any], None]:
        def note(module: nn.Module, arguments: Any) -> None:
            if self._in_forward:
                self._called_around.add(name)

        return note

    def _see(self, name: str) -> Callable[[nn.Module, Any], None]:
        @torch.no_grad()
        def add_squares(module: nn.Module, arguments: Any) -> None:
            if not self._in_forward:
                return
            seen = arguments[0].detach()
            if is_shared(seen) or seen.shape[-1] != self._widths[name]:
                raise PruningStateError(
                    f"{name}: expected all of its {self._widths[name]} input features on each process, got a "
                    "shard of them (tensor parallelism); use a method that reads only the weights, such as 'magnitude'"
                )
            if self._attention is not None and seen.dim() == 3 and seen.shape[:2] == self._attention.shape:
                seen = seen[self._attention.bool()]  # without padding
            squares = torch.zeros(seen.shape[-1], dtype=torch.float64, device=seen.device)
            for rows in seen.reshape(-1, seen.shape[-1]).split(_ROWS):
                squares += rows.double().square().sum(0)
            self._squares[name] = self._squares[name] + squares if name in self._squares else squares

        return add_squares


def _modules_around(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The module that each of these layers is a child of, by the names of their parameters."""
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    return {name: parents[id(layer)] for name, layer in layers.items() if id(layer) in parents}
