"""Layers that are skipped: what they get is what they return."""

from typing import Any

import torch
from torch import nn


def hidden_states(arguments: Any, options: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer got, the first argument or `hidden_states`, and what it returned, alone or first of a tuple."""
    hidden = arguments[0] if arguments else options["hidden_states"]
    return hidden, output if isinstance(output, torch.Tensor) else output[0]


def skip(layer: nn.Module) -> Any:
    """Make a layer return its input, the first argument or `hidden_states`, until the returned handle is removed.

    Of a tuple that the layer returns, the first entry is replaced. The layer raises ValueError if that has another
    shape than the input.
    """

    def replace(module: nn.Module, arguments: Any, options: Any, output: Any) -> Any:
        hidden, first = hidden_states(arguments, options, output)
        if hidden.shape != first.shape:
            raise ValueError(f"a layer that returns {tuple(first.shape)} for {tuple(hidden.shape)} cannot be skipped")
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    return layer.register_forward_hook(replace, with_kwargs=True)
