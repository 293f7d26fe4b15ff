"""YAML as recipes are written in: the scalars of YAML 1.2, no key twice, and the line of every key."""

import re

import yaml


class Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2: `no` and `2:4` are text, `1e-4` is a number and `1e2` a whole one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """As YAML says, and an error for a key that is given twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise DuplicateKeyError(key.start_mark.line + 1, key.value)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class DuplicateKeyError(ValueError):
    """A key given twice in a mapping, with its second line."""

    def __init__(self, line: int, key: str):
        self.line, self.key = line, key
        super().__init__(f"{key} is given twice")


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


def lines_of_keys(node: yaml.Node | None, prefix: tuple = ()) -> dict[tuple, int | None]:
    """The line (from 1) of every key of a YAML document."""
    lines: dict[tuple, int | None] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[(*prefix, key.value)] = key.start_mark.line + 1
            lines.update(lines_of_keys(value, (*prefix, key.value)))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*prefix, index)] = value.start_mark.line + 1
            lines.update(lines_of_keys(value, (*prefix, index)))
    return lines
