"""Seeing the matrix products of fused experts, which no module is called for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .layers import Layer


@dataclass(frozen=True)
class Routed:
    """Which tokens an expert gets: their indices, None for all of them, and how many there are in all."""

    indices: torch.Tensor | None
    total: int


# Called before a product: the layer, its experts, and for each the rows it is multiplied with, and which tokens they
# are, where that is known.
Seen = Callable[[Layer, Sequence[int], Sequence[torch.Tensor], Routed | None], None]

# Called after it: the layer, its experts, and the product, of all of them at once (experts, rows, out) or of one
# (..., out). What it returns takes the product's place.
Made = Callable[[Layer, Sequence[int], torch.Tensor], torch.Tensor]

_PRODUCTS = {"linear": (0, 1), "matmul": (0, 1), "__matmul__": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2)}
_SELECTIONS = ("__getitem__", "index_select")


class FusedProducts(TorchFunctionMode):
    """Calls `seen` before each product with the matrix of an expert, which is known by its place in the parameter.

    A product of several matrices at once (`bmm` with the whole parameter) is one call, with all experts. `made`, if
    there is one, is called after each.
    """

    def __init__(self, layers: Sequence[Layer], seen: Seen, made: Made | None = None):
        super().__init__()
        self._made = made
        self._layers = list(layers)  # the one that was found last comes first
        parameters = [layer.parameter for layer in layers]
        self._sizes = {one.untyped_storage().nbytes() for one in parameters} | {one.nbytes for one in parameters}
        self._seen = seen
        self._routed = WeakTensorKeyDictionary()  # rows that were selected -> which
        self._latest: dict[tuple[int, int], Routed] = {}  # module and expert -> what its latest product got

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        looked = None
        if name in _PRODUCTS and len(args) > _PRODUCTS[name][1]:
            first, second = (args[index] for index in _PRODUCTS[name])
            looked = self._look(first, second)
        result = func(*args, **kwargs)
        if looked is not None and self._made is not None:
            result = self._made(*looked, result)
        if name in _SELECTIONS and len(args) > 1 and torch.is_tensor(result) and torch.is_tensor(args[0]):
            self._note(args[0], args[1] if name == "__getitem__" else args[-1], result)
        elif name == "split" and torch.is_tensor(args[0]) and args[0] in self._routed:
            routed = self._routed[args[0]]
            for part, indices in zip(result, func(routed.indices, *args[1:], **kwargs), strict=True):
                self._routed[part] = Routed(indices, routed.total)
        return result

    def _note(self, rows: torch.Tensor, chosen: Any, result: torch.Tensor) -> None:
        if torch.is_tensor(chosen) and chosen.dim() == 1 and rows.dim() == 2:
            indices = chosen.nonzero().squeeze(1) if chosen.dtype == torch.bool else chosen
            self._routed[result] = Routed(indices, len(rows))

    def _look(self, inputs: Any, weight: Any) -> tuple[Layer, Sequence[int]] | None:
        if not torch.is_tensor(weight) or not torch.is_tensor(inputs) or not weight.is_floating_point():
            return None
        found = self._find(weight)
        if found is None:
            return None
        layer, first, number = found
        if number > 1:
            if weight.dim() == 3 and inputs.dim() == 3 and len(inputs) == layer.parts == number:
                self._seen(layer, range(layer.parts), list(inputs), Routed(None, inputs.shape[1]))
                return layer, range(layer.parts)
            return None
        key = (id(layer.modules[0]), first)
        routed, latest = self._routed.get(inputs), self._latest.get(key)
        if routed is not None:
            self._latest[key] = routed
        elif latest is not None and latest.indices is not None and len(latest.indices) == inputs[..., 0].numel():
            routed = latest  # of the product before, in the same expert
        self._seen(layer, (first,), (inputs.reshape(-1, inputs.shape[-1]),), routed)
        return layer, (first,)

    def _find(self, weight: torch.Tensor) -> tuple[Layer, int, int] | None:
        """The layer that a weight is part of, the first expert in it, and the number of experts.

        The parameters' memory may be another one from one call to the next, as where it is copied to a device.
        """
        storage = weight.untyped_storage()
        if storage.nbytes() not in self._sizes:
            return None
        for place, layer in enumerate(self._layers):
            offset = weight.storage_offset() - layer.parameter.storage_offset()
            if layer.parameter.untyped_storage() is storage and 0 <= offset < layer.parameter.numel():
                self._layers.insert(0, self._layers.pop(place))
                size = layer.parameter[0].numel()
                return layer, offset // size, max(1, weight.numel() // size)
        return None
