"""How many bytes the paused forward passes of a stream hold, known in advance from one pass without weights."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import PruningStateError
from ..foreign.heap import REUSED_BELOW
from ..model.layouts import Target
from ..structure.live_bytes import LiveBytes
from .lockstep import PASSES_OF_FREED_MEMORY, Lockstep


class _WithoutValues(TorchFunctionMode):
    """What a forward pass on the meta device needs: attention, and answers where it reads values.

    Attention gives a tensor alone, as kernels on devices do, which never hold the scores as a whole. Whether all of
    something is so, which models ask of masks and positions to leave masks out, is answered with yes. Which experts
    tokens are sent to is answered with all in turn.

    Args:
        experts: the numbers of experts that the layers of the model have.
    """

    def __init__(self, experts: Collection[int]):
        super().__init__()
        self._experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, value = given["query"], given["value"]
            samples, heads, tokens, _ = query.shape
            return query.new_empty((samples, tokens, heads, value.shape[-1])).transpose(1, 2)
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if func is nn.functional.one_hot and args[0].is_meta:
            return self._in_turn(*args, **(kwargs or {}))
        if func is torch.where and len(args) == 1 and not args[0].is_meta:  # which tokens an expert gets
            return tuple(one.to("meta") for one in func(*args))
        return func(*args, **(kwargs or {}))

    def _in_turn(self, chosen: torch.Tensor, num_classes: int) -> torch.Tensor:
        """What `one_hot` gives, on the CPU. One class more than there are experts stands for none of them."""
        experts = num_classes - 1 if num_classes - 1 in self._experts else num_classes
        in_turn = torch.arange(chosen.numel()).reshape(chosen.shape) % experts
        return nn.functional.one_hot(in_turn, num_classes)


@dataclass(frozen=True)
class StreamMemory:
    """Bytes that a stream needs beside weights and micro-batches.

    Attributes:
        peak: the most that all forward passes hold at once: those that are paused, and the one that runs.
        freed: the most that others have freed meanwhile, and that the heap of a CPU still holds.
        running: the most that one pass holds, while it runs; also that before the stream, which sees how the model
            calls its layers, and computes all of its outputs.
        paused: the most that one paused pass holds.
        at: the target that passes are paused before when they hold that.
        held: target -> what one pass holds when it is paused before its layer.
        into_residual: the targets whose layers write into a residual stream.
        onloaded: the most bytes of weights that are on the device at once, where they stay elsewhere.
    """

    peak: int
    freed: int
    running: int
    paused: int
    at: str
    held: dict[str, int]
    into_residual: frozenset[str]
    onloaded: int


def stream_memory(
    model: PreTrainedModel,
    batch: Mapping[str, Any],
    targets: Sequence[Target],
    micro_batches: int,
    dense_twin: bool = False,
    onloads: bool = False,
) -> StreamMemory:
    """The memory of a stream over micro-batches of the size of `batch`, from one pass of the model over it.

    A model and a batch on the meta device need no weights and no computation; `meta_batch` makes such a batch. With n
    passes (twice the micro-batches with dense twins), paused[i] before layer i and running[i] the peak of one pass from
    there to the next layer, it is the largest (n - 1) max(paused[i], paused[i + 1]) + running[i]; or the peak of the
    one pass before the stream. What a solver needs comes on top of it; and with `onloads`, where weights stay elsewhere
    and are copied to the device, these copies.

    On the meta device, experts get as many tokens each. Raises PruningStateError there where the model's forward reads
    other values.
    """
    known = [*model.parameters(), *model.buffers()]
    live, small = LiveBytes(known), LiveBytes(known, below=REUSED_BELOW)
    on_meta = next(model.parameters()).is_meta
    passes = micro_batches * (2 if dense_twin else 1)
    held: list[tuple[int, str]] = [(0, "")]
    running: list[int] = []
    freed: list[int] = []  # by a pass on its way to a stop, of what the heap keeps
    try:
        experts = {target.experts for target in targets if target.layout.startswith("experts")} if on_meta else None
        around = partial(_around, (live, small), experts)
        stream = Lockstep(model, [batch], targets, device=model.device if onloads else None, around=around)
        alone = live.peak
        live.peak = live.now = small.peak = small.now = small_before = 0
        for stop in stream:
            running.append(live.peak)
            held.append((live.now, stop.target.name))
            freed.append(small.peak - max(small_before, small.now))
            live.peak, small.peak, small_before = live.now, small.now, small.now
    except (NotImplementedError, RuntimeError) as error:
        if not on_meta:
            raise
        raise PruningStateError(
            f"{type(model).__name__}: expected a forward pass that reads no values, to know its memory in advance; "
            f"got: {error}; measure with the model and its weights"
        ) from error
    pairs = zip(pairwise(held), running, strict=True)
    peak = max((passes - 1) * max(before[0], after[0]) + most for (before, after), most in pairs)
    most, at = max(held)
    into_residual = frozenset(layer.target.name for layer, taps in stream.discovery.residual.items() if taps)
    most_running = max(alone, *running)
    return StreamMemory(
        peak=max(peak, alone),
        freed=(min(passes, PASSES_OF_FREED_MEMORY) - 1) * max(freed),
        running=most_running,
        paused=most,
        at=at,
        held={name: size for size, name in held[1:]},
        into_residual=into_residual,
        onloaded=stream.onloaded,
    )


def meta_batch(samples: int, length: int) -> dict[str, torch.Tensor]:
    """A micro-batch of text for a model on the meta device."""
    return {"input_ids": torch.empty(samples, length, dtype=torch.int64, device="meta")}


def _around(counters: Sequence[LiveBytes], experts: Collection[int] | None) -> AbstractContextManager[Any]:
    stack = ExitStack()
    for one in counters:
        stack.enter_context(one.watching())
    if experts is not None:
        stack.enter_context(_WithoutValues(experts))
    return stack
