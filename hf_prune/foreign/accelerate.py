"""Undocumented names of accelerate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .entry import Foreign, find_in

NAMES: dict[str, Foreign] = {
    "fsdp2_prepare_model": Foreign(
        "accelerate.utils.fsdp_utils:fsdp2_prepare_model",
        "shard a teacher like the model",
        "when Accelerator.prepare_model can leave a model out of its checkpoints",
    ),
    "DeepSpeedOptimizerWrapper": Foreign(
        "accelerate.utils.deepspeed:DeepSpeedOptimizerWrapper",
        "detect training with DeepSpeed",
        "when an optimizer says so",
    ),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


def forward_of(model: Any) -> Callable[..., Any]:
    """A model's forward pass without the mixed precision that accelerate puts around it.

    It can go when accelerate can remove and restore the mixed precision. If the attribute is missing, latency is
    measured with mixed precision; `tests/foreign/test_foreign.py` checks that it exists.
    """
    return getattr(model, "_original_forward", model)


@contextmanager
def without_mixed_precision(model: Any) -> Iterator[None]:
    """While it lasts, a model that accelerate has prepared computes in the precision of its weights.

    A Trainer with `bf16=True` leaves its autocast around the model's `forward`, also when it has finished. It can go
    with `forward_of`.
    """
    wrapped, original = vars(model).get("forward"), vars(model).get("_original_forward")
    if wrapped is None or original is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped
