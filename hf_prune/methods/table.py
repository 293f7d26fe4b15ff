"""Every method by its name: criteria, solvers, and `keep`, which ranks nothing."""

from .criteria import CRITERIA, Criterion
from .scopes import SCOPES
from .solvers import SOLVERS, Solver


def method_names() -> tuple[str, ...]:
    """What `PruningConfig.method` may be; entries that were added to the tables count at once."""
    return (*CRITERIA, *SOLVERS, "keep")


def method_of(name: str) -> Criterion | Solver | None:
    """The entry of a method; None for `keep`, and for a name that is in no table."""
    return CRITERIA.get(name) or SOLVERS.get(name)


def words_of(name: str) -> str:
    """What a method prunes, as a card says it."""
    entry = method_of(name)
    return "the zeros that were there kept" if entry is None else entry.words


def reads_of(method: str, scope: str) -> set[str]:
    """What a method and a scope read beside the weights: `inputs`, `gradients`, both or nothing."""
    entries = (method_of(method), SCOPES[scope])
    return {entry.reads for entry in entries if entry is not None and entry.reads is not None}


def needs_a_step(method: str, scope: str) -> bool:
    """Whether a mask update needs an optimizer step before it, for what it reads or remembers."""
    return bool(reads_of(method, scope)) or bool(getattr(method_of(method), "memory", ()))
