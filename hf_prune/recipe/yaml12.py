"""The YAML of recipes: with the scalars of YAML 1.2, the line of every key, and keys that are set twice.

Nothing here loads torch or transformers: the commands refuse a file that does not parse before they do.
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ..config.safe_yaml import LONGEST, LimitedLoader
from ..errors import RecipeError, nearest, one_line


class Loader(LimitedLoader):
    """A loader with the scalars of YAML 1.2: `no` and `2:4` are strings, `1e-4` is a float and `1e2` an integer."""


def read_recipe(path: Path) -> tuple[dict[Any, Any], dict[tuple, int | None], list[tuple]]:
    """What `parse` makes of a recipe's file. Raises RecipeError for a file that is not a mapping in YAML."""
    text = _read(path)
    try:
        content, lines, repeated = parse(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark if isinstance(error, yaml.MarkedYAMLError) else None
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        why = error.problem if isinstance(error, yaml.MarkedYAMLError) else one_line(error)
        raise RecipeError(f"expected YAML, got a file that does not parse: {why}", at=place) from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise RecipeError(f"expected a mapping of settings, got {found}", at=str(path))
    return content, lines, repeated


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except OSError as error:
        siblings = [str(file) for file in sorted(path.parent.glob("*.yaml"))] if path.parent.is_dir() else []
        unreadable = f"a file that cannot be read ({error.strerror})"
        found = "a folder" if path.is_dir() else "nothing" if _is_missing(error) else unreadable
        raise RecipeError(f"expected a recipe, found {found}{nearest(str(path), siblings)}", at=str(path)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"expected YAML in UTF-8, got other bytes ({error})", at=str(path)) from error
    if len(text) > LONGEST:
        raise RecipeError(f"expected a recipe of at most {LONGEST:,} characters, got more", at=str(path))
    return text


def _is_missing(error: OSError) -> bool:
    return isinstance(error, (FileNotFoundError, NotADirectoryError))


def parse(text: str) -> tuple[Any, dict[tuple, int | None], list[tuple]]:
    """The content of a YAML document, the line (from 1) of every key, and the keys that are set more than once.

    The last value of such a key counts. Raises yaml.YAMLError for what does not parse, or is beyond the limits of
    `LimitedLoader`.
    """
    loader = Loader(text)
    node = loader.get_single_node()
    keys = list(_keys(node))
    content = loader.construct_document(node) if node is not None else None
    counts = Counter(key for key, _ in keys)
    return content, dict(keys), [key for key, count in counts.items() if count > 1]


def _number(text: str) -> int | float:
    value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return int(value) if "." not in text and value.is_integer() else value


def _text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    text.encode()  # ValueError for half of a pair of surrogates, which could not be printed
    return text


Loader.add_constructor("tag:yaml.org,2002:str", _text)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$", re.IGNORECASE), list("tTfF"))


Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))


Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: _number(node.value))


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"),
    list("-+.0123456789"),
)


def _keys(node: yaml.Node | None, prefix: tuple = ()) -> Iterator[tuple[tuple, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*prefix, key.value), key.start_mark.line + 1
            yield from _keys(value, (*prefix, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*prefix, index), value.start_mark.line + 1
            yield from _keys(value, (*prefix, index))
