"""How large two models are and what their answers cost: time, operations, memory and energy."""

import importlib.metadata
import importlib.util
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..publish.explanation import Energy
from ..publish.measure import input_shapes, measure_costs
from ..publish.record import Cost
from .samples import Reader, Row, asked

# How many samples the second batch has at most, and how long a pass of it may take.
_MOST_SAMPLES, _MOST_SECONDS = 32, 2.0

# For how long energy is measured, and for how many samples it is given.
_SECONDS, _SAMPLES = 3.0, 1000


def count_weights(model: nn.Module) -> tuple[int, int, int]:
    """The parameters of a model, how many are not zero, and their bytes; tied ones count once."""
    parameters = list(model.parameters())
    nonzero = sum(int(parameter.detach().count_nonzero()) for parameter in parameters)
    return (
        sum(parameter.numel() for parameter in parameters),
        nonzero,
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )


def costs_of(pruned: Reader, dense: Reader | None, rows: Sequence[Row], dense_rows: Sequence[Row]) -> list[Cost]:
    """What a forward pass costs on the first sample, and on as many of the first 32 as a pass of two seconds can take.

    Both models are timed in turns.
    """
    readers = [(pruned, rows), *([(dense, dense_rows)] if dense is not None else [])]

    def measure(samples: int) -> Cost:
        batches = [reader.inputs(known, range(samples)) for reader, known in readers]
        calls = [partial(reader.model, **batch) for (reader, _), batch in zip(readers, batches, strict=True)]
        costs, passes = measure_costs([reader.model for reader, _ in readers], calls)
        return Cost(
            shapes=input_shapes(batches[0]),
            passes=passes,
            model=costs[0],
            dense=costs[1] if dense is not None else None,
        )

    with asked(*(reader.model for reader, _ in readers)):
        first = measure(1)
        slowest = max(one.seconds for one in (first.model, first.dense) if one is not None)
        samples = min(_MOST_SAMPLES, len(rows), int(_MOST_SECONDS / slowest))
        return [first, measure(samples)] if samples > 1 else [first]


def energy_of(
    pruned: Reader, dense: Reader | None, rows: Sequence[Row], dense_rows: Sequence[Row], batch_size: int
) -> tuple[Energy | None, str | None]:
    """The energy that both models take for 1,000 samples in batches, each measured for three seconds; or why not.

    codecarbon measures it, or estimates it from the load of this process; its tracker for machines without a network
    writes and sends nothing.
    """
    if importlib.util.find_spec("codecarbon") is None:
        return None, "Energy was not measured: codecarbon is not installed."
    samples = min(batch_size, len(rows))
    joules, hardware = [], ""
    with asked(pruned.model, dense.model if dense is not None else None):
        for reader, known in ((pruned, rows), (dense, dense_rows)):
            if reader is not None:
                call = partial(reader.model, **reader.inputs(known, range(samples)))
                call()
                spent, passes, hardware = _tracked(call)
                if not spent:
                    return None, "Energy was not measured: codecarbon found none on this machine."
                joules.append(spent / (passes * samples) * _SAMPLES)
    version = importlib.metadata.version("codecarbon")
    return Energy(
        samples=_SAMPLES,
        pruned=joules[0],
        dense=joules[1] if dense is not None else None,
        method=f"codecarbon {version}, for this process ({hardware}); estimated where the hardware has no counters",
    ), None


def _tracked(call: Callable[[], Any]) -> tuple[float, int, str]:
    """The joules of calls for three seconds, how many calls these were, and the processor."""
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)  # importing it has set another one
    tracker = OfflineEmissionsTracker(
        country_iso_code="USA",  # of the emissions, which are not used
        tracking_mode="process",
        measure_power_secs=1,
        output_methods=[],
        emissions_endpoint=None,
        allow_multiple_runs=True,
        log_level="critical",
    )
    tracker.start()
    begun, passes = time.perf_counter(), 0
    while time.perf_counter() - begun < _SECONDS:
        call()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        passes += 1
    tracker.stop()
    found = getattr(tracker, "final_emissions_data", None)  # codecarbon logs its own errors, and goes on without it
    if found is None:
        return 0.0, passes, ""
    return float(found.energy_consumed) * 3.6e6, passes, found.gpu_model or found.cpu_model
