"""In which order a forward pass comes to the matrices of a model."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from .discovery import Discovery
from .layers import Layer

# The number of a matrix in a layer -> what sorts it among all matrices.
Key = Callable[[int], tuple[float, ...]]


def order_of(layers: Sequence[Layer], discovery: Discovery) -> dict[Layer, Key]:
    """Layer -> (part -> key): the keys sort the matrices as the forward pass calls them.

    A layer that was not called comes after the one before it in the model. Experts of a module run one after another,
    with all of their matrices, unless the forward pass was seen to run all experts with one tensor first.
    """
    places: dict[Layer, float] = {}
    for place, (layer, _) in enumerate(discovery.order):
        places.setdefault(layer, place)
    before = -1.0
    for layer in layers:
        before = places.setdefault(layer, before)
    keys: dict[Layer, Key] = {}
    for index, layer in enumerate(layers):
        beside = [other for other in layers if other.kind == "experts" and other.modules[0] is layer.modules[0]]
        if layer.kind == "experts" and not _runs_by_tensor(beside, discovery):
            first = (min(places[other] for other in beside), layers.index(beside[0]))
            keys[layer] = partial(_key_by_expert, first, (places[layer], index))
        else:
            keys[layer] = partial(_key_by_tensor, (places[layer], index))
    return keys


def _key_by_expert(first: tuple[float, int], own: tuple[float, int], part: int) -> tuple[float, ...]:
    return (*first, part, *own)


def _key_by_tensor(own: tuple[float, int], part: int) -> tuple[float, ...]:
    return (*own, part)


def _runs_by_tensor(beside: Sequence[Layer], discovery: Discovery) -> bool:
    """Whether the tensors of an experts' module were called tensor by tensor, for all experts, and not by expert."""
    calls = [layer for layer, _ in discovery.order if layer in beside]
    changes = sum(one is not other for one, other in pairwise(calls))
    return len(calls) > len(set(calls)) == changes + 1
