"""The recipes that come with the package, and templates made from them."""

import re
from pathlib import Path

from ..config.checks import expected_one_of
from ..errors import RecipeError, nearest

# In an installed package they lie inside it; in a checkout, beside it.
_FOLDERS = (Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes")

# The recipe that a task's template is made of.
TEMPLATES = {
    "text-classification": "quickstart",
    "text-generation": "generation",
    "summarization": "summarization",
}


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = next((folder for folder in _FOLDERS if folder.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder is not None else {}


def summary(path: Path) -> str:
    """The description of a recipe: its first line."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def find_recipe(name: str) -> Path:
    """The file of a recipe: a path, or if there is no such file the name of a shipped recipe.

    Raises RecipeError, with the nearest name as a hint, if it is neither.
    """
    path, shipped = Path(name), shipped_recipes()
    if path.suffix or path.is_file():
        return path
    if name not in shipped and not path.exists():
        raise RecipeError(
            name, f"no such file; expected a recipe file or one of {', '.join(shipped)}{nearest(name, shipped)}"
        )
    return shipped.get(name, path)


def template(task: str) -> str:
    """A commented recipe for a task, with public names of model and data. Raises RecipeError for an unknown task."""
    if task not in TEMPLATES:
        raise RecipeError("task", expected_one_of(task, TEMPLATES))
    recipes = shipped_recipes()
    if TEMPLATES[task] not in recipes:
        raise RecipeError("recipes", f"{TEMPLATES[task]}.yaml is missing in the package; reinstall hf-prune")
    lines = recipes[TEMPLATES[task]].read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if not line.startswith("# Run it:") and "# of the package" not in line]
    with_names = [re.sub(r"package:\S+( +)# with a network: (\S+)", r"\2", line) for line in kept]
    return "\n".join(line for line in with_names if "the package's model" not in line) + "\n"
