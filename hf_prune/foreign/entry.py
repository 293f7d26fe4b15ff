"""One undocumented name of another library: why it is needed, when it can go, and the error if it is missing."""

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import IncompatibleVersionError

# The oldest and the newest version of each library that the tests pass with.
KNOWN_VERSIONS = {
    "transformers": ("5.10.2", "5.23.0"),
    "accelerate": ("1.13.0", "1.15.0"),
    "peft": ("0.21.0", "0.21.2"),
    "huggingface_hub": ("1.5.0", "2.4.0"),
    "deepspeed": ("0.19.8", "0.19.8"),
    "torch": ("2.13.0", "2.13.0"),
}


@dataclass(frozen=True)
class Foreign:
    """A name of another library.

    Attributes:
        path: `module:name`, or `module:Class.name` for an attribute of a class or of its instances.
        why: what it is needed for, to follow "needed to".
        until: when it can go.
        call: of a method, the arguments that it is called with here: by position, with `=` by keyword, and `...` for
            whatever else the library passes. None if it is not called.
    """

    path: str
    why: str
    until: str
    call: str | None = None

    @property
    def name(self) -> str:
        """The name without its module."""
        return self.path.partition(":")[2]


def find(entry: Foreign) -> Any:
    """The object that an entry names. Raises IncompatibleVersionError if it does not exist."""
    module, _, name = entry.path.partition(":")
    try:
        found = importlib.import_module(module)
        for one in name.split("."):
            found = getattr(found, one)
    except (ImportError, AttributeError) as error:
        raise incompatible(entry) from error
    return found


def find_in(table: Mapping[str, Foreign], module: str, name: str) -> Any:
    """The object of a table's entry, for the `__getattr__` of a module of this wing: imported when first used."""
    if name not in table:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return find(table[name])


def attribute(owner: Any, entry: Foreign) -> Any:
    """The attribute of an object that an entry names. Raises IncompatibleVersionError if it does not exist."""
    try:
        return getattr(owner, entry.name.rpartition(".")[2])
    except AttributeError as error:
        raise incompatible(entry) from error


def check_method(entry: Foreign, theirs: Any, ours: Any = None) -> None:
    """Raise IncompatibleVersionError if a method cannot be called as we call it, or ours as the library calls theirs.

    Args:
        theirs: the method of this name in a class of the library or of a third library, or None.
        ours: the method that overrides it, or None. It must accept all arguments of theirs.
    """
    if theirs is None:
        raise incompatible(entry)
    signature = inspect.signature(theirs)
    of_library = getattr(theirs, "__module__", "").partition(".")[0] == entry.path.partition(".")[0]
    given = [one.strip() for one in (entry.call or "").split(",") if one.strip()]
    by_position = [name for name in given if name != "..." and not name.endswith("=")]
    by_keyword = [name.removesuffix("=") for name in given if name.endswith("=")]
    bind = signature.bind_partial if "..." in given else signature.bind
    fits = _fits(bind, [None, *by_position], by_keyword)
    taken = [one for one in signature.parameters.values() if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    names = [one.name for one in taken[1:]]
    if of_library:  # a third library may name them differently, and is called by position
        fits = fits and names[: len(by_position)] == by_position
    if ours is not None:
        only_keyword = [one.name for one in taken[1:] if one.kind is one.KEYWORD_ONLY]
        positional = [name for name in names if name not in only_keyword]
        accepts = inspect.signature(ours).bind
        fits = fits and _fits(accepts, [None, *positional], only_keyword)
        if of_library:
            fits = fits and _fits(accepts, [None], names)
    if not fits:
        raise incompatible(entry, f"{entry.name}{signature}")


def _fits(bind: Any, positional: Sequence[Any], keywords: Iterable[str]) -> bool:
    try:
        bind(*positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


def incompatible(entry: Foreign, found: str = "no such name") -> IncompatibleVersionError:
    """The error, in one line: what is needed, what was found, and which versions are known to work."""
    library = entry.path.partition(":")[0].partition(".")[0]
    oldest, newest = KNOWN_VERSIONS[library]
    needed = entry.name if entry.call is None else f"{entry.name}({entry.call})"
    return IncompatibleVersionError(
        f"{library} {importlib.metadata.version(library)}: hf-prune needs {needed} to {entry.why}, found {found}; "
        f"install a version that is known to work: {library}>={oldest},<={newest}"
    )
