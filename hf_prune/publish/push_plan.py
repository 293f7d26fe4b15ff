"""The plan of a push: the files of a saved model, its card, and how they differ from those on the Hub."""

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CardError
from ..saved.files import SavedFile
from ..saved.masks import is_mask_file
from ..saved.model import SavedModel
from ..saved.pruning_state import STATE_NAME
from .card import ASSETS_FOLDER, CARD_NAME, LAYERS_NAME, SCHEDULE_NAME, make_files
from .card_merge import Existing
from .record import RECORD_NAME
from .redact import looks_like_token
from .sparsity_json import FIGURES_NAME, Figures

# Folders that `save_pretrained` writes.
_MODEL_FOLDERS = ("additional_chat_templates",)

# The files of a model beside its weights: configuration, vocabularies, custom code, and license.
_SUFFIXES = (".json", ".jinja", ".model", ".py", ".spm", ".tiktoken", ".txt")

_DOCUMENTS = ("LICENSE", "NOTICE", "CITATION")

_STATE_OF_TRAINING = (
    "trainer_state.json",
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scaler.pt",
    "zero_to_fp32.py",  # DeepSpeed's, for its own checkpoints
    "zero_to_torch.py",
)

# Files of an earlier push that would be wrong beside the new ones: weights under other names, masks, our own plots.
_REPLACED = re.compile(
    r"(model|adapter_model)[\w.-]*\.safetensors(\.index\.json)?|pytorch_model[\w.-]*\.bin(\.index\.json)?"
    rf"|pruning_masks[\w.-]*\.safetensors|{re.escape(STATE_NAME)}|{re.escape(RECORD_NAME)}|{re.escape(LAYERS_NAME)}|{re.escape(SCHEDULE_NAME)}"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: its size, and its SHA-256 if it is large (LFS), or else its git hash."""

    size: int
    digest: str
    is_large: bool


@dataclass(frozen=True)
class Remote:
    """A repository as it was read: None for what does not exist."""

    head: str | None
    files: dict[str, RemoteFile]
    has_branch: bool
    card: Existing | None
    is_private: bool | None


NOTHING_THERE = Remote(head=None, files={}, has_branch=False, card=None, is_private=None)

UNKNOWN = Remote(head=None, files={}, has_branch=False, card=None, is_private=None)


@dataclass(frozen=True)
class PushPlan:
    """The files that a push uploads, path -> file or content; those that it leaves out, with the reason, and removes.

    `weights` are the weight files, under any path, as they were when zeros were counted; `is_new` is None if it is
    unknown whether the repository exists.
    """

    repo_id: str
    files: dict[str, Path | bytes]
    weights: dict[str, SavedFile]
    left_out: dict[str, str]
    changed: list[str]
    removed: list[str]
    is_new: bool | None
    sparsity: float | None

    def size_of(self, name: str) -> int:
        """The size of a file in bytes."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size


def make_push_plan(
    folder: str | os.PathLike,
    repo_id: str,
    remote: Remote,
    with_masks: bool = False,
    also: Mapping[str, Path] | None = None,
    pushed: str | None = None,
) -> PushPlan:
    """Count zeros, make the card, choose the files, and compare them with those on the Hub. Nothing is written.

    `pushed` is the card that was last pushed there from this folder.
    """
    saved = SavedModel.of(folder)
    weights = {path.name for path in saved.weight_files}
    made = make_files(saved, repo_id, remote.card, pushed)
    chosen, left_out = choose_files(saved, weights, with_masks)
    earlier = {LAYERS_NAME, SCHEDULE_NAME} - made.keys()
    files: dict[str, Path | bytes] = {name: path for name, path in chosen.items() if name not in earlier}
    files |= {**(also or {}), **made}
    texts = files.keys() - weights - (also or {}).keys()
    _refuse_tokens({name: files[name] for name in sorted(texts)})
    figures = Figures.model_validate_json(made[FIGURES_NAME])
    sent_again = {name: path.name for name, path in (also or {}).items() if path in saved.weight_files}
    known = figures.files | {name: figures.files[original] for name, original in sent_again.items()}
    return PushPlan(
        repo_id=repo_id,
        files=dict(sorted(files.items())),
        weights=known,
        left_out=left_out,
        changed=[name for name in sorted(files) if not _is_there(files[name], remote.files.get(name), known.get(name))],
        removed=sorted(name for name in remote.files if _REPLACED.fullmatch(name) and name not in files),
        is_new=remote.head is None if remote is not UNKNOWN else None,
        sparsity=figures.overall_sparsity,
    )


def _refuse_tokens(files: Mapping[str, Path | bytes]) -> None:
    for name, content in files.items():
        if looks_like_token(content_of(content).decode(errors="replace")):
            raise CardError(f"{name}: contains what looks like a Hub token; remove it before pushing")


def choose_files(
    folder: str | os.PathLike, weights: Collection[str], with_masks: bool
) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of a folder that belong to the model, and why others are left out; folders are named with a slash."""
    chosen: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    saved = SavedModel.of(folder)
    folder = saved.folder
    folders = {ASSETS_FOLDER, *_MODEL_FOLDERS, *saved.module_folders}
    known = {*weights, CARD_NAME, *saved.vocabularies}
    for path in sorted(folder.iterdir()):
        name = path.name
        if path.is_dir():
            if name in folders:
                inside = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith("."))
                chosen |= {file.relative_to(folder).as_posix(): file for file in inside}
            else:
                left_out[f"{name}/"] = "a folder that is not part of the model"
        elif name.startswith((".", "_")) and path.suffix != ".py":
            left_out[name] = "hidden file"
        elif name in _STATE_OF_TRAINING or name.startswith("rng_state"):
            left_out[name] = "training state"
        elif is_mask_file(name) or name == STATE_NAME:
            if with_masks:
                chosen[name] = path
            else:
                left_out[name] = "masks, uploaded with --with-masks"
        elif path.suffix == ".safetensors" and name not in weights:
            left_out[name] = "weights that the model does not load"
        elif name in known or path.suffix == ".json":
            chosen[name] = path
        elif path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            left_out[name] = "a link to outside the folder"
        elif path.suffix in _SUFFIXES or name.startswith(_DOCUMENTS):
            chosen[name] = path
        else:
            left_out[name] = "not part of the model"
    return chosen, left_out


def differences(plan: PushPlan, files: Mapping[str, RemoteFile]) -> list[str]:
    """Names of files that are missing or different on the Hub, and of files that should have been removed."""
    wrong = [
        name for name, content in plan.files.items() if not _is_there(content, files.get(name), plan.weights.get(name))
    ]
    return wrong + [name for name in plan.removed if name in files]


def _is_there(content: Path | bytes, remote: RemoteFile | None, known: SavedFile | None) -> bool:
    """Whether a file on the Hub is the same as one here, whose hash may be known already."""
    if remote is None:
        return False
    if known is not None and remote.is_large:
        return (remote.size, remote.digest) == (known.size, known.sha256)
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    if size != remote.size:
        return False
    digest = hashlib.sha256() if remote.is_large else hashlib.sha1(f"blob {size}\0".encode())
    for piece in _pieces(content):
        digest.update(piece)
    return digest.hexdigest() == remote.digest


def _pieces(content: Path | bytes) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(1 << 20):
            yield piece


def content_of(content: Path | bytes) -> bytes:
    """The content as bytes, read from the file if it is a path."""
    return content if isinstance(content, bytes) else content.read_bytes()
