"""Where the tensors of paused forward passes wait: off the model's device, in memory of the CPU or in a file."""

import ctypes
import os
import tempfile
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CalibrationError, one_line
from ..foreign.torch import changes_arguments


class Store(Protocol):
    """Keeps bytes, given as one-dimensional uint8 tensors of any device."""

    def write(self, content: torch.Tensor) -> Any:
        """Keep the bytes, and return where they are."""

    def read(self, place: Any, into: torch.Tensor) -> None:
        """Fill a tensor with the bytes of a place."""

    def free(self, place: Any) -> None:
        """The bytes of a place are not needed any more."""

    def close(self) -> None:
        """Nothing is needed any more."""


class CpuStore:
    """Memory of the CPU; page-locked for what comes from a CUDA device, which copies it faster."""

    def write(self, content: torch.Tensor) -> torch.Tensor:
        """Keep the bytes, and return where they are."""
        kept = torch.empty(len(content), dtype=torch.uint8, pin_memory=content.device.type == "cuda")
        return kept.copy_(content)

    def read(self, place: torch.Tensor, into: torch.Tensor) -> None:
        """Fill a tensor with the bytes of a place."""
        into.copy_(place)

    def free(self, place: torch.Tensor) -> None:
        """The memory goes with its last reference."""

    def close(self) -> None:
        """The memory goes with its last reference."""


class DiskStore:
    """An unnamed file in a folder, which the system removes with the process, however this ends.

    Places are used again for contents of the same size.
    """

    def __init__(self, folder: Path | None = None):
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed by `close`
        self._free: dict[int, list[int]] = {}  # size -> offsets
        self._end = 0

    def write(self, content: torch.Tensor) -> tuple[int, int]:
        """Keep the bytes, and return where they are.

        Raises CalibrationError where the disk does not take them.
        """
        content = content.cpu()
        size = len(content)
        offset = self._free[size].pop() if self._free.get(size) else self._end
        self._end = max(self._end, offset + size)
        rest = _memory_of(content)
        try:
            while rest:
                rest = rest[os.pwrite(self._file.fileno(), rest, offset + size - len(rest)) :]
        except OSError as error:
            raise CalibrationError(
                "offload",
                f"expected a disk at {self._folder} that takes the tensors of the paused forward passes, got, after "
                f"{offset:,} bytes: {one_line(error)}; make room, or calibrate with fewer samples",
            ) from error
        return offset, size

    def read(self, place: tuple[int, int], into: torch.Tensor) -> None:
        """Fill a tensor with the bytes of a place."""
        offset, size = place
        content = into if into.device.type == "cpu" else torch.empty(size, dtype=torch.uint8)
        rest = _memory_of(content)
        while rest:
            rest = rest[os.preadv(self._file.fileno(), [rest], offset + size - len(rest)) :]
        if content is not into:
            into.copy_(content)

    def free(self, place: tuple[int, int]) -> None:
        """The bytes of a place are not needed any more."""
        self._free.setdefault(place[1], []).append(place[0])

    def close(self) -> None:
        """Remove the file."""
        self._file.close()


class _Kept:
    """What is known of a storage that a pass has made.

    Attributes:
        owner: the pass.
        is_shared: whether another pass has used it.
        size: its bytes.
        place: where the store has them, if it does; they may be in the storage, too.
        is_away: whether they are in the store alone.
    """

    def __init__(self, owner: object):
        self.owner = owner
        self.is_shared = False
        self.size = 0
        self.place: Any = None
        self.is_away = False


class Offload:
    """Moves what a paused pass alone holds into a store, and back before it goes on.

    That is, the storages that operations of the pass have made, and that no other pass has used. They shrink to no
    bytes, and get theirs back: all tensors and views of a storage stay what they are. What is in memory of the CPU is
    written once, until an operation changes it. (On accelerators, a kernel may change what no operation is seen to.)
    """

    def __init__(self, store: Store):
        self._store = store
        self._known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # storage -> _Kept; None: not made by a pass
        self._made: dict[object, WeakIdKeyDictionary] = {}  # pass -> {storage: _Kept}

    def watching(self, owner: object) -> AbstractContextManager[Any]:
        """A context for the thread of a pass, in which what its operations make is noted."""
        return _Watching(self, owner)

    def put_away(self, owner: object) -> None:
        """Move what a pass holds into the store."""
        for storage, kept in list(self._made.get(owner, {}).items()):
            if not kept.is_shared and not kept.is_away and storage.resizable() and storage.nbytes():
                if kept.place is None or kept.size != storage.nbytes():
                    self._free(kept)
                    kept.size = storage.nbytes()
                    kept.place = self._store.write(_bytes_of(storage))
                storage.resize_(0)
                kept.is_away = True

    def bring_back(self, owner: object) -> None:
        """Move what a pass holds back."""
        for storage, kept in list(self._made.get(owner, {}).items()):
            self._bring(storage, kept)

    def forget(self, owner: object) -> None:
        """The pass is over: what it has made and is still there is not its own any more."""
        self.bring_back(owner)
        for kept in self._made.pop(owner, {}).values():
            self._free(kept)

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor; where its storage is in the store, a copy, which leaves it there."""
        kept = self._known.get(tensor.untyped_storage())
        if kept is None or not kept.is_away:
            return tensor
        content = torch.empty(kept.size, dtype=torch.uint8, device=tensor.device)
        self._store.read(kept.place, content)
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return copy.set_(content.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def end(self) -> None:
        """Move back whatever is still alive, and close the store."""
        for owner in list(self._made):
            self.forget(owner)
        self._store.close()

    def used(self, storage: torch.UntypedStorage, owner: object, changed: bool) -> None:
        """Note that an operation of a pass is given a storage, which it may change.

        One that another pass has made stays from now on.
        """
        kept = self._known.setdefault(storage)
        if kept is not None and kept.owner is not owner:
            kept.is_shared = True
        if kept is not None:
            self._bring(storage, kept)
            if changed:
                self._free(kept)

    def made(self, storage: torch.UntypedStorage, owner: object) -> None:
        """Note a storage that an operation of a pass returns, unless it is known."""
        if storage not in self._known:
            kept = _Kept(owner)
            self._known[storage] = kept
            self._made.setdefault(owner, WeakIdKeyDictionary())[storage] = kept
            weakref.finalize(storage, self._free, kept).atexit = False

    def _bring(self, storage: torch.UntypedStorage, kept: _Kept) -> None:
        if kept.is_away:
            storage.resize_(kept.size)
            self._store.read(kept.place, _bytes_of(storage))
            kept.is_away = False
            if storage.device.type != "cpu":
                self._free(kept)

    def _free(self, kept: _Kept) -> None:
        if kept.place is not None:
            self._store.free(kept.place)
            kept.place = None


class _Watching(TorchDispatchMode):
    def __init__(self, offload: Offload, owner: object):
        super().__init__()
        self._offload = offload
        self._owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        changed = changes_arguments(func)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._offload.used(tensor.untyped_storage(), self._owner, changed)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._offload.made(tensor.untyped_storage(), self._owner)
        return result


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(content: torch.Tensor) -> memoryview:
    """The memory of a CPU tensor of bytes. (That of `numpy()` would forbid its storage to shrink.)"""
    return memoryview((ctypes.c_char * len(content)).from_address(content.data_ptr())).cast("B")
