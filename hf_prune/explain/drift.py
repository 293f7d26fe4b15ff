"""How far the hidden states of a pruned model are from those of the dense one, layer by layer."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ..publish.explanation import Drift
from ..saved.removed import LayersLeft
from .samples import Reader, Samples, asked, batches_of, lengths_of
from .taken import depth_of


def drift_of(
    pruned: Reader, dense: Reader, samples: Samples, batch_size: int, removed: Sequence[LayersLeft] = ()
) -> tuple[list[Drift], list[str]]:
    """How far hidden states moved after each layer of the dense model, on samples; and why nothing is known.

    Where layers were removed, each layer that is left is compared with the one that it was. The states are what the
    layers themselves return, without the norm after the last one.
    """
    before, after = depth_of(dense.model), depth_of(pruned.model)
    if len(before) != 1 or len(after) != 1:
        return [], [f"Drift is of models with one stack of layers; this one has {len(before) or 'none'}."]
    (path, depth), (own_path, own_depth) = next(iter(before.items())), next(iter(after.items()))
    whole = tuple(range(depth)) if own_depth == depth else ()
    kept = next((one.kept for one in removed if one.path == own_path), whole)
    if len(kept) != own_depth or (kept and kept[-1] >= depth):
        return [], [f"Drift is not known: {own_depth} layers are left of {depth}, and it is not known which."]
    rows, own_rows = dense.rows(samples), pruned.rows(samples)
    if (lengths_of(rows) != lengths_of(own_rows)).any():
        return [], ["Drift is not known: both models divide the texts into tokens differently."]
    compared: dict[int, _Distance | _Alignment] = {}
    with asked(dense.model, pruned.model):
        for indices in batches_of(lengths_of(rows), batch_size):
            inputs = dense.inputs(rows, indices)
            states = _states(dense.model, path, inputs)
            own_states = _states(pruned.model, own_path, pruned.inputs(own_rows, indices))
            if len(states) != depth or len(own_states) != own_depth:
                return [], ["Drift is not known: the layers return no hidden states of tokens."]
            mask = inputs.get("attention_mask")
            there = mask.bool().cpu() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
            for place, layer in enumerate(kept):
                one, other = _tokens(own_states[place], there), _tokens(states[layer], there)
                if layer not in compared:
                    compared[layer] = (_Distance if one.shape[1] == other.shape[1] else _Alignment)()
                compared[layer].add(one, other)
    drifts = [
        Drift(layer=layer, moved=compared[layer].value, by=compared[layer].by)
        if layer in compared
        else Drift(layer=layer, moved=None, by="distance")
        for layer in range(depth)
    ]
    return drifts, []


class _Distance:
    """The mean over tokens of |pruned - dense|^2 / |dense|^2."""

    by: Literal["distance", "cka"] = "distance"

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, pruned: torch.Tensor, dense: torch.Tensor) -> None:
        """Count these states (tokens, width)."""
        self._sum += float(((pruned - dense).square().sum(1) / dense.square().sum(1).clamp_min(1e-30)).sum())
        self._tokens += len(dense)

    @property
    def value(self) -> float:
        """The mean of all that were counted."""
        return self._sum / self._tokens


class _Alignment:
    """1 - linear CKA of states of different widths (Kornblith et al., 2019, section 3), from sums over tokens."""

    by: Literal["distance", "cka"] = "cka"

    def __init__(self) -> None:
        self._tokens = 0
        self._sums: list[Any] = [0.0] * 5

    def add(self, pruned: torch.Tensor, dense: torch.Tensor) -> None:
        """Count these states (tokens, width)."""
        self._tokens += len(dense)
        new = (pruned.sum(0), dense.sum(0), pruned.T @ pruned, dense.T @ dense, pruned.T @ dense)
        self._sums = [known + one for known, one in zip(self._sums, new, strict=True)]

    @property
    def value(self) -> float:
        """Of all that were counted; the mean of each dimension is subtracted."""
        own, other, of_own, of_other, of_both = self._sums
        of_own = of_own - torch.outer(own, own) / self._tokens
        of_other = of_other - torch.outer(other, other) / self._tokens
        of_both = of_both - torch.outer(own, other) / self._tokens
        scale = float(of_own.norm() * of_other.norm())
        return 1.0 - float(of_both.square().sum()) / scale if scale > 0 else 1.0


def _tokens(states: torch.Tensor, there: torch.Tensor | None) -> torch.Tensor:
    """The states of the tokens that are no padding (tokens, width), in float64 on the CPU."""
    plain = states.detach().double().cpu()
    return plain.flatten(0, 1) if there is None else plain[there]


def _states(model: nn.Module, path: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """What each layer of a stack returns in a forward pass, if that is (samples, tokens, width)."""
    layers = list(model.get_submodule(path).children())
    found: dict[int, torch.Tensor] = {}
    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.enter_context(_hooked(layer, partial(found.__setitem__, index)))
        model(**inputs)
    return [found[index] for index in sorted(found) if found[index].dim() == 3]


@contextlib.contextmanager
def _hooked(layer: nn.Module, keep: Callable[[torch.Tensor], None]) -> Iterator[None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
