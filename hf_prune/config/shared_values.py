"""Checks of the fields of a `PruningConfig` that say which values weights share."""

from collections.abc import Iterator
from typing import Any

from ..quantise.codebooks import FEWEST_VALUES, MOST_VALUES
from ..quantise.forms import GRANULARITIES, VALUES, parse_granularity, parse_values
from .checks import Problem


def problems_of_sharing(
    value: Any, first: Any, granularity: Any, structure: Any, has_target: bool, adapters: Any
) -> Iterator[Problem]:
    """What is wrong with `shared_values`, `initial_shared_values` and `shared_values_granularity`.

    The others are fields of the same configuration that these do not go with.
    """
    if value is None:
        for name, given in (("initial_shared_values", first), ("shared_values_granularity", granularity)):
            if given is not None:
                yield name, f"must not be set without shared_values, got {given!r}"
        return
    if granularity is not None and parse_granularity(granularity) is None:
        yield "shared_values_granularity", f"expected {GRANULARITIES}, or None, got {granularity!r}"
    values = parse_values(value)
    if values is None:
        yield "shared_values", f"expected {VALUES}, or None, got {value!r}"
    fewest = values if isinstance(values, int) else FEWEST_VALUES
    if first is not None and isinstance(values, str):
        yield "initial_shared_values", f"must not be set with shared_values={values!r}, got {first!r}"
    elif first is not None and (type(first) is not int or not fewest <= first <= MOST_VALUES):
        allowed = f"a whole number from {fewest} (shared_values) to {MOST_VALUES}, or None"
        yield "initial_shared_values", f"expected {allowed}, got {first!r}"
    if values is None:
        return
    beside = "a structure" if structure is not None else "a target" if has_target else None
    if beside is not None:
        other = "add a configuration for single weights, or one with method 'keep'"
        yield "shared_values", f"must not be set with {beside}, got {value!r}; {other}"
    elif adapters in ("sparse_base", "sparse_merge"):
        yield "shared_values", f"must not be set with adapters={adapters!r}, got {value!r}"
