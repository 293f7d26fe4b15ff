"""`sparsity.json`: the figures of a saved model, counted in its files, with its evaluations."""

import os
import shlex
from collections.abc import Mapping
from typing import Any

from ..errors import StaleRecordError
from ..model.per_layer import needs_import
from ..saved.files import SavedFile, name_of
from ..saved.model import SavedModel
from ..saved.removed import Removed
from ..saved.report import make_report, totals_of
from ..saved.zeros import TensorReport
from .record import RECORD_NAME, Cost, Evaluation, Frozen, RunRecord, load_record

FIGURES_NAME = "sparsity.json"

# Where packed weights are in a repository whose model is dense.
PACKED_FOLDER = "packed"

FORMAT_VERSION = 1


class Figures(Frozen):
    """The content of `sparsity.json`: counted in the saved files, with the evaluations of these weights.

    `missed_patterns` are n:m patterns that some group of weights does not have. `frozen` are tensors that were left out
    because they were not trained, with their names in the files. `metadata` was generated for the card:
    metadata in the card that differ from it were written by a person. `removed` is what was cut out of the model;
    `needs_import`: whether it opens only after `import hf_prune`, as its layers have different widths. `dense_bytes` is
    the size of the files when they are unpacked, None if they are not packed; then it opens only after the import, too.
    `packed_bytes` is the size of the packed weights that are pushed beside dense ones, None if none are;
    `rounded_embeddings` says whether embeddings were rounded to int8 or int4 when the files were packed.
    """

    format_version: int = FORMAT_VERSION
    model: str
    architecture: str | None
    has_tokenizer: bool
    pruning: list[dict[str, Any]]
    target_sparsity: float | None
    prunable_sparsity: float | None
    overall_sparsity: float | None
    file_bytes: int
    note: str | None
    missed_patterns: tuple[str, ...] = ()
    removed: Removed | None = None
    needs_import: bool = False
    dense_bytes: int | None = None
    packed_bytes: int | None = None
    rounded_embeddings: str | None = None
    frozen: tuple[str, ...] = ()
    files: dict[str, SavedFile]
    evaluations: list[Evaluation]
    metadata: dict[str, Any]
    tensors: list[TensorReport]

    @property
    def prunable(self) -> list[TensorReport]:
        """The tensors that may be pruned."""
        return [tensor for tensor in self.tensors if tensor.prunable]

    @property
    def only_smaller(self) -> bool:
        """Whether units were removed from the model, and nothing else was pruned."""
        return self.removed is not None and all(config.get("structure") for config in self.pruning)

    @property
    def reached_sparsity(self) -> float | None:
        """The share of the prunable weights of the dense model that are zero or were removed; None if unknown."""
        if self.removed is None or not self.prunable:
            return self.prunable_sparsity
        before, after = self.removed.weights
        if self.only_smaller:
            return (before - after) / max(before, 1)
        left = totals_of(self.prunable)
        return (left.zeros + before - after) / max(left.weights + before - after, 1)

    @property
    def is_pruned(self) -> bool:
        """Whether the model is pruned: something was removed, or there are zeros in prunable tensors.

        If no prunable tensors are known, whether there is a configuration.
        """
        if self.removed is not None:
            return True
        if self.prunable:
            return totals_of(self.prunable).zeros > 0
        return bool(self.pruning) or totals_of(self.tensors).zeros > 0

    @property
    def missed_target(self) -> float | None:
        """The target sparsity, if counted zeros and removed weights do not reach it or zeros could not be counted.

        Where the target of all tensors was not recorded, it is the lowest that a configuration has, except those whose
        units were removed.
        """
        target, counted = self.target_sparsity, self.reached_sparsity
        if target is None:
            of_weights = [one for one in self.pruning if self.removed is None or not one.get("structure")]
            target = min(map(_lowest_target, of_weights), default=None)
        return target if target and (counted is None or counted < target - 1e-4) else None


def _lowest_target(config: Mapping[str, Any]) -> float:
    """The lowest sparsity that a configuration asks of a tensor; 0 for the method `keep`."""
    return min([config["sparsity"] or 0.0, *(config["overrides"] or {}).values()])


def check_weights(saved: SavedModel, record: RunRecord | None) -> None:
    """Raise StaleRecordError if the record's measurements belong to other weights than those in the folder."""
    files = saved.hashes
    if record is not None and record.weights != files:
        different = sorted(name for name in {*files, *record.weights} if files.get(name) != record.weights.get(name))
        raise StaleRecordError(
            f"{saved.folder}: {different[0]} has changed since {RECORD_NAME} was written, so the measurements in it do "
            "not belong to these weights. Save and evaluate the model again, or make a card without measurements: "
            f"hf-prune card --without-measurements {shlex.quote(str(saved.folder))}"
        )


def costs_of(folder: str | os.PathLike) -> list[Cost]:
    """What a forward pass costs, as measured with a folder's weights; empty if nothing was, or with other weights."""
    record = load_record(folder)
    return (
        record.costs if record is not None and record.costs and record.weights == SavedModel.of(folder).hashes else []
    )


def count_figures(folder: str | os.PathLike, record: RunRecord | None = None) -> Figures:
    """Count the zeros in a folder's safetensors, and add the record's evaluations.

    Raises ReportError if nothing can be counted, and StaleRecordError if the record's measurements belong to other
    weights.
    """
    saved = SavedModel.of(folder)
    folder = saved.folder
    check_weights(saved, record)
    report = make_report(saved)
    return Figures(
        model=record.name if record is not None else name_of(folder),
        architecture=saved.architecture,
        has_tokenizer=saved.has_tokenizer,
        pruning=[config.to_dict() for config in saved.pruning_configs] if record is None else record.pruning,
        target_sparsity=record.target_sparsity if record is not None else None,
        prunable_sparsity=report.prunable_sparsity,
        overall_sparsity=report.sparsity,
        file_bytes=report.file_bytes,
        note=report.note.replace(str(folder), folder.name) if report.note and folder.is_absolute() else report.note,
        missed_patterns=tuple(saved.missed_patterns),
        removed=report.removed,
        needs_import=saved.skeleton is not None and needs_import(saved.skeleton.config),
        dense_bytes=saved.dense_bytes,
        rounded_embeddings=saved.rounded_embeddings,
        frozen=tuple(tensor.saved_as or tensor.name for tensor in report.tensors if tensor.name in saved.frozen),
        files=saved.hashes,
        evaluations=record.evaluations if record is not None else [],
        metadata={},
        tensors=report.tensors,
    )
