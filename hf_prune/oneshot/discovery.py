"""How a model calls its layers, found in one forward pass.

Their order, how often each is called, where the tokens are in its inputs, and which write into the residual stream.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .fused import FusedProducts, Routed
from .layers import Layer
from .tokens import Position, kept_tokens, locate

# Functions that return the same values in the same order, for evaluation: (samples, tokens, width) may become
# (samples · tokens, width).
_SAME_VALUES = (
    *("dropout", "dropout_", "view", "view_as", "reshape", "reshape_as", "flatten", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "detach", "to", "type", "type_as", "float", "half", "bfloat16"),
)
_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")
_PRODUCTS = ("mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply")
_HAND_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Tap:
    """A place where a tensor can be read during a forward pass: an argument of a module, or one of its outputs.

    `key` is the index or the name of the argument, or the index of the output in a tuple; None for the only output.
    """

    module: nn.Module
    is_input: bool
    key: int | str | None

    def of_arguments(self, arguments: Any, options: Mapping[str, Any]) -> torch.Tensor:
        """The tensor among the arguments of a call."""
        value: torch.Tensor = arguments[self.key] if isinstance(self.key, int) else options[self.key or ""]
        return value

    def of_output(self, output: Any) -> torch.Tensor:
        """The tensor in what a call has returned."""
        value: torch.Tensor = output if self.key is None else output[self.key]
        return value


@dataclass
class Discovery:
    """What is found in one forward pass.

    Attributes:
        order: (layer, part) in the order of their first calls.
        calls: layer -> how often it was called; of fused experts, the most that one of them was.
        positions: layer -> where the tokens are in its input, or None where that is not known.
        residual: layer -> [(place, factor)]: the stream that its output is added to is the sum of these, as multiples
            of the layer's output.
    """

    order: list[tuple[Layer, int]] = field(default_factory=list)
    calls: dict[Layer, int] = field(default_factory=dict)
    positions: dict[Layer, Position | None] = field(default_factory=dict)
    residual: dict[Layer, list[tuple[Tap, float]]] = field(default_factory=dict)


def discover(
    model: nn.Module, batch: Mapping[str, Any], run: Callable[[Mapping[str, Any]], Any], layers: Sequence[Layer]
) -> Discovery:
    """Run the model on a batch with `run`, and see how it calls the layers.

    An encoder and a decoder with as many tokens each could not be told apart: the decoder then gets one less.
    """
    batch = _with_other_length(batch)
    found = Discovery()
    counted: dict[tuple[Layer, int], int] = {}
    sides = kept_tokens(model, batch)

    def see(layer: Layer, part: int) -> bool:
        counted[layer, part] = counted.get((layer, part), 0) + 1
        found.calls[layer] = max(found.calls.get(layer, 0), counted[layer, part])
        if counted[layer, part] == 1:
            found.order.append((layer, part))
        return counted[layer, part] == 1

    def see_fused(layer: Layer, parts: Sequence[int], rows: Sequence[torch.Tensor], routed: Routed | None) -> None:
        for part in parts:
            see(layer, part)
        if routed is not None and layer not in found.positions:
            side = next((side for side, kept in sides.items() if kept.numel() == routed.total), None)
            found.positions[layer] = Position(side, "flat") if side is not None else None

    def see_layer(layer: Layer) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
            seen = first_tensor(arguments, options)
            is_first = [see(layer, part) for part in range(layer.parts)]
            if is_first[0]:
                found.positions[layer] = locate(seen.shape, layer.kind == "convolution", sides)
                additions.before(layer)

        return hook

    additions = _Additions()
    with ExitStack() as stack:
        for module in model.modules():
            for handle in additions.hooks(module):
                stack.callback(handle.remove)
        for layer in layers:
            for module in layer.modules if layer.kind in ("linear", "convolution") else ():
                stack.callback(module.register_forward_pre_hook(see_layer(layer), with_kwargs=True).remove)
                if layer.kind == "linear":
                    stack.callback(module.register_forward_hook(additions.after(layer)).remove)
        stack.enter_context(FusedProducts([layer for layer in layers if layer.kind == "experts"], see_fused))
        stack.enter_context(additions)
        run(batch)
    found.residual = additions.residual
    return found


def first_tensor(arguments: Any, options: Mapping[str, Any]) -> torch.Tensor:
    """The first tensor among the arguments of a call."""
    return next(value for value in (*arguments, *options.values()) if torch.is_tensor(value))


def _with_other_length(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch; if encoder and decoder have as many tokens, the decoder with one less."""
    lengths = {name: value.shape[1] for name, value in batch.items() if torch.is_tensor(value) and value.dim() == 2}
    mine = next((lengths[name] for name in ("decoder_input_ids", "labels") if name in lengths), None)
    if mine is None or mine < 2 or mine != lengths.get("input_ids", lengths.get("attention_mask")):
        return dict(batch)
    of_decoder = [name for name in lengths if name.startswith("decoder_") or name == "labels"]
    return {name: value[:, :-1].contiguous() if name in of_decoder else value for name, value in batch.items()}


