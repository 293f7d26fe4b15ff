"""Scores of units that are added up over optimizer steps, on disk beside the masks."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import PruningStateError, one_line

UNIT_SCORES_NAME = "pruning_unit_scores.safetensors"


def write_unit_scores(directory: Path, sums: Mapping[str, torch.Tensor]) -> None:
    """Write `pruning_unit_scores.safetensors`, with a float64 tensor for each set of units; without any, remove it."""
    path = directory / UNIT_SCORES_NAME
    if sums:
        save_file({name: values.contiguous() for name, values in sums.items()}, path)
    else:
        path.unlink(missing_ok=True)


def read_unit_scores(directory: Path, units: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The scores in a directory, empty if there are none; `units` are the names and numbers of the model's units.

    Raises PruningStateError, naming the file, if it cannot be read, or if it is of other units.
    """
    path = directory / UNIT_SCORES_NAME
    if not path.exists():
        return {}
    try:
        found: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        why = one_line(error)
        raise PruningStateError(f"{path}: expected scores of units, got a file that cannot be read ({why})") from error
    for name, values in found.items():
        if values.dtype != torch.float64 or tuple(values.shape) != (units.get(name),) or not values.isfinite().all():
            raise PruningStateError(
                f"{path}: expected finite scores of the model's units, got {name!r} of {tuple(values.shape)}, where "
                f"the model has {units.get(name, 'none')}"
            )
    return found
