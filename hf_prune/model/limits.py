"""Limits on the sizes of models that are built: a configuration that asks for more is a mistake, or hostile."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

# Fields of a configuration that say how often something is built, and the most that is believed: the largest models of
# today have some hundred layers, and each takes a millisecond.
_REPEATED = re.compile(r".*(layers?|depths?|blocks|stages)")
_MOST_LAYERS, _MOST_LABELS, _MOST_MODULES = 2000, 1_000_000, 200_000


def too_large(content: Any, name: str = "") -> str | None:
    """Which field of a configuration, as in config.json, asks for more than is built; None if none does."""
    if isinstance(content, dict):
        found = (too_large(value, str(key)) for key, value in content.items())
        return next(filter(None, found), None)
    if isinstance(content, list):
        return next(filter(None, (too_large(value, name) for value in content)), None)
    most = _MOST_LABELS if name == "num_labels" else _MOST_LAYERS if _REPEATED.fullmatch(name) else None
    if most is None or not isinstance(content, int) or content <= most:
        return None
    return f"expected {name} of at most {most:,}, got {content:,}"


@contextmanager
def few_modules() -> Iterator[None]:
    """Raise ValueError once more than 200,000 modules are put together here."""
    number = 0

    def count(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal number
        number += 1
        if number > _MOST_MODULES:
            raise ValueError(f"expected at most {_MOST_MODULES:,} modules, got more")

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
