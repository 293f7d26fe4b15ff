"""Which structure reaches a target at the least predicted change of the outputs: a search over tables of numbers.

Nothing here knows a model: `latency.py` and `sensitivity.py` measure the tables.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Any

from ..methods.patterns import count_of


@dataclass(frozen=True)
class Curve:
    """What is measured where some shares of a layer's units are removed, and a straight line between two of them.

    `shares` ascend from 0, for which the value is 0.
    """

    shares: tuple[float, ...]
    values: tuple[float, ...]

    def at(self, share: float) -> float:
        """The value for a share; beyond the largest measured one, that of the last line."""
        right = min(max(bisect_right(self.shares, share), 1), len(self.shares) - 1)
        left = right - 1
        slope = (self.values[right] - self.values[left]) / (self.shares[right] - self.shares[left])
        return self.values[left] + slope * (share - self.shares[left])


@dataclass(frozen=True)
class LayerTable:
    """What one layer costs, and what removing units of it would save and change.

    Attributes:
        path: of the layer in the model.
        seconds: of the whole layer in one forward pass.
        parameters: of the whole layer.
        seconds_saved: structure (`neurons`, `heads`) -> seconds that are saved, by the share that is removed.
        parameters_saved: the same in parameters.
        change: the same for the change of the model's outputs (see `sensitivity`).
        removal: the change of the outputs without the layer; None if it cannot be removed.
    """

    path: str
    seconds: float
    parameters: int
    seconds_saved: Mapping[str, Curve]
    parameters_saved: Mapping[str, Curve]
    change: Mapping[str, Curve]
    removal: float | None

    @property
    def stack(self) -> str:
        """The path of the stack of layers that it belongs to."""
        return self.path.rpartition(".")[0]


@dataclass(frozen=True)
class Tables:
    """The layers of a model in its order, and what everything else costs: embeddings, heads, the final norm."""

    layers: tuple[LayerTable, ...]
    rest_seconds: float
    rest_parameters: int


@dataclass(frozen=True)
class Candidate:
    """A structure that a model may get: what is removed, and what is predicted of it.

    `sparsities` maps each structure to the share of its units that is removed, in every layer; where layers may differ,
    of those of all layers, the removed ones included. `change` is the predicted relative squared change of the outputs
    before training, added up over what is removed. `layers` has the shares of each layer by its path, and None for one
    that is removed; it is empty where all layers are alike.
    """

    sparsities: dict[str, float]
    seconds: float
    parameters: int
    change: float
    layers: dict[str, dict[str, float] | None] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "sparsities": self.sparsities,
            "seconds": self.seconds,
            "parameters": self.parameters,
            "change": self.change,
            "layers": self.layers,
        }


def dense_candidate(tables: Tables) -> Candidate:
    """The model of which nothing is removed."""
    seconds = tables.rest_seconds + sum(layer.seconds for layer in tables.layers)
    return Candidate({}, seconds, tables.rest_parameters + sum(layer.parameters for layer in tables.layers), 0.0)


@dataclass(frozen=True)
class Correction:
    """What the time of one structure as a whole says of all that is predicted.

    `saved` is the share of the predicted saving that was saved, `dense_seconds` what the dense model needed.
    """

    saved: float
    dense_seconds: float

    def of(self, candidate: Candidate, dense: Candidate) -> Candidate:
        """A predicted candidate with corrected seconds; `dense` is the predicted dense model."""
        share = candidate.seconds / dense.seconds
        corrected = max(1 - self.saved * (1 - share), share / 2)
        return replace(candidate, seconds=self.dense_seconds * corrected)


def correction_from(candidate: Candidate, dense: Candidate, seconds: float, dense_seconds: float) -> Correction:
    """The correction with which a predicted candidate has the seconds that were measured."""
    predicted = 1 - candidate.seconds / dense.seconds
    return Correction((1 - seconds / dense_seconds) / predicted if predicted > 0 else 1.0, dense_seconds)


def uniform_candidates(tables: Tables, shares: Mapping[str, Sequence[float]]) -> list[Candidate]:
    """All structures that have the same share of units removed in every layer, one for each combination of shares.

    Of the layers of each stack, those are removed without which the outputs change least; one layer stays at least.
    """
    within = [name for name in shares if name != "layers"]
    found = []
    for of_layers in shares.get("layers", (0.0,)):
        kept, removed = _split_layers(tables.layers, of_layers)
        seconds = tables.rest_seconds + sum(layer.seconds for layer in kept)
        parameters = tables.rest_parameters + sum(layer.parameters for layer in kept)
        change = sum(layer.removal or 0.0 for layer in removed)
        columns = {name: [(share, *_saved(kept, name, share)) for share in shares[name]] for name in within}
        for row in product(*columns.values()):
            sparsities = {name: share for name, (share, *_) in zip(within, row, strict=True) if share}
            if of_layers:
                sparsities["layers"] = of_layers
            found.append(
                Candidate(
                    sparsities,
                    seconds - sum(one for _, one, _, _ in row),
                    round(parameters - sum(one for _, _, one, _ in row)),
                    change + sum(one for _, _, _, one in row),
                )
            )
    return found


def _split_layers(layers: Sequence[LayerTable], share: float) -> tuple[list[LayerTable], list[LayerTable]]:
    """The layers that are kept and those that are removed, if a share of each stack is."""
    removed: set[int] = set()
    for stack in dict.fromkeys(layer.stack for layer in layers):
        inside = [index for index, layer in enumerate(layers) if layer.stack == stack]
        removable = [index for index in inside if layers[index].removal is not None]
        most = len(removable) - (len(removable) == len(inside))
        ranked = sorted(removable, key=lambda index: layers[index].removal or 0.0)
        removed.update(ranked[: min(count_of(share, len(inside)), most)])
    kept = [layer for index, layer in enumerate(layers) if index not in removed]
    return kept, [layers[index] for index in sorted(removed)]


def _saved(layers: Sequence[LayerTable], structure: str, share: float) -> tuple[float, float, float]:
    """Seconds and parameters that are saved, and the change, if a share of the units of each layer is removed."""
    measured = [layer for layer in layers if structure in layer.seconds_saved]
    return (
        sum(layer.seconds_saved[structure].at(share) for layer in measured),
        sum(layer.parameters_saved[structure].at(share) for layer in measured),
        sum(layer.change[structure].at(share) for layer in measured),
    )


def frontier(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates than which no other is as fast and changes less (Pareto), from the slowest to the fastest."""
    ordered = sorted(candidates, key=lambda one: (one.seconds, one.change, one.parameters))
    least = accumulate((one.change for one in ordered), min, initial=float("inf"))
    better = [one for one, before in zip(ordered, least, strict=False) if one.change < before]
    return better[::-1]


