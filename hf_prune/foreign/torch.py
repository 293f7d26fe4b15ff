"""Undocumented names of torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .entry import Foreign, attribute, find_in

_UNTIL = "when torch can run an operation in another thread as in the one that called it"

NAMES: dict[str, Foreign] = {
    name: Foreign(f"torch:_C.{name}", "run the operations of all forward passes in one thread", _UNTIL)
    for name in (
        "_dispatch_tls_local_include_set",
        "_dispatch_tls_local_exclude_set",
        "_ForceDispatchKeyGuard",
    )
}

SCHEMA = Foreign(
    "torch:OpOverload._schema",
    "write what a paused forward pass holds unchanged to disk once",
    "when torch documents which operations change what they are given",
)


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


def changes_arguments(operation: Any) -> bool:
    """Whether an operation, as `__torch_dispatch__` gets it, may change tensors that it is given."""
    return bool(attribute(operation, SCHEMA).is_mutable)


def dispatch_state() -> tuple[Any, Any]:
    """What decides, in this thread, which kernels run: such as those of autograd and autocast."""
    return (
        find_in(NAMES, __name__, "_dispatch_tls_local_include_set")(),
        find_in(NAMES, __name__, "_dispatch_tls_local_exclude_set")(),
    )


@contextmanager
def with_dispatch_state(state: tuple[Any, Any]) -> Iterator[None]:
    """That of another thread, in this one, while it lasts."""
    with find_in(NAMES, __name__, "_ForceDispatchKeyGuard")(*state):
        yield
