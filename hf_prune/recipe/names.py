"""Names of models and data in a recipe: paths, Hub names and `package:NAME/PATH`."""

import importlib.metadata
from pathlib import Path

from ..errors import RecipeError, ReportError, nearest_beside
from ..saved.packages import PACKAGE_SCHEME, path_in_package


def resolve_name(key: str, name: str) -> str:
    """The Hub name or existing path for a name in a recipe; `package:NAME/PATH` is a path in an installed package.

    Raises RecipeError, naming `key`, for a package that is not installed or a path that does not exist.
    """
    if name.startswith(PACKAGE_SCHEME):
        try:
            return str(path_in_package(name))
        except ReportError as error:
            raise RecipeError(key, str(error)) from error
    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or bool(path.suffix in _DATA_FILES)
    if looks_like_path and not path.exists():
        raise RecipeError(key, f"expected a file or folder, found nothing at {name!r}{nearest_beside(path)}")
    return str(path) if path.exists() else name


def package_of(name: str) -> str | None:
    """The package of a `package:NAME/PATH`, with its version, as cards name it; None for another name."""
    if not name.startswith(PACKAGE_SCHEME):
        return None
    package = name.removeprefix(PACKAGE_SCHEME).partition("/")[0]
    return f"{package} (Python package, version {package_version(package)})"


def package_version(package: str) -> str | None:
    """The version of the distribution that an importable package belongs to, or None if it is unknown."""
    names = importlib.metadata.packages_distributions().get(package.partition(".")[0], [])
    return importlib.metadata.version(names[0]) if names else None


_DATA_FILES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def data_format(path: str) -> str | None:
    """The `datasets` builder for a file, by its suffix; None for an unknown suffix."""
    return _DATA_FILES.get(Path(path).suffix)
