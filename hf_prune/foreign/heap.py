"""Memory that was freed, given back to the system, where the C library is glibc; elsewhere nothing is done."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# The bytes of a tensor below which `large_tensors_reused` keeps its memory.
REUSED_BELOW = 4 * 1024 * 1024

# Names of mallopt. Memory of `_M_MMAP_THRESHOLD` bytes and more is taken from the system piece by piece, and goes back
# when it is freed; of other memory, what is free at the end of the heap goes back above `_M_TRIM_THRESHOLD` bytes.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGE = 256 * 1024
_HIGHEST = 32 * 1024 * 1024  # up to which glibc raises the first by itself; the second is then twice as high


@contextmanager
def large_tensors_given_back() -> Iterator[None]:
    """While it lasts, the memory of a large tensor goes back to the system at once when it is freed.

    Else it stays in the heap, between tensors that live on, where the next ones often do not fit. A new tensor is
    slower for it: the system clears its pages first.
    """
    with _thresholds(_LARGE, _LARGE):
        yield


@contextmanager
def large_tensors_reused() -> Iterator[None]:
    """While it lasts, memory of tensors below 4 MB that were freed serves the next ones, until it is given back.

    Streams of activations allocate and free such tensors without end: to take each from the system took a quarter of
    the time of pruning at once. `give_back_freed_memory` gives it back.
    """
    with _thresholds(REUSED_BELOW, 2 * _HIGHEST):
        yield


@contextmanager
def _thresholds(mapped: int, trimmed: int) -> Iterator[None]:
    """Two thresholds of glibc, and afterwards those that it comes to by itself in a process that has large tensors."""
    mallopt = _of_c_library("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, mapped)
    mallopt(_M_TRIM_THRESHOLD, trimmed)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _HIGHEST)
        mallopt(_M_TRIM_THRESHOLD, 2 * _HIGHEST)


def give_back_freed_memory() -> None:
    """Return the memory of the heap that was freed to the system, also between tensors that live on."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c_library(name: str) -> Callable[..., Any] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
