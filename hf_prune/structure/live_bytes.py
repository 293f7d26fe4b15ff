"""The bytes of the tensors that operations make, while they live."""

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveBytes:
    """Counts the bytes of all storages that were made in contexts of `watching` and are still alive.

    Storages that were made before, such as weights and inputs, are not counted; `known` are some of them.

    Args:
        known: tensors that are not counted.
        below: count only storages of fewer bytes; None: all.

    Attributes:
        now: bytes that are alive.
        peak: the most that were alive at once since it was last set.
    """

    def __init__(self, known: Iterable[torch.Tensor] = (), below: int | None = None):
        self._below = below
        self.now = 0
        self.peak = 0
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for tensor in known:
            self.ignore(tensor)

    def watching(self) -> AbstractContextManager[Any]:
        """A context for one thread, in which what operations return is counted."""
        return _Watching(self)

    def ignore(self, tensor: torch.Tensor) -> None:
        """Do not count a tensor's storage, unless it is counted already."""
        self._known.setdefault(tensor.untyped_storage())

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known[storage] = None
            if self._below is not None and storage.nbytes() >= self._below:
                return
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.now -= size


class _Watching(TorchDispatchMode):
    def __init__(self, live: LiveBytes):
        super().__init__()
        self._live = live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._live.ignore(tensor)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._live.add(tensor)
        return result
