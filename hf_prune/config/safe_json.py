"""Reading JSON that may be broken or hostile: within limits, and with one kind of error."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Levels of nesting. What nests deeper is no file of a model, and code that follows it would end in a RecursionError.
DEEPEST = 100

# Whole numbers beyond this are none that a file of a model has, and cannot be converted to floats.
LARGEST = 1e308


def read_json(path: Path, finite: bool = True) -> Any:
    """The content of a JSON file.

    Raises FileNotFoundError if there is none, and otherwise ValueError with the reason: a file that cannot be read, is
    not JSON in UTF-8, or that `parse_json` refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError("it is a folder" if path.is_dir() else f"it cannot be read: {error.strerror}") from error
    return parse_json(text, finite)


def read_versioned(path: Path, version: int) -> Any:
    """The content of a JSON file of one of our formats; None if there is no file.

    Raises what `read_json` does, and ValueError, KeyError or TypeError for another `format_version`, or none.
    """
    if not path.exists():
        return None
    content = read_json(path)
    if content["format_version"] != version:
        raise ValueError(f"format_version {content['format_version']!r}")
    return content


def write_or_remove(path: Path, content: Mapping[str, Any] | None) -> None:
    """Write a JSON file; without content, remove one that is there."""
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_object(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is none, it cannot be used, or it is not an object. Allows NaN."""
    try:
        content = read_json(path, finite=False)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parse_json(text: str, finite: bool = True) -> Any:
    """The content of a JSON document.

    Raises ValueError with the reason for what is not JSON, nests deeper than 100 levels, has a whole number beyond what
    a float can hold, or text that UTF-8 cannot; and with `finite`, for NaN and infinite numbers.
    """
    constant, number = (_refuse, _finite) if finite else (None, None)
    try:
        content = json.loads(text, parse_int=_whole, parse_constant=constant, parse_float=number)
    except RecursionError as error:
        raise ValueError(f"expected at most {DEEPEST} levels of nesting") from error
    level = [content]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
    if level:
        raise ValueError(f"expected at most {DEEPEST} levels of nesting")
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()  # ValueError for half of a pair of surrogates
    return content


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _whole(digits: str) -> int:
    if len(digits) > 310 or abs(int(digits)) > LARGEST:
        raise ValueError(f"expected whole numbers up to {LARGEST:.0e}, got one of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _refuse(constant: str) -> Any:
    raise ValueError(f"expected finite numbers, got {constant}")
