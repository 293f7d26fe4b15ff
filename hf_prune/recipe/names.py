"""Names of models and data in a recipe: paths, Hub names and `package:NAME/PATH`."""

import importlib.util
from pathlib import Path

from ..errors import RecipeError, nearest_beside

_PACKAGE_SCHEME = "package:"


def resolve_name(key: str, name: str) -> str:
    """The Hub name or existing path for a name in a recipe; `package:NAME/PATH` is a path in an installed package.

    Raises RecipeError, naming `key`, for a package that is not installed or a path that does not exist.
    """
    if name.startswith(_PACKAGE_SCHEME):
        return str(_path_in_package(key, name))
    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(path.suffix in _DATA_FILES)
    if looks_like_path and not path.exists():
        raise RecipeError(key, f"expected a file or folder, found nothing at {name!r}{nearest_beside(path)}")
    return str(path) if path.exists() else name


def _path_in_package(key: str, name: str) -> Path:
    package, _, inside = name.removeprefix(_PACKAGE_SCHEME).partition("/")
    if not all(part.isidentifier() for part in package.split(".")):
        raise RecipeError(key, f"expected package:NAME/PATH with the name of a Python package, got {name!r}")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that this one is part of
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.partition(".")[0].replace("_", "-")
        raise RecipeError(key, f"the Python package {package!r} of {name} is not installed; pip install {pip_name}")
    path = Path(spec.submodule_search_locations[0], inside)
    if not path.exists():
        hint = nearest_beside(path)
        raise RecipeError(key, f"{inside!r} does not exist in the package {package!r}{hint}")
    return path


def package_of(name: str) -> str | None:
    """The package of a `package:NAME/PATH`, with its version, as cards name it; None for another name."""
    if not name.startswith(_PACKAGE_SCHEME):
        return None
    package = name.removeprefix(_PACKAGE_SCHEME).partition("/")[0]
    return f"{package} (Python package, version {package_version(package)})"


def package_version(package: str) -> str | None:
    """The version of the distribution that an importable package belongs to, or None if it is unknown."""
    names = importlib.metadata.packages_distributions().get(package.partition(".")[0], [])
    return importlib.metadata.version(names[0]) if names else None


_DATA_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def data_format(path: str) -> str | None:
    """The `datasets` builder for a file, by its suffix; None for an unknown suffix."""
    return _DATA_FILES.get(Path(path).suffix)
