"""Measurements for a card: latency, hardware, versions and emissions."""

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..config.checks import is_number
from ..structure.timing import processor_name, time_in_turns
from .record import Emissions, Hardware


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


def measure_latency(
    forwards: Sequence[Callable[[], Any]], passes: int = 20, seconds: float = 5.0
) -> tuple[list[float], int]:
    """Median seconds of each of several forward passes, timed in turns, and how often each was timed.

    Each is called once beforehand to warm up; no more are started after `seconds`.
    """
    times = time_in_turns(forwards, passes, seconds)
    return [statistics.median(taken) for taken in times], len(times[-1])


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
