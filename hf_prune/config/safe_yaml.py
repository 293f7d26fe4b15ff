"""Reading YAML that may be broken or hostile: limits on what a document becomes, checked before it is constructed."""

from typing import Any

import yaml

from .safe_json import DEEPEST, LARGEST

# Characters of a document; PyYAML reads about a hundred thousand a second.
LONGEST = 200_000

# Values that aliases may add to a document: each `*name` adds all the values below its anchor again.
MOST_REPEATED = 100_000

_NO_VALUE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # of PyYAML's own constructors


class LimitedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses what would take long or much memory; every refusal is a yaml.YAMLError.

    It refuses documents of more than 200,000 characters, values nested deeper than 100 levels, values that contain
    themselves, aliases that repeat more than 100,000 values, lists and mappings as keys, whole numbers beyond what a
    float can hold, and what a tag does not allow.
    """

    def __init__(self, stream: str):
        if len(stream) > LONGEST:
            raise yaml.YAMLError(f"found more than {LONGEST:,} characters")
        super().__init__(stream)
        self._open: list[str | None] = []  # the anchors of the values that are being composed, from the outermost
        self._sizes: dict[str | None, int] = {}  # anchor -> number of values, those of aliases included
        self._composed = self._repeated = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one value of the document, within the limits."""
        event = self.peek_event()
        before = self._composed
        if isinstance(event, yaml.AliasEvent):
            size = self._sizes.get(event.anchor, 0)
            self._composed, self._repeated = self._composed + size, self._repeated + size
        if isinstance(event, yaml.AliasEvent) and event.anchor in self._open:
            problem: str | None = "found a value that contains itself"
        elif self._repeated > MOST_REPEATED:
            problem = f"found aliases that repeat more than {MOST_REPEATED:,} values"
        elif len(self._open) == DEEPEST:
            problem = f"found more than {DEEPEST} levels of nesting"
        else:
            problem = None
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self._open.append(event.anchor)
        node = super().compose_node(parent, index)
        self._open.pop()
        self._composed += 1
        if not isinstance(event, yaml.AliasEvent) and event.anchor is not None:
            self._sizes[event.anchor] = self._composed - before
        if isinstance(parent, yaml.MappingNode) and index is None and not isinstance(node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="found a list or a mapping as a key, which must be a name", problem_mark=event.start_mark
            )
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct one value, with its place in the error for one that its type does not allow."""
        try:
            value = super().construct_object(node, deep)
        except _NO_VALUE as error:
            raise self._no_value(node) from error
        if isinstance(value, int) and abs(value) > LARGEST:
            raise self._no_value(node)
        return value

    def _no_value(self, node: yaml.Node) -> yaml.MarkedYAMLError:
        kind = node.tag.rpartition(":")[2]
        shown = f"{node.value[:40]!r}" if isinstance(node, yaml.ScalarNode) else "a list or a mapping"
        return yaml.MarkedYAMLError(
            problem=f"found {shown}, which cannot be read as {kind}", problem_mark=node.start_mark
        )
