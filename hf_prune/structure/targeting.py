"""Finding the structure that reaches a target: what can be removed, how fast that is, and how much it changes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ..config.pruning import PruningConfig
from ..errors import PruningConfigError, StructureError
from ..methods.patterns import count_of
from .batches import inputs_to_time, on_model
from .chosen import Chosen, target_of
from .coupled import checked_model, families_of, with_own_widths
from .latency import (
    build_dense,
    build_with,
    can_be_built,
    conditions_of,
    dropped_of,
    evaluating,
    measure_layers,
    time_models,
)
from .latency_table import LatencyTable, read_table, write_table
from .layer_search import layered_candidates
from .proof import proven
from .record import fields_before
from .search import (
    Candidate,
    Correction,
    Curve,
    LayerTable,
    Tables,
    Target,
    choose,
    correction_from,
    dense_candidate,
    frontier,
    thinned,
    uniform_candidates,
)
from .sensitivity import LayerChanges, measure_changes
from .shrink import cut_of
from .units import Family

logger = logging.getLogger(__name__)

# What is removed for a target.
_STRUCTURES = ("neurons", "heads", "layers")

# The shares of neurons that layers are measured without; others are interpolated.
_SHARES = (0.25, 0.5, 0.75, 0.875, 0.9375)

# Up to so many numbers of neurons, and of heads, are tried; each layer keeps this share of its neurons at least.
_NUMBERS_OF_NEURONS, _LEAST_NEURONS = 64, 1 / 16

# How often a structure is timed as a whole, and how far off it may be from its prediction to be taken.
_TRIES, _TOLERANCE = 3, 0.02

# The rows of the frontier that are kept.
_ROWS = 100


def find_structure(
    model: PreTrainedModel,
    config: PruningConfig,
    batch: Mapping[str, Any],
    directory: Path | None = None,
    dense_fields: Mapping[str, int] | None = None,
) -> Chosen:
    """Choose what to remove from a model so that it reaches the target of a configuration, and changes least.

    Args:
        batch: samples of the data, padded together. The one of median length is what the model is timed with, see
            `inputs_to_time`; all of them show how much the outputs change.
        directory: where `latency_table.json` is kept, and read if it was measured under the same conditions.
        dense_fields: fields of the configuration, and their values in the dense model that the target refers to, where
            it is another one than the model: one that tokens were removed from before. It is built with new weights.

    Raises PruningConfigError for a target that cannot be reached, with what can be, and StructureError if nothing can
    be removed from the model, or if it does not run with the batch.
    """
    target = target_of(config)
    assert target is not None
    with evaluating(model):
        measured = measure_model(model, config, batch, directory)
        families, predicted = measured.families, dense_candidate(measured.tables)
        reference = Reference.of(model, predicted, dict(dense_fields or {}), measured.inputs)
        units = measured.units if config.scope == "global" else {}
        candidates = (
            layered_candidates(measured.tables, measured.shares, units, target)
            if units
            else uniform_candidates(measured.tables, measured.shares)
        )
        _check_reachable(candidates, predicted, reference.dense, target)
        chosen, dense, correction = _choose_and_time(model, measured, candidates, predicted, reference, target)
    corrected = frontier([correction.of(one, predicted) for one in candidates])
    return Chosen(
        config=config,
        candidate=chosen,
        dense=dense,
        frontier=tuple(replace(one, layers={}) for one in thinned(corrected, _ROWS)),
        units={
            name: sum(there.get(name, 0) for there in units.values()) if units else _units_of(some)
            for name, some in families.items()
        },
        conditions=measured.conditions,
        layers=units,
        dense_fields=dict(dense_fields or {}),
    )


@dataclass(frozen=True)
class Reference:
    """The dense model that a target refers to.

    Attributes:
        model: it, with new weights; None where it is the model that units are removed from.
        dense: what it costs: where it is another model, its seconds are as many times those that were predicted of the
            model as was measured of both in turns.
    """

    model: PreTrainedModel | None
    dense: Candidate

    @classmethod
    def of(
        cls, model: PreTrainedModel, predicted: Candidate, fields: Mapping[str, int], inputs: Mapping[str, Any]
    ) -> "Reference":
        """That of a model for which `predicted` is predicted, from the fields in which its configuration differs."""
        if not fields:
            return cls(None, predicted)
        dense = build_dense(model, fields)
        dense_seconds, seconds = time_models([dense, model], inputs)
        parameters = sum(parameter.numel() for parameter in dense.parameters())
        costs = replace(predicted, seconds=predicted.seconds * dense_seconds / seconds, parameters=parameters)
        return cls(dense, costs)


@dataclass(frozen=True)
class Measured:
    """What can be removed from a model, and what that saves and changes.

    Attributes:
        families: structure -> its units, whose removal was tried.
        shares: structure -> the shares of its units that may be removed, from 0.
        units: path of each layer -> structure -> the number of its units there; of experts, of each.
        inputs: what the model was timed with.
        tables: what layers cost, and what removing units of them saves and changes.
        conditions: what the times hold for, see `conditions_of`.
    """

    families: dict[str, list[Family]]
    shares: dict[str, list[float]]
    units: dict[str, dict[str, int]]
    inputs: Mapping[str, Any]
    tables: Tables
    conditions: dict[str, Any]


def measure_model(
    model: PreTrainedModel, config: PruningConfig, batch: Mapping[str, Any], directory: Path | None = None
) -> Measured:
    """Measure a model for a target, see `find_structure`, in evaluation mode without gradients."""
    families = _removable(checked_model(model), batch, of_layers=config.scope == "global")
    shares = {name: _shares_of(model, name, some) for name, some in families.items()}
    inputs = on_model(inputs_to_time(batch, config.target_batch_size, config.target_length), model)
    within = {name: some for name, some in families.items() if name != "layers"}
    measured = {name: _some_of(shares[name]) for name in within}
    table = read_table(directory, conditions_of(model, inputs), measured) if directory is not None else None
    if table is None:
        table = measure_layers(model, within, measured, inputs)
        if directory is not None:
            write_table(directory, table)
    changes = measure_changes(model, within, measured, on_model(batch, model))
    tables = make_tables(table, changes, families.get("layers", ()))
    conditions = {name: value for name, value in table.conditions.items() if name != "parameters"}
    return Measured(families, shares, _units_of_layers(families, tables), inputs, tables, conditions)


def time_again(chosen: Chosen, model: PreTrainedModel, removed: Mapping[str, Any], batch: Mapping[str, Any]) -> Chosen:
    """The same, with the times of the model that is left and of a dense one like that which was pruned, in turns.

    `removed` is the content of `pruning_structure.json`. Weights do not matter for the times of dense models, so those
    of the dense one are new.
    """
    config = chosen.config
    inputs = on_model(inputs_to_time(batch, config.target_batch_size, config.target_length), model)
    with evaluating(model):
        whole = build_dense(model, {**fields_before(removed), **chosen.dense_fields})
        dense, small = time_models([whole, model], inputs)
    return replace(chosen, reached=(dense, small))


# ---- What can be removed ----


def _removable(model: PreTrainedModel, batch: Mapping[str, Any], of_layers: bool) -> dict[str, list[Family]]:
    """The units whose removal was tried, by structure; of each layer by itself, or as many of all.

    Raises StructureError if there are none, or none that layers can have different numbers of.
    """
    found: dict[str, list[Family]] = {}
    problems = []
    for structure in _STRUCTURES:
        families = [one for one in families_of(model, structure) if of_layers or not one.needs_per_layer]
        try:
            if of_layers and structure != "layers":
                families = with_own_widths(families, "scope")
            families = proven(families, model, lambda: batch) if families else []
        except StructureError as error:
            problems.append(error)
            continue
        if families:
            found[structure] = families
    if not found or (of_layers and problems and set(found) == {"layers"}):
        raise (
            problems[0]
            if problems
            else StructureError(
                "structure", f"{type(model).__name__} has no neurons, heads or layers that can be removed as a whole"
            )
        )
    return found


def _units_of(families: Sequence[Family]) -> int:
    if families[0].structure == "layers":
        return max(len(family.groups) for family in families)
    return max(family.groups[0].units for family in families)


def _units_of_layers(families: Mapping[str, Sequence[Family]], tables: Tables) -> dict[str, dict[str, int]]:
    """The number of units of each layer by its path and by structure; of experts, of each."""
    layers = [group.path for family in families.get("layers", ()) for group in family.groups]
    found: dict[str, dict[str, int]] = {path: {} for path in (*layers, *(layer.path for layer in tables.layers))}
    for structure, some in families.items():
        for group in (group for family in some for group in family.groups):
            path = next((path for path in found if f"{group.path}.".startswith(f"{path}.")), None)
            if path is not None:
                found[path].setdefault(structure, group.units)
    return {path: units for path, units in found.items() if units}


def _shares_of(model: PreTrainedModel, structure: str, families: Sequence[Family]) -> list[float]:
    """The shares of units that may be removed, from 0: those for which a model can be built.

    Numbers of neurons that are left are multiples of 8 where there are many, as others are slower; and in experts that
    are computed together, which need it.
    """
    units, step, least = _units_of(families), 1, 1
    if structure == "neurons":
        fused = any(part.expert is not None for one in families for group in one.groups for part in group.all_parts)
        if fused or units >= _NUMBERS_OF_NEURONS:
            step = max(round(units / _NUMBERS_OF_NEURONS / 8) * 8, 8)
        least = max(int(units * _LEAST_NEURONS), 1)
    kept = [number for number in range(units, 0, -step) if number >= least]
    shares = [round((units - number) / units, 6) for number in kept]
    if structure == "heads":
        shares = [share for share in shares if not share or can_be_built(model, families, share)]
    return shares


def _some_of(shares: Sequence[float]) -> list[float]:
    """The shares that are measured: those nearest to `_SHARES`, without 0."""
    return sorted({min(shares[1:], key=lambda share: abs(share - wanted)) for wanted in _SHARES} if shares[1:] else ())


# ---- Tables and the choice ----


def make_tables(
    table: LatencyTable, changes: Mapping[str, LayerChanges], families_of_layers: Sequence[Family]
) -> Tables:
    """The tables of the search, from what was measured of each layer."""
    removable = {group.path for family in families_of_layers for group in family.removable}
    layers = []
    for path, layer in table.layers.items():
        change = changes[path]
        points = {
            name: [
                (share, layer.seconds - seconds, layer.parameters - number, change.with_share[name][share])
                for share, (seconds, number) in sorted(some.items())
            ]
            for name, some in layer.with_share.items()
        }
        columns = {name: list(zip((0.0, 0.0, 0, 0.0), *some, strict=True)) for name, some in points.items() if some}
        layers.append(
            LayerTable(
                path=path,
                seconds=layer.seconds,
                parameters=layer.parameters,
                seconds_saved={name: Curve(shares, _rising(saved)) for name, (shares, saved, _, _) in columns.items()},
                parameters_saved={name: Curve(shares, saved) for name, (shares, _, saved, _) in columns.items()},
                change={name: Curve(shares, _rising(lost)) for name, (shares, _, _, lost) in columns.items()},
                removal=change.removal if path in removable else None,
            )
        )
    of_layers = sum(layer.parameters for layer in layers)
    return Tables(tuple(layers), table.rest_seconds, table.parameters - of_layers)


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    """Values none of which is below one before it: removing more saves no less, whatever the noise of the clock."""
    found = [0.0]
    for value in values[1:]:
        found.append(max(value, found[-1]))
    return tuple(found)


def _check_reachable(candidates: Sequence[Candidate], model: Candidate, dense: Candidate, target: Target) -> None:
    """Raise PruningConfigError for a target that the model or the dense one reaches, or that no candidate does."""
    already = target.reached_by(model, dense)
    alone = model.parameters < dense.parameters  # something was removed from the dense model before
    if target.name == "target_parameters":
        fewest = min(one.parameters for one in candidates)
        if already:
            problem = f"expected fewer than the model's {model.parameters:,} parameters"
            problem += f" without unused tokens ({model.parameters / dense.parameters:.3f} of all)" if alone else ""
        elif fewest > target.number_of_parameters(dense.parameters):
            problem = (
                f"expected at least {fewest:,} parameters ({fewest / dense.parameters:.3f} of the model's), as no more "
                f"can be removed by {_words(candidates)}"
            )
        else:
            return
    else:
        fastest = min(one.seconds for one in candidates)
        if already and target.name == "target_speedup":
            problem = f"expected more than {dense.seconds / model.seconds:.3g}, the speed-up without unused tokens"
        elif already:
            needs = "the model without unused tokens" if alone else "the dense model"
            problem = f"expected less than {1000 * model.seconds:.3g} milliseconds, which {needs} needs"
        elif fastest > target.seconds(dense.seconds):
            most = f"at most {dense.seconds / fastest:.3g}"
            least = f"at least {1000 * fastest:.3g} milliseconds"
            problem = (
                f"expected {most if target.name == 'target_speedup' else least}, the fastest that {_words(candidates)} "
                "give on this machine with these inputs"
            )
        else:
            return
    raise PruningConfigError(target.name, f"{problem}; got {target.value:g}")


def _words(candidates: Sequence[Candidate]) -> str:
    """The structures that candidates differ in, as in `fewer neurons and layers`."""
    names = list(dict.fromkeys(name for one in candidates for name in one.sparsities))
    return f"fewer {' and '.join(names)}"


def _choose_and_time(
    model: PreTrainedModel,
    measured: Measured,
    candidates: Sequence[Candidate],
    predicted: Candidate,
    reference: Reference,
    target: Target,
) -> tuple[Candidate, Candidate, Correction]:
    """The chosen candidate and the dense model with their measured seconds, and the correction of all predictions.

    The candidate is built, with new weights, and timed as a whole in turns with the model, for which `predicted` was,
    and with the dense one. If it is not as fast as predicted, all predictions are corrected by what it showed, and
    another is chosen.
    """
    correction, dense = Correction(1.0, predicted.seconds), reference.dense
    tried: list[tuple[Candidate, Candidate, Correction]] = []
    for _ in range(_TRIES):
        corrected = [correction.of(one, predicted) for one in candidates]
        chosen = choose(corrected, dense, target)
        if chosen is None or any(_removed_by(chosen) == _removed_by(before) for before, _, _ in tried):
            break
        smaller = build_with(model, config_of(chosen, measured.families, model))
        whole = [reference.model] if reference.model is not None else []
        own_seconds, seconds, *of_whole = time_models([model, smaller, *whole], measured.inputs)
        off = (seconds / own_seconds) / (chosen.seconds / correction.dense_seconds) - 1
        correction = correction_from(candidates[corrected.index(chosen)], predicted, seconds, own_seconds)
        dense = replace(dense, seconds=of_whole[0] if of_whole else own_seconds)
        tried.append((replace(chosen, seconds=seconds), dense, correction))
        if abs(off) <= _TOLERANCE or target.name == "target_parameters":
            break

    def missed_by(one: tuple[Candidate, Candidate, Correction]) -> tuple[bool, float]:
        """Those that reach the target first, then the nearest."""
        if target.name == "target_parameters":
            return False, 0.0
        over = one[0].seconds / target.seconds(one[1].seconds) - 1
        return over > _TOLERANCE, abs(over)

    return min(tried, key=missed_by)


def _removed_by(candidate: Candidate) -> tuple[Any, ...]:
    return candidate.sparsities, candidate.layers


def config_of(
    candidate: Candidate, families: Mapping[str, Sequence[Family]], model: PreTrainedModel
) -> PreTrainedConfig:
    """The configuration of the model that a candidate leaves."""
    dropped: dict[str, torch.Tensor] = {}
    smaller: list[Family] = []
    for name, some in families.items():
        share = candidate.sparsities.get(name, 0.0)
        flags = _dropped_by_layer(candidate, name, some) if candidate.layers else dropped_of(some, share)
        if any(bool(one.any()) for one in flags.values()):
            dropped |= flags
            smaller += some
    return cut_of(smaller, dropped).config(model.config)


def _dropped_by_layer(candidate: Candidate, structure: str, families: Sequence[Family]) -> dict[str, torch.Tensor]:
    """Flags (bool) of the units of each layer that a candidate removes, by the name of their group."""
    dropped = {}
    for group in (group for family in families for group in family.groups):
        path = next((path for path in candidate.layers if f"{group.path}.".startswith(f"{path}.")), None)
        shares = candidate.layers[path] if path is not None else {}
        if structure == "layers":
            dropped[group.name] = torch.tensor([shares is None])
        else:
            number = count_of((shares or {}).get(structure, 0.0), group.units)
            dropped[group.name] = torch.arange(group.units) < number
    return dropped
