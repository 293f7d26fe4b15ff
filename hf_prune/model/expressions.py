"""Expressions that other people wrote: whether they can be matched in a moment."""

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable

from ..errors import TargetError, shown

# How long matching may take: this, and as much again as many expressions and names take that are as they should be.
_SECONDS, _SECONDS_A_MATCH = 2, 5e-6

# An expression such as (a|a)+b takes years for a long name, and nothing stops `re` but the end of its process.
_MATCH_ALL = """
import json, re, sys
expressions, names = json.load(sys.stdin)
print("read", flush=True)
for expression in expressions:
    print(json.dumps(expression), flush=True)
    try:
        matcher = re.compile(expression)
    except (re.error, OverflowError, RecursionError):
        continue
    for name in names:
        matcher.fullmatch(name)
"""


def refuse_slow(field: str, expressions: Iterable[str], names: Collection[str], what: str = "parameter names") -> None:
    """Raise TargetError unless all these expressions can be matched with all the names within two seconds, or some more
    for very many.

    `what` says what the names are. They are matched in an interpreter of their own, which is ended then.
    """
    unlike = [expression for expression in dict.fromkeys(expressions) if not _is_plain(expression)]
    if not unlike:
        return
    seconds = _SECONDS + len(unlike) * len(names) * _SECONDS_A_MATCH
    begun, in_time = _match(json.dumps([unlike, list(names)]).encode(), seconds)
    if not in_time:
        last = json.loads(begun[-1]) if begun else unlike[0]
        raise TargetError(
            field,
            f"expected regular expressions that match {len(names)} {what} within {seconds:.0f} seconds, got "
            f"{shown(last)}, which does not; write it without repetitions inside repetitions",
        )


def _match(content: bytes, seconds: float) -> tuple[list[bytes], bool]:
    """The expressions, as JSON, whose matching has begun, and whether all were matched in time.

    The time begins when the interpreter has started.
    """
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", _MATCH_ALL]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, open(process.stdin.fileno(), "wb", closefd=False) as stdin:
            stdin.write(content)
        process.stdin = None
        process.stdout.readline()
        try:
            begun, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            begun, _ = process.communicate()
        return begun.splitlines(), process.returncode == 0


def _is_plain(expression: str) -> bool:
    """Whether an expression repeats or chooses at most once, and so cannot take long."""
    return len(expression) < 200 and len(re.findall(r"[*+{?|]", expression)) < 2
