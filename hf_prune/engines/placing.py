"""Placing a frozen model, such as a teacher, on devices beside the model that is trained."""

import copy
from collections.abc import Mapping
from typing import Any, cast

from accelerate import Accelerator
from torch import nn


def place_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Place a frozen model as the engine places models: sharded with FSDP2 and ZeRO-3, otherwise whole.

    The accelerator does not save it in checkpoints. Every process must call it, after training has begun.
    """
    if accelerator.is_fsdp2:
        from ..foreign.accelerate import fsdp2_prepare_model

        return cast(nn.Module, fsdp2_prepare_model(accelerator, model)).eval()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return _with_zero_three(model, plugin.deepspeed_config)
    return model.to(accelerator.device).eval()


def _with_zero_three(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A model, without an optimizer, whose weights ZeRO-3 shards and gathers for its forward pass."""
    import deepspeed

    settings = copy.deepcopy(dict(config))
    for training_only in ("optimizer", "scheduler"):
        settings.pop(training_only, None)
    settings["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return cast(nn.Module, engine)
