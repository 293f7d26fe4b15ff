"""Routers that send no token to some experts."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ..model.anatomy import stacks
from ..model.names import shape_of
from .units import CoupledUnits


class _Avoiding(TorchFunctionMode):
    """While a router runs: the logits of the experts that are `gone` are -inf, and they are among no top k.

    Its logits are what a linear layer gives for every expert. Scores to which it adds corrections are masked again
    where the top k of all experts are taken; for that alone, `linear` is False.
    """

    def __init__(self, gone: torch.Tensor, linear: bool):
        super().__init__()
        self._gone = gone
        self._linear = linear

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.topk, torch.Tensor.topk) and args:
            args = (self._without(args[0]), *args[1:])
        result = func(*args, **(kwargs or {}))
        return self._without(result) if self._linear and func is functional.linear else result

    def _without(self, values: torch.Tensor) -> torch.Tensor:
        if values.shape[-1:] != self._gone.shape:
            return values
        return torch.where(self._gone.to(values.device), torch.full_like(values, -torch.inf), values)


def avoid(model: nn.Module, experts: CoupledUnits, gone: torch.Tensor) -> list[Any]:
    """Have the routers of these experts send no token to those that are `gone` (bool), until the handles are removed.

    A router is the module that has a row for each expert: what it computes is that of a router without the others. The
    module that it is part of may take the top k itself.
    """
    if not bool(gone.any()):
        return []
    owners: dict[str, list[int]] = {}
    for part in experts.all_parts:
        owners.setdefault(part.name.rpartition(".")[0], []).append(len(shape_of(model.get_parameter(part.name))))
    routers = [owner for owner, dims in owners.items() if max(dims) == 2]  # the tensors of experts have three
    handles = []
    for router in routers:
        handles += _avoid_in(model.get_submodule(router), gone, linear=True)
        block = router.rpartition(".")[0]
        if block.rpartition(".")[0] not in stacks(model):  # in a whole layer, others than routers may take a top k
            handles += _avoid_in(model.get_submodule(block), gone, linear=False)
    return handles


def _avoid_in(module: nn.Module, gone: torch.Tensor, linear: bool) -> list[Any]:
    modes: list[_Avoiding] = []

    def enter(entered: nn.Module, arguments: Any) -> None:
        modes.append(_Avoiding(gone, linear))
        modes[-1].__enter__()

    def leave(left: nn.Module, arguments: Any, output: Any) -> None:
        modes.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
