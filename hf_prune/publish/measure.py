"""Measurements for a card: the cost of a forward pass, hardware, versions and emissions."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..config.checks import is_number
from ..structure.live_bytes import LiveBytes
from ..structure.timing import processor_name, time_in_turns
from .record import Emissions, Hardware, PassCost


def versions(names: Sequence[str] = ("hf-prune", "transformers", "torch", "accelerate", "datasets")) -> dict[str, str]:
    """The versions of Python and of installed packages."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: torch.device, processes: int = 1) -> Hardware:
    """The machine that this process runs on, and the accelerator if `device` is one."""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if accelerator is None and device.type != "cpu":
        accelerator = device.type
    return Hardware(
        processor=processor_name(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        accelerator=accelerator,
        processes=processes,
    )


def measure_costs(
    models: Sequence[nn.Module],
    forwards: Sequence[Callable[[], Any]],
    passes: int = 20,
    seconds: float = 5.0,
) -> tuple[list[PassCost], int]:
    """What the forward pass of each of several models costs, and how often each was timed, in turns.

    Each is called once beforehand, to count its operations and memory; none is timed again after `seconds`.
    """
    counted = [count_pass(model, forward) for model, forward in zip(models, forwards, strict=True)]
    costs = []
    times = time_in_turns(forwards, passes, seconds)
    for taken, (flops, memory_bytes) in zip(times, counted, strict=True):
        low, median, high = quartiles(taken)
        costs.append(PassCost(seconds=median, quartiles=[low, high], flops=flops, memory_bytes=memory_bytes))
    return costs, len(times[-1])


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile, between values where they fall between two."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def count_pass(model: nn.Module, forward: Callable[[], Any]) -> tuple[int, int | None]:
    """The floating-point operations of a forward pass of a model, as torch's FlopCounterMode counts them, and memory.

    Memory is the bytes of the parameters and buffers, and the most that the pass held beside them at a time. It is
    counted in tensors on a CPU, without what kernels need inside; on a CUDA device it is what the allocator gave out;
    None on other accelerators.
    """
    tensors = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    device = tensors[0].device if tensors else torch.device("cpu")
    with FlopCounterMode(display=False) as counter:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            forward()
            peak: int | None = torch.cuda.max_memory_allocated(device) - before
        elif device.type == "cpu":
            held = LiveBytes(tensors)
            with held.watching():
                forward()
            peak = held.peak
        else:
            forward()
            peak = None
    return counter.get_total_flops(), None if peak is None else sum(own.values()) + peak


def input_shapes(batch: Mapping[str, Any]) -> dict[str, list[int]]:
    """The shapes of the tensors in a batch, without labels."""
    inputs = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor) and "label" not in name}
    return {name: list(value.shape) for name, value in inputs.items()}


def emissions_of(callbacks: Sequence[Any]) -> Emissions | None:
    """The estimate of codecarbon, if a Trainer's callbacks include that of transformers' `report_to="codecarbon"`."""
    for callback in callbacks:
        data = getattr(getattr(callback, "tracker", None), "final_emissions_data", None)
        if data is not None and is_number(data.emissions):
            return Emissions(
                kilograms=float(data.emissions),
                kilowatt_hours=float(data.energy_consumed),
                country=data.country_name or None,
                seconds=float(data.duration),
            )
    return None
