"""The inputs of each layer in the model as it is pruned so far, in one forward pass of the model's own `forward`.

Each micro-batch runs in a thread of its own, one at a time, and is stopped before each layer that is not pruned yet.
When all are stopped, the earliest layer gets its new weight, and those before it go on. No architecture needs a list of
blocks, and no activation is computed twice. A dense twin of each micro-batch passes each layer before its weight is
replaced, and so has what the dense model computes at the same place.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef
from transformers import PreTrainedModel

from ..errors import ArgumentError, PruningStateError
from ..foreign.heap import give_back_freed_memory, large_tensors_given_back, large_tensors_reused
from ..model.layouts import Target
from ..model.names import named_parameters
from ..structure.batches import on_model
from .discovery import Discovery, Tap, discover, first_tensor
from .fused import FusedProducts, Routed
from .layers import Layer, find_layers, inputs_of_part, matrix_of, put_matrix, reads_alike, take_matrix
from .offload import Offload, Store
from .onload import Onload
from .order import order_of
from .passes import Pass
from .settings import set_for_streaming
from .tokens import kept_of_routed, kept_rows, kept_tokens

_log = logging.getLogger(__name__)

Inputs = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]

# How many forward passes go on, on a CPU, before the memory that they have freed goes back to the system.
PASSES_OF_FREED_MEMORY = 8

# Gives a tensor that a paused pass holds, or a copy of it where its bytes are elsewhere.
_Read = Callable[[torch.Tensor], torch.Tensor]


@dataclass(eq=False)
class _Place:
    """Where a forward pass is stopped: before a layer, with what this gets; `rows` are those of each expert."""

    layer: Layer
    parts: Sequence[int]
    seen: torch.Tensor | None
    rows: Sequence[torch.Tensor] = ()
    routed: Routed | None = None

    def inputs(self, part: int, read: "_Read") -> torch.Tensor:
        if self.seen is None:
            return read(self.rows[self.parts.index(part)])
        return inputs_of_part(self.layer, part, read(self.seen))


@dataclass(eq=False)
class _Stream:
    """The forward pass of a micro-batch through the pruned model or, as a `dense` twin, through the dense one."""

    batch: Mapping[str, Any]
    index: int
    dense: bool
    twin: "_Stream | None" = None
    thread: Pass | None = None
    place: _Place | None = None
    before: tuple[TensorWeakRef, int, Layer] | None = None  # the input at the previous stop, its version, its layer
    taps: dict[Tap, torch.Tensor] = field(default_factory=dict)


class Stop:
    """A matrix (out, in) that is due: what it is multiplied with is known, and its new weight can be set.

    Attributes:
        target: the tensor.
        part: the expert, or the group of a convolution, whose matrix it is; 0 for other tensors.
        shares_inputs: whether all of its inputs are the very tensors of the previous stop, as those of q, k and v are.
        writes_into_residual: whether the residual stream that its output is added to is known, so that `inputs` has e.
    """

    def __init__(self, layer: Layer, part: int, shares_inputs: bool, writes_into_residual: bool, device: torch.device):
        self.target: Target = layer.target
        self.part = part
        self.shares_inputs = shares_inputs
        self.writes_into_residual = writes_into_residual
        self._layer = layer
        self._device = device
        self._new: torch.Tensor | None = None
        self._takes = False
        self._inputs: Callable[[], Iterator[Inputs]] | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The matrix (out, in) as it is: a copy, on the device where the model is computed.

        The columns of a convolution are kernel positions, then channels.
        """
        return matrix_of(self._layer, self.part).to(self._device, copy=True)

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's outputs and inputs."""
        return tuple(matrix_of(self._layer, self.part).shape)

    def inputs(self) -> Iterator[Inputs]:
        """For each micro-batch: x, x of the dense model, and e = h° - h, as (tokens, in), (tokens, in), (tokens, out).

        Padding and positions without a loss are left out; see `tokens.kept_tokens`. x of the dense model is None
        without dense twins, and for experts, to which the two models send other tokens. e is None too where the
        residual stream is not known. Can be called again until the stream goes on.

        Raises PruningStateError after that.
        """
        if self._inputs is None:
            raise PruningStateError(
                f"{self.target.name}: expected its inputs to be read before the stream goes on to the next layer, and "
                "they are gone; read them inside the loop"
            )
        return self._inputs()

    def set(self, weight: torch.Tensor, take: bool = False) -> None:
        """Give the matrix (out, in) that the layer has from here on. It is written when the stream goes on.

        With `take`, nothing is written: the matrix itself becomes the memory of the tensor, see `layers.can_map`.

        Raises ArgumentError for another shape.
        """
        if tuple(weight.shape) != self.shape:
            raise ArgumentError(f"{self.target.name}: expected a weight of {self.shape}, got {tuple(weight.shape)}")
        self._new, self._takes = weight.detach(), take


