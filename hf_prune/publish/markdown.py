"""Escaping text for Markdown and metadata, so that names cannot break a table, link, heading or block."""

import re
from collections.abc import Mapping
from typing import Any

# Text that is safe in a code span, also in a table.
_PLAIN = re.compile(r"[\w ./:,=+()%'-]+", re.ASCII)

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#&$!@])")


def single_line(value: Any) -> str:
    """The value as text without line breaks, control characters and what UTF-8 cannot encode; spaces are collapsed."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def cleaned(value: Any) -> Any:
    """The same with every text on a single line of printable characters, which YAML and the Hub can hold."""
    if isinstance(value, str):
        return single_line(value)
    if isinstance(value, Mapping):
        return {single_line(key): cleaned(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [cleaned(inner) for inner in value]
    return value


def inline(value: Any) -> str:
    """The value in a line of text, with all special characters of Markdown escaped."""
    escaped = _SPECIAL.sub(r"\\\1", single_line(value))
    # What would start a list, a rule or a heading.
    return re.sub(
        r"^(?:([-+=])|(\d+)([.)])(?=\s|$))", lambda found: f"{found[2] or ''}\\{found[1] or found[3]}", escaped
    )


def code(value: Any) -> str:
    """The value as code, in text or in a cell of a table: a code span, or HTML where that is not safe."""
    text = single_line(value)
    if _PLAIN.fullmatch(text):
        return f"`{text}`"
    escaped = "".join(char if char.isalnum() or char in " -./" else f"&#{ord(char)};" for char in text)
    return f"<code>{escaped}</code>"


def fence(text: str, language: str) -> str:
    """A code block, with a fence longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"
