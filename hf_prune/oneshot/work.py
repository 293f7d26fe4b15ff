"""The layers that are finished, kept on disk while a model is pruned: a run that was stopped continues from them."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config.safe_json import read_json
from ..errors import CalibrationError, one_line

WORK_NAME = "one_shot"  # the folder, inside that of the model; removed at the end

_SETTINGS_NAME = "settings.json"

_COUNTS_NAME = "counts.json"


@dataclass(frozen=True)
class Finished:
    """A matrix that is pruned: its weights in the type of the model, its mask, and what is told of it."""

    weight: torch.Tensor
    kept: torch.Tensor
    notes: dict[str, Any]


class Work:
    """The finished matrices of a run, in the order in which they were pruned.

    Args:
        directory: where the model is saved at the end.
        settings: all that the result depends on, as plain values: digests of model and data, configuration, versions.
        resume: whether to continue what is there.

    Raises CalibrationError, before anything is written, if there is nothing to resume, or it has other settings.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], resume: bool):
        self.folder = directory / WORK_NAME
        path = self.folder / _SETTINGS_NAME
        if resume:
            self._check(path, settings)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def _check(self, path: Path, settings: Mapping[str, Any]) -> None:
        try:
            saved = read_json(path)
        except FileNotFoundError as error:
            raise CalibrationError(
                f"{path.parent}: expected a run to resume, found none; leave out --resume"
            ) from error
        except ValueError as error:
            raise CalibrationError(
                f"{path}: expected the settings of a run, got a file that cannot be read: {one_line(error)}"
            ) from error
        saved, settings = _flat(saved), _flat(settings)
        different = [name for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if different:
            name = different[0]
            raise CalibrationError(
                f"{path.parent}: expected the same {name} as in the run that was stopped ({saved.get(name)!r}), got "
                f"{settings.get(name)!r}; resume with the same settings, or start anew without --resume"
            )

    def counts(self) -> dict[str, int] | None:
        """How many units of each tensor are dropped; None where the run was stopped before that was known.

        Sums of gradients may differ from run to run on an accelerator: what was decided is kept.
        """
        path = self.folder / _COUNTS_NAME
        try:
            return dict(read_json(path))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CalibrationError(
                f"{path}: expected the counts of a run, got a file that cannot be read: {one_line(error)}; delete "
                f"{self.folder}"
            ) from error

    def keep_counts(self, counts: Mapping[str, int]) -> None:
        """Write how many units of each tensor are dropped, complete or not at all."""
        path = self.folder / _COUNTS_NAME
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)

    def find(self, place: int, name: str) -> Finished | None:
        """The finished matrix of a place in the order, from 0; None where the run was stopped before it."""
        path = self._path(place)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                found = Finished(file.get_tensor("weight"), file.get_tensor("kept"), json.loads(metadata["notes"]))
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CalibrationError(
                f"{path}: expected a finished layer, got a file that cannot be read: {one_line(error)}; delete it"
            ) from error
        if found.notes.get("name") != name:
            raise CalibrationError(f"{path}: expected the layer {name}, found {found.notes.get('name')!r}; delete it")
        return found

    def keep(self, place: int, finished: Finished) -> None:
        """Write a finished matrix, complete or not at all."""
        path = self._path(place)
        unfinished = path.with_suffix(".unfinished")
        tensors = {"weight": finished.weight.cpu().contiguous(), "kept": finished.kept.cpu().contiguous()}
        save_file(tensors, unfinished, metadata={"notes": json.dumps(finished.notes)})
        unfinished.replace(path)

    def remove(self) -> None:
        """Remove what was kept, once the model is saved."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, place: int) -> Path:
        return self.folder / f"{place:05d}.safetensors"


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name; those of a part with its name and a dot before theirs."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
