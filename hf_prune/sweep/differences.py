"""What differs between the state that the folder of a sweep was begun with and another, in words."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

_LONGEST_VALUE = 60


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Each setting that differs between two states (`SweepPlan.state`), with what it was and what it is now."""
    was, now = dict(_settings(there)), dict(_settings(here))
    return [
        f"{key} was {was.get(key, 'not set')} and is now {now.get(key, 'not set')}"
        for key in {**was, **now}
        if was.get(key) != now.get(key)
    ]


def _settings(state: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings of a state by what they are called: those of all points, of trials, and of the recipe's file."""
    for text in state["fixed"]:
        key, _, value = text.partition("=")
        yield f"{key} (for all points)", value
    trials = state["trials"]
    yield "the sweep", "a grid" if trials is None else "one with --trials"
    if trials is not None:
        yield "what trials draw from", _cut(" ".join(trials["space"]))
        yield "--seed", str(trials["seed"])
        yield "--against", trials["against"] or "not set"
    yield from _leaves(state["recipe"])


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """The values of a recipe's file by dotted key."""
    if isinstance(content, dict) and content:
        for name, value in content.items():
            yield from _leaves(value, f"{key}.{name}" if key else name)
    elif isinstance(content, list) and any(isinstance(value, dict) for value in content):
        for index, value in enumerate(content):
            yield from _leaves(value, f"{key}.{index}")
    else:
        yield f"{key} (in the recipe)", _cut(json.dumps(content, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"
