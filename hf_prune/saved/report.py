"""The report of a saved model: the sparsity of each tensor, and the total."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..structure.chosen import Chosen, read_chosen
from .files import find_model
from .model import SavedModel
from .removed import Removed
from .zeros import TensorReport


@dataclass(frozen=True)
class Totals:
    """The numbers of weights and zeros in several tensors."""

    weights: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / max(self.weights, 1)


def totals_of(tensors: Sequence[TensorReport]) -> Totals:
    """The numbers of weights and zeros in all the tensors."""
    return Totals(weights=sum(tensor.weights for tensor in tensors), zeros=sum(tensor.zeros for tensor in tensors))


def share_of_zeros(tensors: Sequence[TensorReport]) -> float:
    """Zeros of all the tensors over weights of all the tensors."""
    return totals_of(tensors).sparsity


@dataclass(frozen=True)
class Report:
    """All tensors of a saved model; none if its files do not fit its class.

    `note` is the reason if nothing could be counted, or if it is unknown which tensors are prunable; else None.
    `removed` is what was cut out of the model before it was saved, if anything was, and `chosen` the structure that was
    chosen for a target, if there was one. `two_of_four` are the tensors of linear layers with the pattern 2:4.
    """

    model: str
    tensors: list[TensorReport]
    file_bytes: int
    note: str | None = None
    removed: Removed | None = None
    chosen: Chosen | None = None
    two_of_four: Sequence[str] = ()

    @property
    def prunable(self) -> list[TensorReport]:
        """The tensors that may be pruned."""
        return [tensor for tensor in self.tensors if tensor.prunable]

    @property
    def prunable_sparsity(self) -> float | None:
        """The share of zeros in all prunable tensors together; None if there are none, or they are unknown."""
        return share_of_zeros(self.prunable) if self.prunable else None

    @property
    def sparsity(self) -> float | None:
        """The share of zeros in all tensors together; None if nothing was counted."""
        return share_of_zeros(self.tensors) if self.tensors else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "model": self.model,
            "file_bytes": self.file_bytes,
            "note": self.note,
            "prunable": _as_dict(totals_of(self.prunable)) if self.prunable else None,
            "overall": _as_dict(totals_of(self.tensors)) if self.tensors else None,
            "removed": asdict(self.removed) if self.removed is not None else None,
            "chosen": self.chosen.to_dict() if self.chosen is not None else None,
            "two_of_four": list(self.two_of_four),
            "tensors": [_as_dict(tensor) for tensor in self.tensors],
        }


def _as_dict(counted: TensorReport | Totals) -> dict[str, Any]:
    return asdict(counted) | {"sparsity": counted.sparsity}


def make_report(model: str | os.PathLike) -> Report:
    """Count the zeros in the safetensors of a saved model: a folder, or a name on the Hub, which is downloaded.

    Reads one file or a sharded index, some rows at a time; a SavedModel that has counted already is not read again.
    Which tensors are prunable follows from the model class in config.json, and from `pruning_config.json` if there is
    one.

    Raises ReportError if the folder does not exist, has no safetensors, or a file is broken; PruningStateError if it is
    one that says what was cut out of the model, or chosen for a target.
    """
    saved = SavedModel.of(model if isinstance(model, SavedModel) else find_model(model))
    chosen = read_chosen(saved.folder) if saved.removed is not None else None
    note = saved.note or saved.misfit
    return Report(
        os.fspath(model), saved.tensors, saved.file_bytes, note, saved.removed, chosen, tuple(saved.two_of_four)
    )
