"""2:4 sparsity on GPUs: linear layers with torch's semi-structured tensors, which the hardware multiplies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured

from ..errors import HardwareError

# The compute capability of Ampere, the first GPUs that multiply 2:4.
_LEAST_CAPABILITY = (8, 0)

# What torch's kernels divide weights into: outputs and inputs have to be multiples.
_OUTPUTS, _INPUTS = 32, 64


@dataclass(frozen=True)
class SemiStructured:
    """What `semi_structured` did: the paths of converted layers, and of those left dense with the reason."""

    converted: list[str]
    left: dict[str, str]


def semi_structured(model: nn.Module) -> SemiStructured:
    """Give linear layers whose weights have the pattern 2:4 torch's semi-structured tensors, for inference on a GPU.

    Each Linear on a CUDA device in float16 or bfloat16 is converted that has at most 2 weights that are not zero in
    each 4 along its inputs, and multiples of 32 outputs and of 64 inputs. The model is changed in place, and is no
    longer to be trained or saved: a semi-structured tensor holds the weights that are left, and where they are. To
    have it dense again, load it again.

    Raises:
        HardwareError: there is no CUDA device of compute capability 8.0 or newer.
    """
    _check_hardware()
    converted, left = [], {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        why = why_not(module)
        if why is None:
            weight = to_sparse_semi_structured(module.weight.detach())
            module.weight = nn.Parameter(weight, requires_grad=False)
            converted.append(name)
        else:
            left[name] = why
    return SemiStructured(converted, left)


def _check_hardware() -> None:
    needed = "2:4 products need a CUDA device of compute capability 8.0 or newer (NVIDIA Ampere and later)"
    if not torch.cuda.is_available():
        raise HardwareError(f"{needed}; torch {torch.__version__} finds none. On CPUs, see hf_prune.sparse_inference")
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        raise HardwareError(f"{needed}; {torch.cuda.get_device_name()} has {capability[0]}.{capability[1]}")


def why_not(layer: nn.Linear) -> str | None:
    """Why the weight of a Linear cannot be a semi-structured tensor, whatever the device; None if it can."""
    weight: Any = layer.weight
    outputs, inputs = weight.shape
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"expected float16 or bfloat16, got {str(weight.dtype).removeprefix('torch.')}"
    if outputs % _OUTPUTS or inputs % _INPUTS:
        return f"expected multiples of {_OUTPUTS} outputs and {_INPUTS} inputs, got {outputs} and {inputs}"
    if not has_two_of_four(weight):
        return "some 4 weights along the inputs have 3 or 4 that are not zero"
    return None


def has_two_of_four(weight: torch.Tensor) -> bool:
    """Whether each 4 weights along the inputs of a matrix, outputs by inputs, have at most 2 that are not zero."""
    return not weight.shape[1] % 4 and bool(((weight != 0).unflatten(1, (-1, 4)).sum(2) <= 2).all())