@dataclass
class _Sum:
    """A tensor that is a layer's output, times a factor, plus others."""

    layers: dict[Layer, float]
    is_sum: bool = False


class _Additions(TorchFunctionMode):
    """Follows the outputs of layers into additions, and finds where the other summands are known before the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.residual: dict[Layer, list[tuple[Tap, float]]] = {}
        self._time = 0
        self._called: dict[Layer, int] = {}
        self._sums = WeakTensorKeyDictionary()
        self._sources = WeakTensorKeyDictionary()  # tensor -> (the tensor it has the values of, a factor)
        self._taps = WeakTensorKeyDictionary()  # tensor -> [(time, tap)]
        self._times: dict[Tap, list[int]] = {}

    def before(self, layer: Layer) -> None:
        self._time += 1
        self._called[layer] = self._time

    def after(self, layer: Layer) -> Callable[[nn.Module, Any, Any], None]:
        seen: set[Layer] = set()

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            if layer not in seen and torch.is_tensor(output):
                seen.add(layer)
                self._sums[output] = _Sum({layer: 1.0})

        return hook

    def hooks(self, module: nn.Module) -> list[Any]:
        """The hooks that note what a module gets and returns."""
        return [
            module.register_forward_pre_hook(self._before_module, with_kwargs=True),
            module.register_forward_hook(self._after_module),
        ]

    def _before_module(self, module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
        given: list[tuple[int | str, Any]] = [*enumerate(arguments), *options.items()]
        for key, value in given:
            if torch.is_tensor(value) and value.is_floating_point():
                self._note(value, Tap(module, True, key))
                sum_ = self._sums.get(value)
                if sum_ is not None and sum_.is_sum and not isinstance(module, _HAND_ON):
                    del self._sums[value]  # here the stream is read: what is added later is of another place

    def _after_module(self, module: nn.Module, arguments: Any, output: Any) -> None:
        values: Iterable[tuple[int | None, Any]] = enumerate(output) if isinstance(output, tuple) else [(None, output)]
        for key, value in values:
            if torch.is_tensor(value) and value.is_floating_point():
                self._note(value, Tap(module, False, key))

    def _note(self, value: torch.Tensor, tap: Tap) -> None:
        self._time += 1
        self._taps[value] = [*self._taps.get(value, ()), (self._time, tap)]
        self._times.setdefault(tap, []).append(self._time)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not torch.is_tensor(result) or not args:
            return result
        if name in _SAME_VALUES and torch.is_tensor(args[0]) and result.is_floating_point():
            self._hand_on(args[0], result, 1.0)
        elif name in _PRODUCTS and len(args) == 2:
            numbers = [value for value in args if isinstance(value, (int, float)) and value]
            tensors = [value for value in args if torch.is_tensor(value)]
            if len(numbers) == len(tensors) == 1:
                self._hand_on(tensors[0], result, float(numbers[0]))
            elif result is args[0]:
                self._sums.pop(result, None)
        elif name in _ADDITIONS and len(args) == 2 and not kwargs and all(torch.is_tensor(value) for value in args):
            self._add(args, result)
        return result

    def _hand_on(self, before: torch.Tensor, after: torch.Tensor, factor: float) -> None:
        if before.numel() != after.numel():
            return
        if before is not after:
            self._sources[after] = (before, factor)
        sum_ = self._sums.get(before)
        if sum_ is not None:
            layers = {layer: factor * one for layer, one in sum_.layers.items()}
            self._sums[after] = _Sum(layers, sum_.is_sum)

    def _add(self, summands: Sequence[torch.Tensor], result: torch.Tensor) -> None:
        layers: dict[Layer, float] = {}
        for one, other in (summands, summands[::-1]):
            sum_ = self._sums.get(one)
            for layer, factor in sum_.layers.items() if sum_ is not None and one.numel() == other.numel() else ():
                layers[layer] = factor
                found = self._find(other, self._called[layer])
                if found is not None:
                    self.residual.setdefault(layer, []).append((found[0], found[1] / factor))
        if layers:
            self._sums[result] = _Sum(layers, is_sum=True)

    def _find(self, tensor: torch.Tensor, time: int) -> tuple[Tap, float] | None:
        """The latest place before a time where a tensor of these values can be read then, and the factor."""
        factor = 1.0
        while True:
            for when, tap in reversed(self._taps.get(tensor, ())):
                times = self._times[tap]
                if when < time and bisect_right(times, when) == bisect_left(times, time):
                    return tap, factor
            if tensor not in self._sources:
                return None
            tensor, times_factor = self._sources[tensor]
            factor *= times_factor
