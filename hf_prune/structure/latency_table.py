"""`latency_table.json`: how long a model and its layers take with fewer units, on one machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.safe_json import read_versioned, write_or_remove

LATENCY_NAME = "latency_table.json"

_FORMAT_VERSION = 1


@dataclass(frozen=True)
class LayerTimes:
    """The seconds and the parameters of one layer: whole, and by structure with shares of its units removed."""

    seconds: float
    parameters: int
    with_share: dict[str, dict[float, tuple[float, int]]]


@dataclass(frozen=True)
class LatencyTable:
    """What was measured: seconds of the whole model, of what is no layer, and of each layer by its path.

    `conditions` are the machine, its threads, the precision and the shapes of the inputs that it holds for.
    """

    conditions: dict[str, Any]
    seconds: float
    rest_seconds: float
    parameters: int
    layers: dict[str, LayerTimes]


def write_table(directory: Path, table: LatencyTable) -> None:
    """Write `latency_table.json` into a directory, which is created if needed."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "format_version": _FORMAT_VERSION,
        "conditions": table.conditions,
        "seconds": table.seconds,
        "rest_seconds": table.rest_seconds,
        "parameters": table.parameters,
        "layers": {
            path: {
                "seconds": layer.seconds,
                "parameters": layer.parameters,
                "with_share": {
                    structure: [[share, *pair] for share, pair in some.items()]
                    for structure, some in layer.with_share.items()
                },
            }
            for path, layer in table.layers.items()
        },
    }
    write_or_remove(directory / LATENCY_NAME, content)


def read_table(
    directory: Path, conditions: Mapping[str, Any], shares: Mapping[str, Sequence[float]]
) -> LatencyTable | None:
    """The table in a directory, if it was measured under these conditions and has these shares; else None."""
    try:
        content = read_versioned(directory / LATENCY_NAME, _FORMAT_VERSION)
        if content is None or content["conditions"] != dict(conditions):
            return None
        layers = {
            path: LayerTimes(
                float(layer["seconds"]),
                int(layer["parameters"]),
                {
                    structure: {float(share): (float(seconds), int(number)) for share, seconds, number in some}
                    for structure, some in layer["with_share"].items()
                },
            )
            for path, layer in content["layers"].items()
        }
        table = LatencyTable(
            dict(conditions),
            float(content["seconds"]),
            float(content["rest_seconds"]),
            int(content["parameters"]),
            layers,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # it is measured again
    complete = all(
        any(structure in layer.with_share for layer in table.layers.values())
        and all(set(layer.with_share.get(structure, some)) == set(some) for layer in table.layers.values())
        for structure, some in shares.items()
    )
    return table if complete else None
