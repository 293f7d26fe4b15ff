"""Configurations of transformers with other values in some layers (`per_layer_config`, since 5.15): noticed when made.

Nothing here imports transformers: `import hf_prune` costs no more, and nor do configurations without such values.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The module of `HeterogeneousConfigMixin`, a base class of all configurations; older versions have none.
_MODULE = "transformers.integrations.heterogeneity.configuration_utils"


def when_layers_differ(act: Callable[[Any], None]) -> None:
    """Call `act` with each configuration that gets a `per_layer_config`, from now on, in this process.

    The property is wrapped when transformers is imported, or now if it was.
    """
    if _MODULE in sys.modules:
        _watch(sys.modules[_MODULE], act)
    else:
        sys.meta_path.insert(0, _Finder(act))


def _watch(module: ModuleType, act: Callable[[Any], None]) -> None:
    """Wrap the property. It is documented; that all configurations share it is not: without it, nothing is noticed."""
    given = getattr(getattr(module, "HeterogeneousConfigMixin", None), "per_layer_config", None)
    if not isinstance(given, property) or given.fset is None:
        return
    setter = given.fset

    def set_and_act(config: Any, per_layer_config: Any) -> None:
        setter(config, per_layer_config)
        if per_layer_config:
            act(config)

    module.HeterogeneousConfigMixin.per_layer_config = given.setter(set_and_act)


class _Finder:
    """Waits in `sys.meta_path` for the import of the module, and leaves when it comes."""

    def __init__(self, act: Callable[[Any], None]):
        self._act = act

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The module's own spec, whose loader wraps the property afterwards; None for all other modules."""
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load, act = spec.loader.exec_module, self._act

        def load_and_watch(module: ModuleType) -> None:
            load(module)
            _watch(module, act)

        spec.loader.exec_module = load_and_watch  # type: ignore[method-assign]
        return spec
