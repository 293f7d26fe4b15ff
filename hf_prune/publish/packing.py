"""Packing and unpacking a saved model, with what is known about it: its record and its card stay true."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..errors import ArgumentError, PushError
from ..saved.files import INDEX_NAME, find_model
from ..saved.model import SavedModel
from ..saved.packing import PackedSizes, complete_folder, model_folders, pack_into, unpack_into
from .card import forget_measurements, write_card
from .record import load_record, save_record
from .sparsity_json import FIGURES_NAME, PACKED_FOLDER


@dataclass(frozen=True)
class PackedModel:
    """A folder that was written, and the sizes of its weight files, dense and packed."""

    folder: Path
    files: list[PackedSizes]

    @property
    def dense_bytes(self) -> int:
        """The bytes of the dense weight files."""
        return sum(file.dense for file in self.files)

    @property
    def packed_bytes(self) -> int:
        """The bytes of the packed weight files."""
        return sum(file.packed for file in self.files)


def save_packed(
    model: PreTrainedModel | str | os.PathLike,
    output: str | os.PathLike,
    dtype: str | torch.dtype | None = None,
    embeddings: str | None = None,
) -> PackedModel:
    """Save a model with packed weights: sparse tensors as entropy-coded masks and values, from which nothing is lost.

    `import hf_prune` and `from_pretrained` open the folder as a dense model, bit for bit the same. The files beside the
    weights are copied. A record of the run is kept with its measurements, and a card that hf-prune wrote is
    written again.

    Args:
        model: a model, a folder with a saved one, or a name on the Hub. Of a folder, tensor after tensor is read: it
            may be larger than the memory.
        output: the folder to write, new or empty. It is complete when it appears.
        dtype: "bfloat16", or torch.bfloat16, rounds float32 weights to it first; what was measured with the weights is
            then no longer said in the card. None keeps the weights as they are.
        embeddings: "int8" or "int4" rounds embeddings to whole numbers with a scale for each row first. The model then
            opens, and is unpacked, with these rounded embeddings; measurements are left out of the card, too.

    Raises PackedError for weights that are quantised or packed already, and for an output folder with files in it.
    """
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    write = partial(pack_into, dtype=name, embeddings=embeddings)
    is_other = dtype is not None or embeddings is not None
    if isinstance(model, PreTrainedModel):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return _convert(Path(folder), Path(output), write, is_other)
    if not isinstance(model, (str, os.PathLike)):
        advice = "; save it, and give the folder" if hasattr(model, "save_pretrained") else ""
        found = f"{type(model).__name__}{advice}"
        raise ArgumentError("model", f"expected a model, a folder or a name on the Hub, got {found}")
    return _convert(find_model(model, with_texts=True), Path(output), write, is_other)


def unpack(packed: str | os.PathLike, output: str | os.PathLike) -> PackedModel:
    """Write the dense model of a packed one: the weight files that were packed, bit for bit, and the files beside them.

    Args:
        packed: a folder with a packed model, or a name on the Hub.
        output: the folder to write, new or empty. It is complete when it appears.

    Raises PackedError for a folder whose weights are not packed, or not those that were.
    """
    return _convert(find_model(packed, with_texts=True), Path(output), unpack_into, is_other=False)


def _convert(
    folder: Path, output: Path, write: Callable[[Path, Path], list[PackedSizes]], is_other: bool
) -> PackedModel:
    """Write a folder with other weight files; `is_other`: the weights themselves are others, too."""
    with complete_folder(output) as unfinished:
        files = write(folder, unfinished)
        record = load_record(unfinished)
        if record is not None and record.weights:
            if is_other:
                forget_measurements(unfinished)
            elif record.weights == SavedModel.of(folder).hashes:
                save_record(unfinished, record.model_copy(update={"weights": SavedModel.of(unfinished).hashes}))
    if (output / FIGURES_NAME).exists():
        write_card(output)
    return PackedModel(output, files)


@contextmanager
def packed_beside(folder: str | os.PathLike, wanted: bool = True) -> Iterator[dict[str, Path]]:
    """A model's packed weights, to be pushed beside the dense ones: path in the repository -> a temporary file.

    With its configuration, so that `from_pretrained(..., subfolder="packed")` opens them. Nothing unless `wanted`.
    Raises PackedError for weights that are packed already, and PushError for a sentence-transformers model, which has
    no such argument.
    """
    if not wanted:
        yield {}
        return
    folder = Path(folder)
    if model_folders(folder) != [folder]:
        raise PushError(
            "with_packed",
            "expected weights in the folder itself, got modules of sentence-transformers, which do not open from a "
            "folder within a repository; pack the model and push that",
        )
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        sizes = pack_into(folder, place)
        names = [*(file.name for file in sizes), "config.json", "generation_config.json", INDEX_NAME]
        yield {f"{PACKED_FOLDER}/{name}": place / name for name in names if (place / name).exists()}
