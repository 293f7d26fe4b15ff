"""Code that runs when a module of another library is imported: `import hf_prune` itself imports none."""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The module that has the table of quantisations, with documented functions to add to it.
QUANTIZERS = "transformers.quantizers.auto"


def when_imported(name: str, act: Callable[[ModuleType], None]) -> None:
    """Call `act` with a module when it has been imported, or now if it was."""
    if name in sys.modules:
        act(sys.modules[name])
    else:
        sys.meta_path.insert(0, _Finder(name, act))


class _Finder:
    """Waits in `sys.meta_path` for the import of the module, and leaves when it comes."""

    def __init__(self, name: str, act: Callable[[ModuleType], None]):
        self._name, self._act = name, act

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """The module's own spec, whose loader calls the function afterwards; None for all other modules."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        load, act = spec.loader.exec_module, self._act

        def load_and_act(module: ModuleType) -> None:
            load(module)
            act(module)

        # The loader is this module's own, made for this import: nothing else loads through the changed method.
        spec.loader.exec_module = load_and_act  # type: ignore[method-assign]
        return spec
