"""Expressions that other people wrote: whether they can be matched in a moment."""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable

from ..errors import TargetError

_SECONDS = 2

# An expression such as (a|a)+b takes years for a long name, and nothing stops `re` but the end of its process.
_MATCH_ALL = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for expression in expressions:
    print(json.dumps(expression), flush=True)
    try:
        matcher = re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        continue
    for name in names:
        matcher.fullmatch(name)
"""


def refuse_slow(field: str, expressions: Iterable[str], names: Collection[str]) -> None:
    """Raise TargetError unless all these expressions can be matched with all the names within two seconds.

    They are matched in an interpreter of their own, which is ended then.
    """
    unlike = [expression for expression in dict.fromkeys(expressions) if not _is_plain(expression)]
    if not unlike:
        return
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH_ALL]
    try:
        done = subprocess.run(
            command, input=json.dumps([unlike, list(names)]).encode(), capture_output=True, timeout=_SECONDS
        )
        begun, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as error:
        begun, failed = error.stdout or b"", True
    if failed:
        last = json.loads(begun.splitlines()[-1]) if begun else unlike[0]
        raise TargetError(
            field,
            f"expected regular expressions that match {len(names)} parameter names within {_SECONDS} seconds, got "
            f"{_shown(last)}, which does not; write it without repetitions inside repetitions",
        )


def _is_plain(expression: str) -> bool:
    """Whether an expression repeats or chooses at most once, and so cannot take long."""
    return len(expression) < 200 and len(re.findall(r"[*+{?|]", expression)) < 2


def _shown(expression: str) -> str:
    return repr(expression if len(expression) <= 100 else f"{expression[:100]}…")
