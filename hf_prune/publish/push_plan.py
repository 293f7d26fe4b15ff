"""The plan of a push: the files of a saved model, its card, and how they differ from those on the Hub."""

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from ..config.pruning import CONFIG_NAME
from ..errors import CardError, PushError
from ..saved.files import INDEX_NAME, WEIGHTS_NAME, SavedFile, lies_inside
from ..saved.masks import is_mask_file
from ..saved.model import SavedModel
from ..saved.parts import files_of_classes
from ..saved.pruning_state import STATE_NAME
from ..saved.unit_scores import UNIT_SCORES_NAME
from ..structure.chosen import SEARCH_NAME
from ..structure.record import STRUCTURE_NAME
from .card import CARD_NAME, PLOTS, make_files
from .card_explained import EXPLAIN_NAMES, explained_in, shown_texts
from .card_merge import Existing
from .record import RECORD_NAME
from .redact import find_secret, is_password_file
from .sparsity_json import FIGURES_NAME, PACKED_FOLDER, Figures

_DOCUMENTS = ("LICENSE*", "LICENCE*", "NOTICE*", "CITATION*")

_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")

# An image in a card: in Markdown, or in HTML.
_IMAGE = re.compile(r"""!\[[^\]]*\]\(\s*<?([^)\s>]+)|<img\s[^>]*?src=["']([^"']+)""")

_STATE_OF_TRAINING = (
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt"),
    *("zero_to_fp32.py", "zero_to_torch.py", "rng_state*"),  # the former: DeepSpeed's, for its own checkpoints
)

# Files that hf-prune itself writes.
_OWN_FILES = (CARD_NAME, FIGURES_NAME, RECORD_NAME, CONFIG_NAME, STRUCTURE_NAME, SEARCH_NAME, *PLOTS)

_SEARCHED_BYTES = 100 << 20

_NOT_WEIGHTS = (
    *(STATE_NAME, UNIT_SCORES_NAME, STRUCTURE_NAME, SEARCH_NAME, RECORD_NAME),
    *sorted(PLOTS),
    *sorted(EXPLAIN_NAMES),
)

