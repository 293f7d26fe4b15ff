"""The YAML of recipes: with the scalars of YAML 1.2, the line of every key, and keys that are set twice."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from ..config.safe_yaml import LimitedLoader


class Loader(LimitedLoader):
    """A loader with the scalars of YAML 1.2: `no` and `2:4` are strings, `1e-4` is a float and `1e2` an integer."""


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
