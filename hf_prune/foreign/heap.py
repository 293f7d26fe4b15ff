"""Memory that was freed, given back to the system, where the C library is glibc; elsewhere nothing is done."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# mallopt(M_MMAP_THRESHOLD, bytes): memory of this size and more is taken from the system piece by piece.
_M_MMAP_THRESHOLD = -3
_OF_STREAMS = 256 * 1024
_HIGHEST = 32 * 1024 * 1024  # up to which glibc raises the threshold by itself


@contextmanager
def large_tensors_given_back() -> Iterator[None]:
    """While it lasts, the memory of a large tensor goes back to the system at once when it is freed.

    Else it stays in the heap, between tensors that live on, where the next ones often do not fit: without this, a
    process that prunes at once was seen to take 1.8 times the memory that its tensors need. Afterwards the threshold is
    the one that glibc comes to by itself in a process that has had large tensors.
    """
    mallopt = _of_c_library("mallopt")
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _OF_STREAMS)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, _HIGHEST)


def give_back_freed_memory() -> None:
    """Return the memory of small tensors and objects that were freed to the system."""
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def _of_c_library(name: str) -> Callable[..., Any] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)
