"""How much to remove from each layer, so that most is saved at the least predicted change: dynamic programming.

As in ZipLM (arXiv 2302.04089, section 3.2) and SPDY (arXiv 2201.13096): what can be saved is rounded to parts of what
the dense layers cost, and layer after layer, the least change of the layers so far is computed for every number of
parts that they save. Nothing here knows a model, see `search`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from ..config.pruning import STRUCTURES
from ..methods.patterns import count_of
from .search import Candidate, LayerTable, Tables, Target

# Costs are rounded to so many parts of what all layers cost; sums of costs that are predicted are not.
_PARTS = 5000


@dataclass(frozen=True)
class Option:
    """What may be removed from a layer, and what that saves and changes.

    Attributes:
        shares: structure (`neurons`, `heads`) -> the share of its units that is removed; None for the whole layer.
        saved: how many parts of the cost are saved.
        seconds: that are saved.
        parameters: that are saved.
        change: of the model's outputs, which is predicted.
    """

    shares: dict[str, float] | None
    saved: int
    seconds: float
    parameters: float
    change: float


def layered_candidates(
    tables: Tables, shares: Mapping[str, Sequence[float]], units: Mapping[str, Mapping[str, int]], target: Target
) -> list[Candidate]:
    """The structures than which none saves as much and changes less, where each layer may have its own numbers.

    Args:
        shares: structure -> the shares that may be removed from each layer, from 0; `layers` if whole ones may be.
        units: path of each layer -> structure -> the number of its units there.
        target: says what is saved: parameters, or seconds.

    One layer of each stack stays at least. They are exact for costs that are multiples of the parts.
    """
    in_seconds = target.name != "target_parameters"
    whole = sum(layer.seconds if in_seconds else layer.parameters for layer in tables.layers)
    options = [_options_of(layer, shares, whole / _PARTS, in_seconds) for layer in tables.layers]
    return [_candidate(tables, units, taken) for taken in least_changes([one.stack for one in tables.layers], options)]


def _options_of(
    layer: LayerTable, shares: Mapping[str, Sequence[float]], part: float, in_seconds: bool
) -> list[Option]:
    """What may be removed from a layer: of what saves as many parts, that which changes least."""
    within = [name for name in shares if name in layer.seconds_saved]
    columns = [
        [
            (
                share,
                layer.seconds_saved[name].at(share),
                layer.parameters_saved[name].at(share),
                layer.change[name].at(share),
            )
            for share in shares[name]
        ]
        for name in within
    ]
    best: dict[int, Option] = {}
    for row in product(*columns):
        seconds, parameters, change = (sum(one[place] for one in row) for place in (1, 2, 3))
        saved = round((seconds if in_seconds else parameters) / part)
        if saved not in best or change < best[saved].change:
            removed = {name: one[0] for name, one in zip(within, row, strict=True)}
            best[saved] = Option(removed, saved, seconds, parameters, change)
    found: list[Option] = []
    for saved in sorted(best, reverse=True):
        if not found or best[saved].change < found[-1].change:
            found.append(best[saved])
    if "layers" in shares and layer.removal is not None:
        saved = round((layer.seconds if in_seconds else layer.parameters) / part)
        found.append(Option(None, saved, layer.seconds, layer.parameters, layer.removal))
    return found


def least_changes(stacks: Sequence[str], options: Sequence[Sequence[Option]]) -> list[list[Option]]:
    """One option for each layer: all choices than which none saves as many parts and changes less.

    `stacks` names the stack of each layer; those of a stack follow one another, and one of them is not removed.
    """
    most = sum(max(option.saved for option in some) for some in options)
    # The least change of the layers so far by the parts that they save: while all of this stack are removed, and once
    # one of it is kept.
    least = torch.full((2, most + 1), torch.inf, dtype=torch.float64)
    least[1, 0] = 0.0
    steps: list[tuple[list[list[int]], list[int]]] = []
    for index, some in enumerate(options):
        if index == 0 or stacks[index] != stacks[index - 1]:
            least = torch.stack([least[1], torch.full_like(least[1], torch.inf)])
        after = torch.full_like(least, torch.inf)
        taken = torch.zeros(least.shape, dtype=torch.int64)
        either, came_from = least.min(dim=0)
        for number, option in enumerate(some):
            for row in (0, 1) if option.shares is None else (1,):
                before = least[row] if option.shares is None else either
                moved = before[: most + 1 - option.saved] + option.change
                better = moved < after[row, option.saved :]
                after[row, option.saved :][better] = moved[better]
                taken[row, option.saved :][better] = number
        least = after
        steps.append((taken.tolist(), came_from.tolist()))
    found = []
    lowest = float("inf")
    for saved in range(most, -1, -1):
        change = float(least[1, saved])
        if change < lowest:
            lowest = change
            found.append(_options_taken(stacks, options, steps, saved))
    return found


def _options_taken(
    stacks: Sequence[str],
    options: Sequence[Sequence[Option]],
    steps: Sequence[tuple[list[list[int]], list[int]]],
    saved: int,
) -> list[Option]:
    """The options with which the layers save so many parts, read back from the last layer to the first."""
    row, found = 1, []
    for index in range(len(options) - 1, -1, -1):
        taken, came_from = steps[index]
        option = options[index][taken[row][saved]]
        saved -= option.saved
        found.append(option)
        if option.shares is not None:
            row = came_from[saved]
        if index == 0 or stacks[index] != stacks[index - 1]:
            row = 1
    return found[::-1]


def shares_of_all(
    layers: Mapping[str, Mapping[str, float] | None], units: Mapping[str, Mapping[str, int]]
) -> dict[str, float]:
    """structure -> the share of its units in all layers that is removed, with those of layers that are removed."""
    of, gone = dict.fromkeys(STRUCTURES, 0), dict.fromkeys(STRUCTURES, 0)
    for path, there in units.items():
        shares = layers.get(path, {})
        for structure, number in there.items():
            of[structure] += number
            gone[structure] += number if shares is None else count_of(shares.get(structure, 0.0), number)
    return {name: round(number / of[name], 9) for name, number in gone.items() if number}


def _candidate(tables: Tables, units: Mapping[str, Mapping[str, int]], taken: Sequence[Option]) -> Candidate:
    layers = {layer.path: option.shares for layer, option in zip(tables.layers, taken, strict=True)}
    seconds = sum(layer.seconds for layer in tables.layers) - sum(option.seconds for option in taken)
    parameters = sum(layer.parameters for layer in tables.layers) - sum(option.parameters for option in taken)
    return Candidate(
        shares_of_all(layers, units),
        tables.rest_seconds + seconds,
        round(tables.rest_parameters + parameters),
        sum(option.change for option in taken),
        layers,
    )
