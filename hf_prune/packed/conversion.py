"""Unpacking as a step of how transformers loads weights, before the steps that a model class has of its own."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ..foreign.transformers import ConversionOps, WeightConverter, keep_conversions, loaded_conversions
from .block import unpack_tensor
from .tensors import dense_tensor

# Name of a parameter or buffer -> its shape, and the data type that it is loaded in.
Wanted = Mapping[str, tuple[torch.Size, torch.dtype]]

_ANY_NAME = "(.+)"


class Unpack(ConversionOps):
    """Blocks of bytes become tensors; tensors that are none stay as they are. All are cast to the wanted data type.

    It has no reverse: `without_unpacking` takes this step away once a model is loaded, and saving never asks for it.
    """

    def __init__(self, wanted: Wanted, is_last: bool):
        self._wanted, self._is_last = wanted, is_last

    def __deepcopy__(self, memo: dict[int, Any]) -> "Unpack":
        return self

    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], *args: Any, full_layer_name: str, **kwargs: Any
    ) -> dict[str, Any]:
        """The tensors of each pattern; where nothing follows, the one tensor under its full name."""
        _, dtype = self._wanted[full_layer_name]
        found = {key: [_unpacked(tensor, dtype) for tensor in _popped(input_dict[key])] for key in list(input_dict)}
        if not self._is_last:
            return found
        [[tensor]] = found.values()
        return {full_layer_name: tensor}


def _popped(tensors: list[torch.Tensor]) -> Any:
    """Each tensor, dropped from the list, so that one at a time is there both packed and dense."""
    while tensors:
        yield tensors.pop(0)


def _unpacked(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if tensor.dtype == torch.uint8:
        patterns, head = unpack_tensor(tensor.cpu().numpy().data)
        device, tensor = tensor.device, dense_tensor(patterns, head.dtype, head.shape)
        tensor = tensor.to(device)
    return tensor.to(dtype) if tensor.is_floating_point() and dtype.is_floating_point else tensor


def unpack_alone(wanted: Wanted) -> Any:
    """The conversion of a tensor of any name that no other conversion takes."""
    return WeightConverter([_ANY_NAME], [r"\1"], [Unpack(wanted, is_last=True)])


def unpack_first(conversion: Any, wanted: Wanted) -> Any:
    """A copy of a conversion that unpacks first; one that only renames stays as it is."""
    if not isinstance(conversion, WeightConverter):
        return conversion
    changed = copy.deepcopy(conversion)
    changed.operations = [Unpack(wanted, is_last=False), *conversion.operations]
    return changed


def without_unpacking(model: Any) -> None:
    """Leave a loaded model with the conversions of its class, which `save_pretrained` reverts."""
    kept = []
    for conversion in loaded_conversions(model):
        operations = getattr(conversion, "operations", None)
        if operations is not None:
            conversion.operations = [one for one in operations if not isinstance(one, Unpack)]
        if operations is None or conversion.operations:
            kept.append(conversion)
    keep_conversions(model, kept)