class Lockstep:
    """Streams micro-batches through a model, and stops before each matrix that is pruned.

        for stop in Lockstep(model, batches, targets):
            gram = sum(x.T @ x for x, _, _ in stop.inputs())
            stop.set(pruned(stop.weight, gram))

    Each layer is met once, in the order of the forward pass; a stop whose weight is not set leaves it as it is. While
    it is iterated, the model is in evaluation mode, keeps no cache, and computes fused experts one after another; all
    this is undone at the end, also after an error, and no thread is left. Weights that were set stay set.

    Args:
        model: the model. It is run once on the first micro-batch before the stream, to see how it calls its layers.
        batches: the micro-batches, as arguments of `forward`. Labels say which positions have a loss; only an
            encoder-decoder that makes its decoder's inputs of them is given them.
        targets: the tensors to prune, as `find_targets` gives them.
        dense_twin: also run each micro-batch through the dense model, for `inputs` to have what it computes.
        autocast: the type that products are computed in; None: that of the weights.
        on_output: called with (index of the micro-batch, dense twin or not, output) of each finished forward pass.
            Without it, the passes end after the last layer.
        device: where the model is computed, whose weights stay where they are; None: there. See `Onload`.
        around: makes a context for each forward pass, in its thread, and for the one before the stream.
        store: makes where the tensors of paused passes wait, when the stream begins; `inputs` then gives copies, and
            at most one pass has its tensors on the model's device. Without it, they stay where they are.

    Attributes:
        uses: name -> how often a layer that is called several times comes again (shared layers).
        discovery: what else was found about the model's calls.
        never_reached: the names of targets whose layer was never called, in the model's order; complete at the end.
        experts_never_reached: name -> the experts that got no token, of targets that are reached; complete at the end.
        missed: name -> how many micro-batches came to a layer after its weight was replaced: 0 of them is right.

    Raises what the model's forward raises, in the thread that iterates.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Mapping[str, Any]],
        targets: Sequence[Target],
        dense_twin: bool = False,
        autocast: torch.dtype | None = None,
        on_output: Callable[[int, bool, Any], None] | None = None,
        device: torch.device | None = None,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        store: Callable[[], Store] | None = None,
    ):
        if not batches:
            raise ArgumentError("batches: expected at least one micro-batch, got none")
        self._model = model
        self._device = model.device if device is None else device
        self._onload = None if device is None else Onload(model, device, self._apart)
        self._autocast = autocast
        self._on_output = on_output
        self._around = around
        self._store = store
        self._offload: Offload | None = None
        self._layers = find_layers(model, targets, dict(named_parameters(model)))
        self._streams: list[_Stream] = []
        for index, batch in enumerate(batches):
            pruned = _Stream(batch, index, dense=False)
            if dense_twin:
                pruned.twin = _Stream(batch, index, dense=True)
                self._streams.append(pruned.twin)
            self._streams.append(pruned)
        self._running: _Stream | None = None
        self._passed: set[tuple[Layer, int]] = set()
        self._reached: set[tuple[Layer, int]] = set()
        self._dense_weights: dict[Layer, torch.Tensor] = {}
        self.missed: dict[str, int] = {}
        with large_tensors_given_back(), set_for_streaming(model), self._onload or nullcontext():
            self.discovery = self._discover(batches[0])
        self._keys = order_of(self._layers, self.discovery)
        self.uses = {layer.target.name: calls - 1 for layer, calls in self.discovery.calls.items() if calls > 1}
        last_use = {tap: layer for layer, _ in self.discovery.order for tap, _ in self._residual(layer)}
        self._last_taps = {layer: [tap for tap, last in last_use.items() if last is layer] for layer in self._layers}

    @property
    def onloaded(self) -> int:
        """The most bytes of weights that were on `device` at once; 0 without one."""
        return 0 if self._onload is None else self._onload.most

    @property
    def never_reached(self) -> list[str]:
        """The names of targets none of whose matrices was met so far."""
        reached = {layer for layer, _ in self._reached}
        return [layer.target.name for layer in self._layers if layer not in reached]

    @property
    def experts_never_reached(self) -> dict[str, list[int]]:
        """Name -> the experts that were not met so far, of targets others of whose experts were."""
        missing = {
            layer.target.name: [part for part in range(layer.parts) if (layer, part) not in self._reached]
            for layer in self._layers
            if layer.target.name not in self.never_reached
        }
        return {name: parts for name, parts in missing.items() if parts}

    def __iter__(self) -> Iterator[Stop]:
        if self._passed or any(stream.thread is not None for stream in self._streams):
            raise PruningStateError("expected a new stream, got one that has been iterated; make another one")
        self._offload = Offload(self._store()) if self._store is not None else None
        heap = large_tensors_reused() if self._offload is None else large_tensors_given_back()
        with heap, set_for_streaming(self._model), self._onload or nullcontext(), self._hooks():
            try:
                yield from self._stops()
            finally:
                for stream in self._streams:
                    if stream.thread is not None:
                        stream.thread.end()
                    stream.place, stream.twin = None, None
                    stream.taps.clear()
                self._dense_weights.clear()
                if self._offload is not None:
                    self._offload.end()
                    self._offload = None
        for name, number in self.missed.items():
            _log.warning("%s: %d micro-batches came to it after it was pruned; its inputs lack theirs", name, number)

    def _stops(self) -> Iterator[Stop]:
        for stream in self._streams:
            contexts = [self._autocasting, self._fused_products_of(stream), self._around]
            if self._offload is not None:
                contexts.append(partial(self._offload.watching, stream))
            stream.thread = Pass(self._forward_of(stream), contexts)
        self._go_all(self._streams)
        before: set[int] = set()
        while places := [stream.place for stream in self._streams if stream.place is not None]:
            first = min(places, key=self._key_of)
            here = [one for one in self._streams if one.place and self._key_of(one.place) == self._key_of(first)]
            stops = []
            for part in first.parts:
                if all(stream.dense for stream in here):
                    break
                self._reached.add((first.layer, part))
                stop = self._make_stop(first.layer, part, here, before)
                stops.append(stop)
                yield stop
            before = {id(stream) for stream in here}
            if not self._release(first, here, stops):
                return

    def _key_of(self, place: _Place) -> tuple[float, ...]:
        return self._keys[place.layer](place.parts[0])

    def _make_stop(self, layer: Layer, part: int, here: Sequence[_Stream], before: set[int]) -> Stop:
        shares = layer.parts == 1 and before == {id(stream) for stream in here} and all(map(_is_same, here))
        stop = Stop(layer, part, shares, bool(self._residual(layer)), self._device)
        stop._inputs = lambda: self._inputs(layer, part, here)
        return stop

    def _read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, or a copy of it where its bytes are elsewhere; detached, as it may be a parameter."""
        return (tensor if self._offload is None else self._offload.copy_of(tensor)).detach()

    def _inputs(self, layer: Layer, part: int, here: Sequence[_Stream]) -> Iterator[Inputs]:
        for stream in here:
            if stream.dense or stream.place is None:
                continue
            place, twin = stream.place, stream.twin
            x = place.inputs(part, self._read)
            kept = self._kept(stream, place, len(x))
            dense: torch.Tensor | None = None
            lack: torch.Tensor | None = None
            if twin is not None and twin.place is not None and twin.place.layer is layer and not layer.routed:
                dense = twin.place.inputs(part, self._read)
                if dense.shape != x.shape:
                    dense = None
                elif self._residual(layer):
                    lack = self._lack(layer, stream, twin)
            if kept is not None:
                x = x[kept]
                dense = dense[kept] if dense is not None else None
                lack = lack[kept] if lack is not None else None
            yield x, dense, lack
            del x, dense, lack  # before those of the next one are there
        self._give_back()

    def _kept(self, stream: _Stream, place: _Place, rows: int) -> torch.Tensor | None:
        sides = kept_tokens(self._model, stream.batch)
        position = self.discovery.positions.get(place.layer)
        if place.seen is not None:
            kept = kept_rows(position, place.seen.shape, rows, sides)
        elif place.routed is not None:
            indices = place.routed.indices
            indices = None if indices is None else self._read(indices)
            kept = kept_of_routed(position, indices, place.routed.total, sides)
        else:
            kept = None
        return None if kept is None else kept.to(self._device)

    def _residual(self, layer: Layer) -> Sequence[tuple[Tap, float]]:
        return self.discovery.residual.get(layer, ())

    def _lack(self, layer: Layer, stream: _Stream, twin: _Stream) -> torch.Tensor | None:
        """e = h° - h, (tokens, out), where the layer's output is added to h; None where h was not seen."""
        total = None
        for tap, factor in self._residual(layer):
            if tap not in stream.taps or tap not in twin.taps:
                return None
            dense, pruned = self._read(twin.taps[tap]), self._read(stream.taps[tap])
            difference = (dense - pruned).reshape(-1, self._width(layer)) * factor
            total = difference if total is None else total + difference
        return total

    def _width(self, layer: Layer) -> int:
        return len(matrix_of(layer, 0))

    def _release(self, place: _Place, here: Sequence[_Stream], stops: Sequence[Stop]) -> bool:
        """Let the passes that are stopped here go on: dense twins with the old weight, the others with the new one.

        Returns False where nothing is left to go on for.
        """
        layer = place.layer
        for stop in stops:
            stop._inputs = None
        self._passed.update((layer, part) for part in place.parts)
        for stream in here:
            seen = stream.place.seen if stream.place is not None else None
            stream.before = (TensorWeakRef(seen), seen._version, layer) if seen is not None else None
            for tap in self._last_taps[layer]:
                stream.taps.pop(tap, None)
        goes_on = self._on_output is not None or not all(map(self._is_over, self._layers))
        if goes_on:
            self._go_all([stream for stream in here if stream.dense])
        comes_again = self.discovery.calls.get(layer, 0) > 1 and layer.kind != "experts"
        if any(stream.dense for stream in here) and comes_again:
            self._dense_weights[layer] = layer.parameter.detach().clone()
        for stop in stops:
            if stop._new is not None:
                self._write(stop, stop._new)
            stop._new = None
        if goes_on:
            self._go_all([stream for stream in here if not stream.dense])
        return goes_on

    def _write(self, stop: Stop, matrix: torch.Tensor) -> None:
        """Give a layer the weight of a stop."""
        layer = stop._layer
        write = partial(take_matrix, layer, matrix) if stop._takes else partial(put_matrix, layer, stop.part, matrix)
        if self._onload is None:
            write()
        else:
            self._onload.set(layer.parameter, write)

    def _go_all(self, streams: Sequence[_Stream]) -> None:
        """Let passes go on with the weights as they are now, one after another."""
        with nullcontext() if self._onload is None else self._onload.held():
            for place, stream in enumerate(streams):
                if place % PASSES_OF_FREED_MEMORY == 0:
                    self._give_back()
                self._go(stream)
        self._give_back()

    def _give_back(self) -> None:
        """Return to the system what was freed, before something else needs memory of other sizes."""
        if self._device.type == "cpu":
            give_back_freed_memory()

    def _is_over(self, layer: Layer) -> bool:
        return layer.kind == "unknown" or all((layer, part) in self._passed for part in range(layer.parts))

    # ---- In the threads ----

    def _go(self, stream: _Stream) -> None:
        assert stream.thread is not None
        stream.place = None
        self._running = stream
        if self._offload is not None:
            self._offload.bring_back(stream)
        # Where a model's own `forward` is in autocast, its cache of weights lasts as long as any pass does: a layer
        # would compute with the weights that it had before.
        torch.clear_autocast_cache()
        try:
            stream.thread.go()
        finally:
            self._running = None
        if self._offload is not None:
            if stream.thread.is_done:
                self._offload.forget(stream)
            else:
                self._offload.put_away(stream)

    def _forward_of(self, stream: _Stream) -> Callable[[], None]:
        def forward() -> None:
            output = self._run(stream.batch)
            if self._on_output is not None:
                self._on_output(stream.index, stream.dense, output)

        return forward

    def _run(self, batch: Mapping[str, Any]) -> Any:
        return self._model(**on_model(batch, self._model))

    def _apart(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Call a function that belongs to no pass, outside of what watches the one that runs."""
        thread = self._running.thread if self._running is not None else None
        return function() if thread is None else thread.call(function)

    def _discover(self, batch: Mapping[str, Any]) -> Discovery:
        with torch.no_grad(), self._autocasting(), self._around():
            return discover(self._model, batch, self._run, self._layers)

    def _autocasting(self) -> Any:
        """Autocast, if it is asked for, that caches no weights: they change."""
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._autocast, cache_enabled=False)

    def _fused_products_of(self, stream: _Stream) -> Callable[[], Any]:
        experts = [layer for layer in self._layers if layer.kind == "experts"]

        def arrive(layer: Layer, parts: Sequence[int], rows: Sequence[torch.Tensor], routed: Routed | None) -> None:
            if self._running is stream:
                self._arrive(stream, _Place(layer, parts, None, rows, routed))

        return (lambda: FusedProducts(experts, arrive)) if experts else nullcontext

    def _arrive(self, stream: _Stream, place: _Place) -> None:
        """Stop before a layer, unless it is pruned already."""
        layer = place.layer
        if all((layer, part) in self._passed for part in place.parts):
            if self.discovery.calls.get(layer, 0) < 2 and layer.kind != "experts":
                self.missed[layer.target.name] = self.missed.get(layer.target.name, 0) + 1
            return
        stream.place = place
        assert stream.thread is not None
        stream.thread.pause()

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            taps = {tap for layer in self._layers for tap, _ in self._residual(layer)}
            for tap in taps:
                stack.callback(self._hook_tap(tap).remove)
            for layer in self._layers:
                for module in layer.modules if layer.kind in ("linear", "convolution") else ():
                    before, after = self._hooks_of(layer)
                    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                    if self.discovery.calls.get(layer, 0) > 1:
                        stack.callback(module.register_forward_hook(after, always_call=True).remove)
            yield

    def _hook_tap(self, tap: Tap) -> Any:
        def before(module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
            if self._running is not None:
                self._running.taps[tap] = tap.of_arguments(arguments, options)

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            if self._running is not None:
                self._running.taps[tap] = tap.of_output(output)

        if tap.is_input:
            return tap.module.register_forward_pre_hook(before, with_kwargs=True)
        return tap.module.register_forward_hook(after)

    def _hooks_of(self, layer: Layer) -> tuple[Callable[..., None], Callable[..., None]]:
        """Before the layer, stop; a dense twin passes a layer that comes again with its old weight."""
        replaced: list[torch.Tensor] = []

        def before(module: nn.Module, arguments: Any, options: Mapping[str, Any]) -> None:
            stream = self._running
            if stream is None:
                return
            self._arrive(stream, _Place(layer, range(layer.parts), first_tensor(arguments, options)))
            if stream.dense and layer in self._dense_weights:
                replaced.append(layer.parameter.data)
                layer.parameter.data = self._dense_weights[layer]

        def after(module: nn.Module, arguments: Any, output: Any) -> None:
            if replaced:
                layer.parameter.data = replaced.pop()

        return before, after


def _is_same(stream: _Stream) -> bool:
    """Whether a pass stops with the very tensor that it stopped with before, unchanged, and read in the same way."""
    if stream.before is None or stream.place is None or stream.place.seen is None:
        return False
    reference, version, layer = stream.before
    is_unchanged = reference() is stream.place.seen and stream.place.seen._version == version
    return is_unchanged and reads_alike(layer, stream.place.layer)
