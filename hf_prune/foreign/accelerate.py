"""What accelerate does not document."""

from collections.abc import Callable
from typing import Any

from .entry import Foreign, find_in

NAMES: dict[str, Foreign] = {
    "fsdp2_prepare_model": Foreign(
        "accelerate.utils.fsdp_utils:fsdp2_prepare_model",
        "shard a teacher as the model is",
        "when Accelerator.prepare_model can leave a model out of its checkpoints",
    ),
    "DeepSpeedOptimizerWrapper": Foreign(
        "accelerate.utils.deepspeed:DeepSpeedOptimizerWrapper",
        "know that DeepSpeed trains",
        "when an optimizer says so",
    ),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


def forward_of(model: Any) -> Callable[..., Any]:
    """A model's forward pass without the mixed precision that accelerate puts around it.

    It can go when accelerate takes the mixed precision off and on again. Where the name is gone, the latency that is
    measured is that of mixed precision: `tests/test_foreign.py` looks.
    """
    return getattr(model, "_original_forward", model)
