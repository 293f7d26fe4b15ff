"""Norms over some of the dimensions of hidden states: what they give in a model that has no others."""

import math
from typing import Any

import torch
from torch import nn

from ..model.names import shape_of
from .units import CoupledUnits


def normalise_others(model: nn.Module, hidden: CoupledUnits, gone: torch.Tensor) -> list[Any]:
    """Have norms leave out the dimensions that are `gone` (bool) until the handles are removed.

    Their weights are zero, and so are the hidden states there, but norms divide by a number of dimensions. Norms are
    the modules with hidden dimensions all of whose tensors are vectors.
    """
    if not bool(gone.any()):
        return []
    owners = dict.fromkeys(part.name.rpartition(".")[0] for part in hidden.all_parts)
    handles: list[Any] = []
    for owner in owners:
        module = model.get_submodule(owner)
        own = [shape_of(parameter) for parameter in module.parameters()]
        if all(shape == tuple(gone.shape) for shape in own):
            handles += _normalise_others(module, gone)
    return handles


def _normalise_others(norm: nn.Module, gone: torch.Tensor) -> list[Any]:
    """Scale what a norm reads, so that its mean square (or variance) is that of the others, and what it gives back.

    With n of d dimensions left, c = sqrt(d / n): `norm(c x) = c f(x)`, where the RMS norm f divides by the root of the
    sum of squares over n. A LayerNorm reads m + c (x - m) with the mean m of the others, and m for those that are gone.
    """
    left = (~gone).sum().item()
    scale = math.sqrt(len(gone) / left)
    centres = isinstance(norm, nn.LayerNorm)

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        states = arguments[0]
        if not centres:
            return (states * scale, *arguments[1:])
        mask = gone.to(states.device)
        mean = states.masked_fill(mask, 0).sum(-1, keepdim=True) / left
        return (mean + ((states - mean) * scale).masked_fill(mask, 0), *arguments[1:])

    def after(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        bias = getattr(module, "bias", None)
        return output / scale if bias is None else (output - bias) / scale + bias

    return [norm.register_forward_pre_hook(before), norm.register_forward_hook(after)]
