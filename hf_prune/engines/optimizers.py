"""The states that optimizers keep for each weight (moments), and how those of masked weights are zeroed.

`docs/optimizers.md` has a line for every `optim` of `TrainingArguments`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import GradientState

from .holdings import local_part

# With a zero gradient and zero moments these leave a zero weight at zero, so they need no second pass over the weights.
# Compared by class, not by name: classes of GaLore and bitsandbytes have the same names and work differently.
ELEMENTWISE_OPTIMIZERS = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.Adamax,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.Rprop,
        torch.optim.ASGD,
    }
)

_DEEPSPEED_ELEMENTWISE = frozenset({("deepspeed", "FusedAdam"), ("deepspeed", "DeepSpeedCPUAdam")})

# These change the weights in the backward pass of every micro-batch, before any gradient can be masked.
_UPDATE_IN_BACKWARD = frozenset({"Lomo", "AdaLomo"})

# Weights masked at a time: small enough for a CPU's cache.
_PIECE = 1 << 18


def leaves_zeros(optimizer: Any) -> bool:
    """Whether the optimizer keeps a weight at zero if its gradient and moments are zero.

    With `eps=0` none does: zero divided by zero is NaN.
    """
    optimizer = base_optimizer(optimizer)
    name = (type(optimizer).__module__.partition(".")[0], type(optimizer).__name__)
    is_elementwise = type(optimizer) in ELEMENTWISE_OPTIMIZERS or name in _DEEPSPEED_ELEMENTWISE
    return is_elementwise and all(group.get("eps", 1) for group in optimizer.param_groups)


def is_at_step(optimizer: Any) -> bool:
    """Whether the last call of `optimizer.step()` was a step: accelerate skips it while gradients are accumulated."""
    return not isinstance(optimizer, AcceleratedOptimizer) or bool(optimizer.gradient_state.sync_gradients)


def is_micro_batch() -> bool:
    """Whether gradients are being accumulated under `accelerator.accumulate`, and this is not the last micro-batch."""
    return not GradientState().sync_gradients


def parameters_of(optimizer: Any) -> set[torch.Tensor]:
    """The parameters that the optimizer updates."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def updates_in_backward(optimizer: Any) -> bool:
    """Whether the optimizer changes the weights in the backward pass of every micro-batch."""
    return type(base_optimizer(optimizer)).__name__ in _UPDATE_IN_BACKWARD


def averages_weights(optimizer: Any) -> bool:
    """Whether the optimizer saves, and evaluates, averages of the weights that it trains (schedule-free)."""
    while optimizer is not None:
        if type(optimizer).__name__.endswith("ScheduleFree"):
            return True
        optimizer = getattr(optimizer, "optimizer", None)
    return False


@torch.no_grad()
def zero_moments(
    optimizer: Any, parameter: torch.Tensor, mask: torch.Tensor, indices: torch.Tensor | None = None
) -> None:
    """Zero the optimizer's moments of the masked weights of a parameter, in every state that has its shape.

    This includes stacks of such states (AdEMAMix), 8-bit codes of a table (bitsandbytes) and quantised tensors
    (torchao), as exactly as their codes allow. With `indices` (flat) only those weights are considered: the others were
    zeroed before. For a sharded parameter, mask and indices are of this process's shard.
    """
    for state in _states(base_optimizer(optimizer), parameter):
        for name, value in state.items():
            if not torch.is_tensor(value) or name == "step":
                continue
            if value.shape[value.dim() - parameter.dim() :] != parameter.shape:
                continue
            value = local_part(value)
            if type(value) not in (torch.Tensor, torch.nn.Parameter):
                value.copy_(value.dequantize().masked_fill(~mask.to(value.device), 0))
            elif value.is_floating_point():
                copies = value.shape[: value.dim() - mask.dim()].numel()
                for part in value.reshape(copies, *mask.shape):
                    zero_masked(part, mask, indices)
            elif (table := state.get(name.replace("state", "qmap"))) is not None:
                value.masked_fill_(~mask.to(value.device), int(table.abs().argmin()))


def _states(optimizer: Any, parameter: torch.Tensor) -> Iterator[Mapping[str, Any]]:
    """The optimizer's states of a parameter, wherever optimizers keep them.

    States in a space of lower rank (GaLore, APOLLO) are left out: whatever their shape, they do not belong to single
    weights.
    """
    while optimizer is not None:
        layer_wise = getattr(optimizer, "optimizer_dict", {})  # GaLore and APOLLO: an optimizer for each parameter
        for owner in (optimizer, layer_wise.get(parameter)):
            groups = getattr(owner, "param_groups", [])
            group: dict[str, Any] = next(
                (group for group in groups if any(one is parameter for one in group["params"])), {}
            )
            if "rank" not in group:
                yield getattr(owner, "state", {}).get(parameter, {})
                yield group.get("state", {}).get(parameter, {})  # GrokAdamW
        optimizer = getattr(optimizer, "optimizer", None)  # Lookahead and its like


@torch.no_grad()
def zero_masked(tensor: torch.Tensor, mask: torch.Tensor, indices: torch.Tensor | None = None) -> None:
    """Set the entries of a floating-point tensor whose mask is False to +0.0, in place, even NaN.

    With `indices` (flat) only those entries are set. On a CPU this is done bitwise, a piece at a time: four times as
    fast as `masked_fill_`, which branches on every entry.
    """
    contiguous = tensor.is_contiguous() and mask.is_contiguous()
    if contiguous and indices is not None:
        tensor.view(-1).index_fill_(0, indices.to(tensor.device), 0)
    elif contiguous and tensor.device.type == "cpu":
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        bits = tensor.detach().view(-1).view(integer)
        kept = mask.to(tensor.device).view(-1)
        for offset in range(0, len(bits), _PIECE):
            bits[offset : offset + _PIECE] &= kept[offset : offset + _PIECE].to(integer).neg_()
    else:
        tensor.masked_fill_(~mask.to(tensor.device), 0)


def base_optimizer(optimizer: Any) -> Any:
    """The optimizer without the wrappers of accelerate and DeepSpeed; other wrappers may change its steps, and stay."""
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if type(optimizer).__module__.startswith("deepspeed.runtime"):
        optimizer = optimizer.optimizer
    return optimizer
