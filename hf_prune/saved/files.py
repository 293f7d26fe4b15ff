"""The files of a saved model: where they are and what they are called."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from huggingface_hub import snapshot_download

from ..config.pruning import CONFIG_NAME
from ..config.safe_json import read_json
from ..errors import ReportError, first_line, nearest_beside
from ..structure.chosen import SEARCH_NAME
from ..structure.record import STRUCTURE_NAME
from .packages import PACKAGE_SCHEME, path_in_package

WEIGHTS_NAME = "model.safetensors"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MODULES_NAME = "modules.json"  # of sentence-transformers
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json")

# The JSON files that describe a saved model.
READ_NAMES = (
    *("config.json", "adapter_config.json", CONFIG_NAME, STRUCTURE_NAME, SEARCH_NAME, INDEX_NAME, MODULES_NAME),
    *TOKENIZER_NAMES,
)

# What is downloaded of a model on the Hub: always, and to have it whole.
_READ_ALWAYS = ["*.safetensors", "*.json"]
_TEXTS = ["*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "LICENSE*"]


@dataclass(frozen=True)
class SavedFile:
    """Size in bytes and SHA-256 of a weight file."""

    __pydantic_config__: ClassVar[dict] = {"extra": "forbid"}  # where a record of it is read

    size: int
    sha256: str


def find_model(model: str | os.PathLike, with_texts: bool = False) -> Path:
    """The folder of a model: a path, `package:NAME/PATH`, or a name on the Hub, from which it is downloaded.

    Downloaded are weights and JSON files, and `with_texts` also vocabularies, templates and code.
    """
    folder = path_in_package(str(model)) if str(model).startswith(PACKAGE_SCHEME) else Path(model)
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise ReportError(f"{model}: expected a folder with a saved model, found {_what_is_there(folder)}")
    try:
        return Path(snapshot_download(str(model), allow_patterns=_READ_ALWAYS + (_TEXTS if with_texts else [])))
    except (OSError, ValueError) as error:  # what huggingface_hub raises: no such name, no network, no right
        raise ReportError(
            f"{model}: expected a folder or a model on the Hub; the folder does not exist, and the Hub answered: "
            f"{first_line(error)}{nearest_beside(folder)}"
        ) from error


def name_of(folder: Path) -> str:
    """What a saved model is called: its folder, or for `model` in the folder of a run, that one."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def why_not_written(output: Path) -> str | None:
    """Why a folder cannot be written under this name: anything but a new one, or an empty one; None if it can be."""
    if output.is_symlink() and not output.exists():
        return "a link to what does not exist"
    if output.exists() and not output.is_dir():
        return "a file"
    return "a folder with files" if output.exists() and any(output.iterdir()) else None


def _what_is_there(path: Path) -> str:
    return "a file" if path.is_file() else "a folder" if path.is_dir() else "no file" if path.exists() else "nothing"


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, with every link followed; in the Hub's cache, also a blob of the snapshot."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [root]
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and place.parents[1].name.startswith("models--"):
            repository = place.parents[1]
            homes += [repository / "blobs", repository.parent / "blobs"]  # the latter: shared by several repositories
    return any(real.is_relative_to(home) for home in homes)


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise ReportError if one of the files of a folder is a link to outside it."""
    for name in names:
        if not lies_inside(folder / name, folder):
            raise ReportError(
                f"{folder / name}: expected a file in the folder, got a link to outside; copy the file there"
            )


def write_file(path: Path, content: bytes) -> None:
    """Write a file; a link is replaced by the file, and not followed: in the Hub's cache it leads to a blob."""
    if path.is_symlink():
        path.unlink()
    path.write_bytes(content)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a saved model: `model.safetensors`, or else the shards that the index lists.

    Raises ReportError if there is neither, if the index is invalid or lists a file that does not exist or has no place
    in the folder, or if a file is a link to outside the folder.
    """
    if (folder / WEIGHTS_NAME).exists():
        check_inside(folder, [WEIGHTS_NAME])
        return [_checked(folder / WEIGHTS_NAME)]
    index = folder / INDEX_NAME
    if (folder / "adapter_config.json").exists() and not index.exists():
        raise ReportError(
            f"{folder}: expected a model, found PEFT adapters; merge them with hf_prune.merge and save the result"
        )
    if not index.exists():
        raise ReportError(
            f"{folder}: contains neither {WEIGHTS_NAME} nor {INDEX_NAME}; "
            f"{where_model_is(folder) or 'save the model with save_pretrained'}"
        )
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        elsewhere = [name for name in names if name != Path(name).name or not name.endswith(".safetensors")]
        missing = [name for name in names if not os.path.exists(folder / name)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ReportError(f"{index}: expected an index of safetensors files, got a file that cannot be read") from error
    if elsewhere:
        raise ReportError(
            f"{folder}: {INDEX_NAME} lists {elsewhere[0]!r}; expected names of safetensors files in the same folder"
        )
    if missing:
        name = missing[0] if missing[0].isprintable() else repr(missing[0])
        raise ReportError(f"{folder}: {INDEX_NAME} lists {name}, which does not exist")
    check_inside(folder, names)
    return [_checked(folder / name) for name in names]


def where_model_is(folder: Path) -> str | None:
    """What to do with the folder of a run, which has its model in `model`; None for other folders."""
    inner = folder / "model"
    is_run = not (folder / "config.json").exists() and (inner / "config.json").is_file()
    return f"the folder model in it has a model: give {inner}" if is_run else None


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise ReportError(f"{path}: expected a safetensors file, found {_what_is_there(path)}")
    return path


def saved_files(files: Sequence[Path]) -> dict[str, SavedFile]:
    """Size and SHA-256 of each file, by its name."""
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.name] = SavedFile(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return found
