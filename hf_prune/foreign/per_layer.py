"""Configurations of transformers with other values in some layers (`per_layer_config`, since 5.15): noticed when made.

Nothing here imports transformers: `import hf_prune` costs no more, and nor do configurations without such values.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

from .late import when_imported

# The module of `HeterogeneousConfigMixin`, a base class of all configurations; older versions have none.
_MODULE = "transformers.integrations.heterogeneity.configuration_utils"

# As what the Trainer reads the configuration of a checkpoint, to learn the version that wrote it. It does not know the
# names that a class has for its fields, such as GPT-2's for the number of layers; the property raises AttributeError.
_BARE = "PreTrainedConfig"


def when_layers_differ(act: Callable[[Any], None]) -> None:
    """Call `act` with each configuration that gets a `per_layer_config`, from now on, in this process.

    The property is wrapped when transformers is imported, or now if it was.
    """
    when_imported(_MODULE, lambda module: _watch(module, act))


def _watch(module: ModuleType, act: Callable[[Any], None]) -> None:
    """Wrap the property. It is documented; that all configurations share it is not: without it, nothing is noticed."""
    given = getattr(getattr(module, "HeterogeneousConfigMixin", None), "per_layer_config", None)
    if not isinstance(given, property) or given.fset is None:
        return
    setter = given.fset

    def set_and_act(config: Any, per_layer_config: Any) -> None:
        if type(config).__name__ == _BARE and not hasattr(config, "num_hidden_layers"):
            return
        setter(config, per_layer_config)
        if per_layer_config:
            act(config)

    module.HeterogeneousConfigMixin.per_layer_config = given.setter(set_and_act)
