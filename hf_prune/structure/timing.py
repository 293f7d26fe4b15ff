"""Timing of calls in turns, on a CPU or an accelerator."""

import platform
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def processor_name() -> str:
    """The name of this machine's processor."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def clock_of(device: torch.device) -> Callable[[], float]:
    """The clock to time calls with: on a CPU with one thread, the thread's time, which other programs do not add to."""
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def time_in_turns(
    calls: Sequence[Callable[[], Any]],
    most: int = 20,
    seconds: float = 5.0,
    least: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """The seconds of each of several calls, made in turns: the first of each, the second of each, and so on.

    Every other round is in the opposite order, as what ran before a call decides what is in the caches.

    Each is called once beforehand to warm up. There are `most` rounds, fewer if `seconds` have passed since the
    beginning, but at least `least`. An accelerator is waited for before and after each call.
    """
    times: list[list[float]] = [[] for _ in calls]
    started = time.perf_counter()
    for call in calls:
        call()
    turns = list(zip(calls, times, strict=True))
    while len(times[-1]) < most and (len(times[-1]) < least or time.perf_counter() - started < seconds):
        for call, taken in turns if len(times[-1]) % 2 == 0 else turns[::-1]:
            _wait_for_accelerator()
            start = clock()
            call()
            _wait_for_accelerator()
            taken.append(clock() - start)
    return times


def _wait_for_accelerator() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
