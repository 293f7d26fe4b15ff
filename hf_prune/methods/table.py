"""All methods by name: criteria, solvers, and `keep`, which only holds existing zeros."""

from .criteria import CRITERIA, Criterion
from .scopes import SCOPES
from .solvers import SOLVERS, Solver


def method_names() -> tuple[str, ...]:
    """The values that `PruningConfig.method` accepts; entries added to the tables are included at once."""
    return (*CRITERIA, *SOLVERS, "keep")


def method_of(name: str) -> Criterion | Solver | None:
    """The entry of a method; None for `keep` and for unknown names."""
    return CRITERIA.get(name) or SOLVERS.get(name)


def words_of(name: str) -> str:
    """What a method prunes, as model cards describe it."""
    entry = method_of(name)
    return "existing zeros kept" if entry is None else entry.words


def reads_of(method: str, scope: str) -> set[str]:
    """What a method and a scope read besides the weights: `inputs`, `gradients`, both or nothing."""
    entries = (method_of(method), SCOPES[scope])
    return {entry.reads for entry in entries if entry is not None and entry.reads is not None}


def needs_a_step(method: str, scope: str) -> bool:
    """Whether a mask update needs an optimizer step before it, in which something is read or remembered."""
    return bool(reads_of(method, scope)) or bool(getattr(method_of(method), "memory", ()))


def remembers_gradients(method: str) -> bool:
    """Whether a method remembers the gradients of every optimizer step."""
    entry = CRITERIA.get(method)
    return entry is not None and bool(entry.memory) and entry.reads == "gradients"
