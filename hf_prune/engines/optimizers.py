"""What an optimizer remembers of each weight, wherever it keeps it, so that it can be made to forget masked ones.

`docs/optimizers.md` has a line for every `optim` of `TrainingArguments`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer

from .holdings import local_part

# With a zero gradient and zero moments these leave a zero weight at zero, so they need no second pass over the weights.
# The very classes: GaLore's and bitsandbytes' have the same names and do other things.
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
    """Whether the optimizer leaves a weight at zero whose gradient and moments are zero.

    With `eps=0` none does: zero over zero is NaN.
    """
    optimizer = base_optimizer(optimizer)
    name = (type(optimizer).__module__.partition(".")[0], type(optimizer).__name__)
    is_elementwise = type(optimizer) in ELEMENTWISE_OPTIMIZERS or name in _DEEPSPEED_ELEMENTWISE
    return is_elementwise and all(group.get("eps", 1) for group in optimizer.param_groups)


def parameters_of(optimizer: Any) -> set[torch.Tensor]:
    """The parameters that the optimizer changes."""
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}


def updates_in_backward(optimizer: Any) -> bool:
    """Whether the optimizer changes the weights in the backward pass of every micro-batch."""
    return type(base_optimizer(optimizer)).__name__ in _UPDATE_IN_BACKWARD


@torch.no_grad()
def zero_moments(
    optimizer: Any, parameter: torch.Tensor, mask: torch.Tensor, indices: torch.Tensor | None = None
) -> None:
    """Zero what the optimizer remembers of the masked weights of a parameter, in every state that has its shape.

    That is also done where several such states are stacked (AdEMAMix), where 8 bits are codes of a table
    (bitsandbytes) and in quantized tensors (torchao), as exactly as their codes allow. With `indices` (flat) only those
    weights need be looked at: the others were zeroed before. Of a sharded parameter, mask and indices are of the part
    that this process holds.
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
    """The optimizer's states of a parameter, where torch has them and where other optimizers do.

    Not those of a space of lower rank (GaLore, APOLLO): whatever their shape, they are no moments of single weights.
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
    """Set the entries of a floating-point tensor whose mask is False to +0.0, in place, whatever they were.

    With `indices` (flat) only those entries are set. On a CPU by the bits, a piece at a time: four times as fast as
    `masked_fill_`, which branches on every entry.
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
    """The optimizer without the wrappers of accelerate and DeepSpeed; those of others may do what they like."""
    if isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    if type(optimizer).__module__.startswith("deepspeed.runtime"):
        optimizer = optimizer.optimizer
    return optimizer
