"""Where a model that is not trained lies, beside one that is: a teacher."""

import copy
from collections.abc import Mapping
from typing import Any, cast

from accelerate import Accelerator
from torch import nn


def place_frozen(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Put a model that is not trained where the engine has models: in parts under FSDP2 and ZeRO-3, else whole.

    It is not the accelerator's, so it is in no checkpoint. Every process must call it, once training has begun.
    """
    if accelerator.is_fsdp2:
        from ..foreign.accelerate import fsdp2_prepare_model

        return cast(nn.Module, fsdp2_prepare_model(accelerator, model)).eval()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return _with_zero_three(model, plugin.deepspeed_config)
    return model.to(accelerator.device).eval()


def _with_zero_three(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """A model whose weights ZeRO-3 keeps in parts and puts together for its forward pass, without an optimizer."""
    import deepspeed

    settings = copy.deepcopy(dict(config))
    for training_only in ("optimizer", "scheduler"):
        settings.pop(training_only, None)
    settings["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    engine.eval()
    return cast(nn.Module, engine)