# Files of an earlier push that would be wrong beside the new ones: weights under other names or packed, masks, what was
# cut out, our own plots, and what explains them.
_REPLACED = re.compile(
    rf"{PACKED_FOLDER}/((generation_)?config\.json|model[\w.-]*\.safetensors(\.index\.json)?)|"
    r"(model|adapter_model)[\w.-]*\.safetensors(\.index\.json)?|pytorch_model[\w.-]*\.bin(\.index\.json)?"
    r"|pruning_masks[\w.-]*\.safetensors|" + "|".join(map(re.escape, _NOT_WEIGHTS))
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
    unknown whether the repository exists. `repo_type` is `model` or `space`. `shown_texts` is the number of samples of
    the data whose texts are among the files, in `explain/`.
    """

    repo_id: str
    files: dict[str, Path | bytes]
    weights: dict[str, SavedFile]
    left_out: dict[str, str]
    changed: list[str]
    removed: list[str]
    is_new: bool | None
    sparsity: float | None
    repo_type: str = "model"
    shown_texts: int = 0

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
    include: Collection[str] = (),
) -> PushPlan:
    """Count zeros, make the card, choose the files, and compare them with those on the Hub. Nothing is written.

    `pushed` is the card that was last pushed there from this folder.
    """
    saved = SavedModel.of(folder)
    weights = {path.name for path in saved.weight_files}
    made = make_files(saved, repo_id, remote.card, pushed, _packed_bytes(also or {}))
    chosen, left_out = choose_files(saved, weights, with_masks, include, made[CARD_NAME].decode())
    earlier = PLOTS - made.keys()
    files: dict[str, Path | bytes] = {name: path for name, path in chosen.items() if name not in earlier}
    files |= {**(also or {}), **made}
    refuse_secrets(files)
    figures = Figures.model_validate_json(made[FIGURES_NAME])
    sent_again = {name: path.name for name, path in (also or {}).items() if path in saved.weight_files}
    known = figures.files | {name: figures.files[original] for name, original in sent_again.items()}
    return PushPlan(
        repo_id=repo_id,
        files=dict(sorted(files.items())),
        weights=known,
        left_out=left_out,
        changed=[name for name in sorted(files) if not is_there(files[name], remote.files.get(name), known.get(name))],
        removed=sorted(name for name in remote.files if _REPLACED.fullmatch(name) and name not in files),
        is_new=remote.head is None if remote is not UNKNOWN else None,
        sparsity=figures.overall_sparsity,
        shown_texts=shown_texts(explained_in(saved)) if EXPLAIN_NAMES & files.keys() else 0,
    )


def _packed_bytes(also: Mapping[str, Path]) -> int | None:
    """The size of the packed weights that are pushed beside the model; None if there are none."""
    found = [path for name, path in also.items() if re.fullmatch(rf"{PACKED_FOLDER}/.*\.safetensors", name)]
    return sum(path.stat().st_size for path in found) if found else None


def refuse_secrets(files: Mapping[str, Path | bytes]) -> None:
    """Raise CardError if a file that is to be uploaded seems to contain a secret."""
    for name in sorted(files):
        if is_password_file(name):
            raise CardError(f"{name}: is a file that a program keeps a password in; leave it out")
        kind = find_secret(_searched(files[name]))
        if kind is not None:
            raise CardError(f"{name}: contains what looks like {kind}; remove it before pushing")


def _searched(content: Path | bytes) -> bytes:
    """The part of a file that is searched for secrets: of safetensors the header, of others the first 100 MB."""
    if isinstance(content, bytes):
        return content
    with content.open("rb") as file:
        header = int.from_bytes(file.read(8), "little") if content.suffix == ".safetensors" else _SEARCHED_BYTES
        file.seek(0)
        return file.read(min(header + 8, _SEARCHED_BYTES))


def choose_files(
    folder: str | os.PathLike,
    weights: Collection[str],
    with_masks: bool,
    include: Collection[str] = (),
    card: str = "",
) -> tuple[dict[str, Path], dict[str, str]]:
    """The files of a folder that belong to the model, and why others are left out; folders are named with a slash.

    Chosen are the weights, what the model's own classes read, card, license and images that the card shows, and what
    the patterns of `include` match, and `explain/` if it explains the weights that are there now; masks only
    `with_masks`, never hidden files, and nothing outside the folder.

    Raises PushError for a pattern that matches no file, and ReportError for an invalid list of modules.
    """
    saved = SavedModel.of(folder)
    folder = saved.folder
    wanted = {*weights, *files_of_classes(folder), *_images_in(card), *_OWN_FILES}
    explained = explained_in(saved)
    wanted |= explained.names if explained is not None else set()
    wanted |= {INDEX_NAME} if weights and WEIGHTS_NAME not in weights else set()
    wanted |= {path.name for pattern in _DOCUMENTS for path in folder.glob(pattern)}
    if with_masks:
        wanted |= {path.name for path in folder.iterdir() if _is_state(path.name)}
    wanted |= {name for name in _included(folder, include) if with_masks or not _is_state(PurePosixPath(name).name)}
    there = {name: folder / name for name in sorted(wanted) if os.path.isfile(folder / name)}
    chosen = {name: path for name, path in there.items() if lies_inside(path, folder)}
    left_out: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        inner = [path]
        if path.is_dir() and any(name.startswith(f"{path.name}/") for name in there):
            inner = [file for file in sorted(path.rglob("*")) if file.is_file()]
        for file in inner:
            name = file.relative_to(folder).as_posix()
            if name not in chosen:
                left_out[f"{name}/" if file.is_dir() else name] = _why_left_out(file, folder)
    return chosen, left_out


def _why_left_out(path: Path, folder: Path) -> str:
    name = path.name
    if not lies_inside(path, folder):
        return "a link to outside the folder"
    if name.startswith("."):
        return "hidden file"
    if any(fnmatchcase(name, pattern) for pattern in _STATE_OF_TRAINING):
        return "training state"
    if _is_state(name):
        return "masks, uploaded with --with-masks"
    if path.suffix == ".safetensors" or name == INDEX_NAME:
        return "weights that the model does not load"
    if {path.relative_to(folder).as_posix(), f"{path.relative_to(folder)}/explanation.json"} & EXPLAIN_NAMES:
        return "explains other weights"
    return "a folder that is not part of the model" if path.is_dir() else "not read by the model's classes"


def _is_state(name: str) -> bool:
    return is_mask_file(name) or name in (STATE_NAME, UNIT_SCORES_NAME)


def _included(folder: Path, patterns: Collection[str]) -> set[str]:
    """The names of the files that the patterns match."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()] if patterns else []
    names = [file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts)]
    found = {pattern: [name for name in names if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, matched in found.items():
        if not matched:
            raise PushError("include", f"expected names or patterns of files in {folder}, {pattern!r} matches none")
    return {name for matched in found.values() for name in matched}


def _images_in(card: str) -> set[str]:
    """The names of images that a card shows, as they would be in the folder."""
    shown = (unquote(in_markdown or in_html) for in_markdown, in_html in _IMAGE.findall(card))
    names = {name.removeprefix("./") for name in shown if name.lower().endswith(_IMAGES)}
    return {name for name in names if not name.startswith("/") and ".." not in Path(name).parts}


def differences(plan: PushPlan, files: Mapping[str, RemoteFile]) -> list[str]:
    """Names of files that are missing or different on the Hub, and of files that should have been removed."""
    wrong = [
        name for name, content in plan.files.items() if not is_there(content, files.get(name), plan.weights.get(name))
    ]
    return wrong + [name for name in plan.removed if name in files]


def is_there(content: Path | bytes, remote: RemoteFile | None, known: SavedFile | None) -> bool:
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
