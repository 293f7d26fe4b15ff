"""What a model is set to while it is streamed, and set back from afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..foreign.accelerate import without_mixed_precision
from ..foreign.transformers import experts_implementation, set_experts_implementation
from ..model.anatomy import is_experts


@contextmanager
def set_for_streaming(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no cache of past tokens, fused experts one after another (`eager`), no autocast of a Trainer."""
    modes = {name: module.training for name, module in model.named_modules()}
    modules = list(model.modules())
    configs = {id(config): config for module in modules if (config := getattr(module, "config", None)) is not None}
    caches = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", None)]
    of_experts: dict[int, Any] = {id(one.config): one.config for one in modules if is_experts(one) and _has_config(one)}
    before = [(config, experts_implementation(config)) for config in of_experts.values()]
    try:
        model.eval()
        for config, _ in caches:
            config.use_cache = False
        for config, _ in before:
            set_experts_implementation(config, "eager")
        with without_mixed_precision(model):
            yield
    finally:
        for name, module in model.named_modules():  # BigBird makes other modules in a pass: as those around them
            module.training = modes.setdefault(name, modes[name.rpartition(".")[0]])
        for config, use_cache in caches:
            config.use_cache = use_cache
        for config, name in before:
            set_experts_implementation(config, name)


def _has_config(module: nn.Module) -> bool:
    """Whether experts have a configuration that says how they are computed."""
    return experts_implementation(getattr(module, "config", None)) is not None
