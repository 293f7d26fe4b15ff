"""All methods by name: criteria, solvers, and `keep`, which only holds existing zeros."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from ..errors import one_line
from .criteria import CRITERIA, Criterion
from .penalties import PENALTIES
from .reconstructions import RECONSTRUCTIONS
from .schedules import SCHEDULES
from .scopes import SCOPES
from .solvers import SOLVERS, Solver
from .unit_criteria import UNIT_CRITERIA, UnitCriterion

ENTRY_POINTS = "hf_prune.methods"


def find_in_packages(name: Any) -> str | None:
    """Import what installed packages declare under a name that no table has, as entry points of `hf_prune.methods`.

    The imported module adds its entry to a table. Returns why a module cannot be imported, or None.
    """
    tables = (CRITERIA, SOLVERS, UNIT_CRITERIA, SCHEDULES, SCOPES, PENALTIES, RECONSTRUCTIONS)
    if not isinstance(name, str) or name == "keep" or any(name in table for table in tables):
        return None
    for entry in entry_points(group=ENTRY_POINTS, name=name):
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            package = f"the package {entry.dist.name}" if entry.dist is not None else "a package"
            return f"{name!r} is declared by {package} as {entry.value}, which cannot be imported: {one_line(error)}"
    return None


def method_names(structure: str | None = None) -> tuple[str, ...]:
    """The values that `PruningConfig.method` accepts; entries added to the tables are included at once.

    `keep` is none for structures: `hf_prune.shrink` cuts out units that are zero.
    """
    if structure is None:
        return (*CRITERIA, *SOLVERS, "keep")
    return tuple(name for name, entry in UNIT_CRITERIA.items() if structure in (entry.structures or (structure,)))


def method_of(name: str, structure: str | None = None) -> Criterion | Solver | UnitCriterion | None:
    """The entry of a method, for weights or for the units of a structure; None for `keep` and for unknown names."""
    return UNIT_CRITERIA.get(name) if structure else CRITERIA.get(name) or SOLVERS.get(name)


def words_of(name: str, recorded: Mapping[str, str], structure: str | None = None) -> str:
    """What a method prunes, as model cards describe it; `recorded` has the words of methods that no table has."""
    entry = method_of(name, structure)
    if name == "keep":
        return "existing zeros kept"
    words = entry.words if entry is not None else recorded[name]
    return f"{structure}, {words}" if structure else words


def reads_of(method: str, scope: str, structure: str | None = None, reconstruction: str | None = None) -> set[str]:
    """What a configuration reads besides the weights.

    `inputs` and `gradients` for methods and scopes, `similarity` of what layers get and return for methods of
    structures, and `products` of inputs for a reconstruction.
    """
    entries = (method_of(method, structure), SCOPES[scope])
    reads = {entry.reads for entry in entries if entry is not None and entry.reads is not None}
    return reads | ({"products"} if reconstruction is not None else set())


def needs_a_step(method: str, scope: str, structure: str | None = None, reconstruction: str | None = None) -> bool:
    """Whether a mask update needs an optimizer step before it, in which something is read or remembered."""
    remembers = bool(getattr(method_of(method, structure), "memory", ()))
    return remembers or bool(reads_of(method, scope, structure, reconstruction))


def remembers_gradients(method: str, structure: str | None = None) -> bool:
    """Whether a method remembers the gradients of every optimizer step."""
    if structure:
        return "gradients" in reads_of(method, "layer", structure)
    entry = CRITERIA.get(method)
    return entry is not None and bool(entry.memory) and entry.reads == "gradients"
