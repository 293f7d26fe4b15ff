"""`package:NAME/PATH`: a file or folder inside an installed Python package."""

import importlib.util
from pathlib import Path

from ..errors import ReportError, nearest_beside

PACKAGE_SCHEME = "package:"


def path_in_package(name: str) -> Path:
    """The path of a `package:NAME/PATH`.

    Raises ReportError for a package that is not installed, or a path that does not exist.
    """
    package, _, inside = name.removeprefix(PACKAGE_SCHEME).partition("/")
    if not all(part.isidentifier() for part in package.split(".")):
        raise ReportError(f"expected package:NAME/PATH with the name of a Python package, got {name!r}")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that this one is part of
        spec = None
    if spec is None or not spec.submodule_search_locations:
        pip_name = package.partition(".")[0].replace("_", "-")
        raise ReportError(f"the Python package {package!r} of {name} is not installed; pip install {pip_name}")
    path = Path(spec.submodule_search_locations[0], inside)
    if not path.exists():
        hint = nearest_beside(path)
        raise ReportError(f"{inside!r} does not exist in the package {package!r}{hint}")
    return path
