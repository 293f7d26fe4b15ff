"""A saved model's folder with packed weights in place of dense ones, and back."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torch.nn import Embedding

from ..config.safe_json import read_json
from ..errors import PackedError, one_line
from ..packed.config_text import with_entry, without_entry
from ..packed.files import PackedReader, is_packed, pack_file, read_header, unpack_file
from ..packed.values import ROUNDED_TO
from .files import INDEX_NAME, MODULES_NAME, WEIGHTS_NAME, check_inside, lies_inside, weight_files, why_not_written
from .model import SavedModel
from .parts import files_of_classes, module_folders

# What a folder may have beside a model, and a packed copy does not take along: training state, other formats.
_LEFT_BEHIND = (
    *("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*", "training_args.bin", "zero_to_*.py"),
    *("pytorch_model*", "tf_model*", "flax_model*", "*.onnx", "*.gguf", "openvino_model*"),
)

# Data types that weights may be rounded to before they are packed.
DTYPES = ("bfloat16",)


@dataclass(frozen=True)
class PackedSizes:
    """The bytes of one weight file, by its name in the folder: dense and packed."""

    name: str
    dense: int
    packed: int


@contextmanager
def complete_folder(output: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when all is written. Raises PackedError for one with files."""
    unfinished = output.parent / f".{output.name}.incomplete-{os.getpid()}"
    try:
        found = why_not_written(output)
        if found is not None:
            raise PackedError(f"{output}: expected a new or empty folder to write into, found {found}")
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
    except OSError as error:
        raise PackedError(f"{output}: cannot be written: {one_line(error)}") from error
    try:
        yield unfinished
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def model_folders(folder: Path) -> list[Path]:
    """The folders of a saved model that have weights and a config.json: itself, or modules of sentence-transformers.

    Raises ReportError if it has neither weights nor such modules.
    """
    names = (WEIGHTS_NAME, INDEX_NAME)
    if not any((folder / name).exists() for name in names) and (folder / MODULES_NAME).exists():
        modules = [folder / name for name in module_folders(folder)]
        found = [
            one for one in modules if (one / "config.json").exists() and any((one / name).exists() for name in names)
        ]
        if found:
            return found
    weight_files(folder)
    return [folder]


def pack_into(folder: Path, output: Path, dtype: str | None = None, embeddings: str | None = None) -> list[PackedSizes]:
    """Write a folder's files into an empty folder, with packed weights. Returns the sizes of the weight files.

    Args:
        dtype: "bfloat16" rounds float32 weights first, which loses what bfloat16 does not hold. None loses nothing.
        embeddings: "int8" or "int4" rounds embeddings to whole numbers with a scale for each row. None leaves them.

    Raises PackedError for a model that is quantised or packed, ReportError for a folder without weights.
    """
    if dtype is not None and dtype not in DTYPES:
        raise PackedError(f"dtype: expected {' or '.join(DTYPES)}, or None for the weights as they are, got {dtype!r}")

    if embeddings is not None and embeddings not in ROUNDED_TO:
        raise PackedError(f"embeddings: expected {' or '.join(ROUNDED_TO)}, or None, got {embeddings!r}")
    rounded = dict.fromkeys(_embeddings_of(folder), embeddings) if embeddings is not None else {}

    def write(source: Path, target: Path) -> None:
        pack_file(source, target, to_bfloat16=dtype is not None, rounded=rounded)

    found = _convert(folder, output, write, lambda text: with_entry(text, dtype, embeddings))
    return [PackedSizes(name, source.stat().st_size, target.stat().st_size) for name, source, target in found]


def _embeddings_of(folder: Path) -> set[str]:
    """The names in the weight files of a model's embeddings. Raises PackedError if none are known."""
    found: set[str] = set()
    for place in model_folders(folder):
        saved = SavedModel(place)
        if saved.skeleton is None:
            raise PackedError(f"embeddings: expected a model whose class is known; {saved.note}")
        modules = [f"{name}.weight" for name, one in saved.skeleton.named_modules() if isinstance(one, Embedding)]
        listed = [entry.name for path in weight_files(place) for entry in read_header(path).entries]
        found |= {name for name in listed if any(one.endswith(name) or name.endswith(one) for one in modules)}
    if not found:
        raise PackedError(f"embeddings: expected some in {folder}, found none")
    return found


def unpack_into(folder: Path, output: Path) -> list[PackedSizes]:
    """Write a packed folder's files into an empty folder, with the dense weights, bit for bit. Returns their sizes."""
    found = _convert(folder, output, unpack_file, without_entry)
    return [PackedSizes(name, target.stat().st_size, source.stat().st_size) for name, source, target in found]


def _convert(
    folder: Path, output: Path, write: Callable[[Path, Path], None], edit: Callable[[str], str]
) -> list[tuple[str, Path, Path]]:
    """Copy a folder with other weight files and configurations: name, source and target of each weight file."""
    places = model_folders(folder)
    weights = {path for place in places for path in weight_files(place)}
    configs = {place / "config.json" for place in places}
    found = []
    for source in sorted({*_files_to_copy(folder), *weights, *configs}):
        name = source.relative_to(folder)
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source in weights:
            write(source, target)
            found.append((name.as_posix(), source, target))
        elif source in configs:
            check_inside(folder, [name.as_posix()])
            target.write_bytes(_edited(source, edit).encode())
        else:
            shutil.copyfile(source, target)
    for place in places:
        _update_index(output / place.relative_to(folder))
    return found


def _edited(path: Path, edit: Callable[[str], str]) -> str:
    """The text of a config.json with an entry more or less."""
    try:
        return edit(path.read_bytes().decode())
    except (OSError, UnicodeDecodeError) as error:
        raise PackedError(f"{path}: expected the configuration of a model, got a file that cannot be read") from error
    except PackedError as error:
        raise PackedError(f"{path}: {error}") from error


def _update_index(folder: Path) -> None:
    """Set the total size in the index of shards, if there is one, to that of the tensors that they hold unpacked."""
    index = folder / INDEX_NAME
    if not index.exists():
        return
    content = read_json(index)
    sizes = [_bytes_of_tensors(path) for path in weight_files(folder)]
    if content.get("metadata", {}).get("total_size") not in (None, sum(sizes)):
        content["metadata"]["total_size"] = sum(sizes)
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _bytes_of_tensors(path: Path) -> int:
    header = PackedReader(path).dense if is_packed(path) else read_header(path)
    return sum(entry.end - entry.begin for entry in header.entries)


def _files_to_copy(folder: Path) -> Iterator[Path]:
    """The files of a folder that belong to the model or lie beside it, without training state and other formats.

    Of folders within it, those that the model's classes read, and the plots of its card.
    """
    inner = {folder / name for name in files_of_classes(folder)} | {*folder.glob("assets/*")}
    for path in sorted({*folder.iterdir(), *inner}):
        is_left = path.name.startswith(".") or any(fnmatchcase(path.name, pattern) for pattern in _LEFT_BEHIND)
        if path.is_file() and not is_left and lies_inside(path, folder):
            yield path