@dataclass(frozen=True)
class Target:
    """What a model is to reach: `target_speedup`, `target_latency` (milliseconds) or `target_parameters`.

    Parameters are a number, or below 1 a share of the model's.
    """

    name: str
    value: float

    def reached_by(self, candidate: Candidate, dense: Candidate) -> bool:
        """Whether a candidate reaches it, where the dense model needs what `dense` has."""
        if self.name == "target_parameters":
            return candidate.parameters <= self.number_of_parameters(dense.parameters)
        return candidate.seconds <= self.seconds(dense.seconds)

    def seconds(self, dense: float) -> float:
        """The seconds that are to be reached, where the dense model needs `dense`."""
        return dense / self.value if self.name == "target_speedup" else self.value / 1000

    def number_of_parameters(self, dense: int) -> float:
        """The number of parameters that is to be reached, where the dense model has `dense`."""
        return self.value * dense if self.value < 1 else self.value

    @property
    def words(self) -> str:
        """What is asked for, such as `3 times the speed`."""
        if self.name == "target_speedup":
            return f"{self.value:g} times the speed of the dense model"
        if self.name == "target_latency":
            return f"a forward pass in {self.value:g} ms"
        return f"{self.value:.1%} of the parameters" if self.value < 1 else f"{self.value:,.0f} parameters"


def choose(candidates: Sequence[Candidate], dense: Candidate, target: Target) -> Candidate | None:
    """The candidate that reaches a target at the least predicted change, the smaller one of two; None if none does."""
    reaching = [one for one in candidates if target.reached_by(one, dense)]
    return min(reaching, key=lambda one: (one.change, one.seconds, one.parameters), default=None)


def thinned(rows: Sequence[Any], most: int) -> Iterator[Any]:
    """At most so many of the rows, the first and the last among them, at equal distances."""
    if len(rows) <= most:
        yield from rows
        return
    for index in range(most):
        yield rows[round(index * (len(rows) - 1) / (most - 1))]
