"""`pruning_structure.json`: which units were cut out of a model, beside its weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..config.safe_json import read_versioned, write_or_remove
from ..errors import PruningStateError
from ..model.per_layer import FIELD, MAY_READ
from .fields import value_in
from .shrink import Cut
from .units import Family

STRUCTURE_NAME = "pruning_structure.json"

_FORMAT_VERSION = 1


def describe_cut(
    cut: Cut, groups: Mapping[int, int], config: PreTrainedConfig, **numbers: Sequence[int]
) -> dict[str, Any]:
    """What was cut out of a model that had this configuration, as plain values.

    Args:
        groups: in how many groups the units of each configuration with a structure are ranked, by its index.
        numbers: further whole numbers, before and after.
    """
    smaller = cut.config(config)
    paths = list(cut.values(config))
    paths += [(*path[:-1], MAY_READ) for path in paths if path[-1] == FIELD]
    values = {path: (value_in(config, path), value_in(smaller, path)) for path in paths}
    return {
        "format_version": _FORMAT_VERSION,
        "fields": {".".join(path): list(pair) for path, pair in values.items() if pair[0] != pair[1]},
        **{name: list(pair) for name, pair in numbers.items()},
        "groups": {str(index): number for index, number in groups.items()},
        "units": {
            group.name: {"of": group.units, "kept": cut.kept[group.name].tolist()}
            for family in cut.families
            for group in family.groups
            if group.name in cut.kept
        },
    }


def write_structure(directory: Path, content: Mapping[str, Any] | None) -> None:
    """Write `pruning_structure.json`; where nothing was cut out, remove that of another model."""
    write_or_remove(directory / STRUCTURE_NAME, content)


def read_structure(directory: Path) -> dict[str, Any] | None:
    """What was cut out of the model in a folder; None if nothing was. Raises PruningStateError for a broken file."""
    path = directory / STRUCTURE_NAME
    try:
        content = read_versioned(path, _FORMAT_VERSION)
        if content is None:
            return None
        if "families" in content:  # the name before layers could have shares of their own
            content = {**content, "groups": content["families"]}
        for name in ("parameters", "weights"):
            if not all(type(number) is int for number in content[name]) or len(content[name]) != 2:
                raise ValueError(f"{name}: {content[name]!r}")
        for pair in content["fields"].values():
            if len(pair) != 2:
                raise ValueError(f"fields: {pair!r}")
        if not all(type(number) is int and number >= 0 for number in content["groups"].values()):
            raise ValueError(f"groups: {content['groups']!r}")
        for units in content["units"].values():
            kept = units["kept"]
            inside = all(type(unit) is int and 0 <= unit < units["of"] for unit in kept)
            if not inside or kept != sorted(set(kept)):
                raise ValueError(f"units: {str(units)[:80]}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PruningStateError(
            f"{path}: expected the units that were cut out, got a file that cannot be used ({error!r})"
        ) from error
    return dict(content)


def fields_before(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the configuration that changed when units were cut out, and their values before."""
    return {name: before for name, (before, _) in content["fields"].items()}


def cut_of_record(content: Mapping[str, Any], families: Sequence[Family], directory: Path) -> Cut:
    """What was cut out, for the families of the whole model. Raises PruningStateError if they are others."""
    names = {group.name: group.units for family in families for group in family.groups}
    units = content["units"]
    other = next((name for name in units if names.get(name) != units[name]["of"]), None)
    if other is not None:
        raise PruningStateError(
            f"{directory / STRUCTURE_NAME}: expected units of this model, got {units[other]['of']} {other}, where the "
            f"model has {names.get(other, 'none')}"
        )
    kept = {name: torch.tensor(one["kept"], dtype=torch.int64) for name, one in units.items()}
    return Cut(tuple(families), kept)


def is_cut(content: Mapping[str, Any], config: PreTrainedConfig, directory: Path) -> bool:
    """Whether a model with this configuration is the one that was left; False for the whole one.

    Raises PruningStateError for a model that is neither.
    """
    now = {name: value_in(config, tuple(name.split("."))) for name in content["fields"]}
    if all(now[name] == after for name, (_, after) in content["fields"].items()):
        return True
    different = next((name for name, (before, _) in content["fields"].items() if now[name] != before), None)
    if different is not None:
        before, after = content["fields"][different]
        raise PruningStateError(
            f"{directory / STRUCTURE_NAME}: expected a model with {different} {before}, or {after} after units were "
            f"cut out, got {now[different]!r}"
        )
    return False
