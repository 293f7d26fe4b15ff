"""Whether the precision that a recipe asks for is fast on this machine."""

import functools
import time

import torch

from .schema import Recipe

# The rows, the width and the repetitions of the products that are timed, the fastest of which counts.
_ROWS, _WIDTH, _REPETITIONS = 256, 1024, 5

# Slower by less is not told: other programs on the machine may be the reason.
_NOISE = 1.2


@functools.cache
def bfloat16_slowdown() -> float:
    """How many times as long a product of matrices takes in bfloat16 as in float32 on this machine's processor.

    It is measured, in less than a second: processors with instructions for bfloat16 can be slower with it, too.
    """
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    inputs, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    fastest = float("inf")
    with torch.no_grad():
        for _ in range(_REPETITIONS):
            start = time.perf_counter()
            torch.nn.functional.linear(inputs, weight)
            fastest = min(fastest, time.perf_counter() - start)
    return fastest


def changes_to_float32(recipe: Recipe) -> list[str]:
    """The settings of a recipe that asks for bfloat16, `KEY=VALUE`, with which it computes in float32."""
    calibration = recipe.calibration or {}
    changes = {
        "training.bf16=false": bool(recipe.training.get("bf16")),
        "calibration.autocast=null": calibration.get("autocast") == "bfloat16",
    }
    return [change for change, is_asked in changes.items() if is_asked]


def slow_bfloat16(recipe: Recipe) -> str | None:
    """What to change in a recipe that asks for bfloat16 where it is slower than float32; None if it is not."""
    changes = changes_to_float32(recipe)
    if not changes or torch.accelerator.is_available():
        return None
    slowdown = bfloat16_slowdown()
    if slowdown <= _NOISE:
        return None
    return (
        f"On this processor, products of matrices take {slowdown:.1f} times as long in bfloat16 as in float32; "
        f"to compute in float32, add {' '.join(changes)}"
    )
