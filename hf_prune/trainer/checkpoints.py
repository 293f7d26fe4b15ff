"""Atomic checkpoint folders: a folder is written elsewhere and renamed when it is complete.

While a checkpoint is written it lies in `_unfinished/` beside the others, where no resume and no upload looks (the
Trainer's uploads ignore names that begin with `_`). Folders to delete are moved there first. Anything else in there
is a user's, and is left alone.
"""

import contextlib
import re
import shutil
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from ..config.safe_json import read_object
from ..errors import CheckpointError
from ..foreign.transformers import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME, sort_checkpoints
from ..saved.files import ADAPTER_WEIGHTS_NAME, INDEX_NAME, WEIGHTS_NAME

UNFINISHED = "_unfinished"

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")

_OURS = re.compile(rf"(deleted-)?{_CHECKPOINT.pattern}")  # in there

_SENTINEL_NAME = "checkpoint-is-incomplete.txt"

_DEEPSPEED = "global_step"

_OTHER_WEIGHTS = ("pytorch_model", _DEEPSPEED)  # pickles and FSDP's shards, DeepSpeed's shards


def publish(unfinished: Path, final: Path) -> None:
    """Rename a complete folder to its final name; a folder with that name is replaced."""
    if final.exists():
        remove(final)
    unfinished.rename(final)
    remove_leftovers(final.parent)


def remove(folder: Path) -> None:
    """Delete a folder such that it never lies half deleted under its name."""
    aside = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    _delete(aside)
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)
    _delete(aside)
    remove_leftovers(folder.parent)


def _delete(folder: Path) -> None:
    """Delete a folder, or a link and not what it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(directory: Path, everything: bool = False) -> None:
    """Remove `_unfinished/` if it is empty; with `everything`, also what a killed run left in it."""
    folder = directory / UNFINISHED
    if not folder.is_dir():
        return
    for path in folder.iterdir() if everything else ():
        if _OURS.fullmatch(path.name):
            _delete(path)
    with contextlib.suppress(OSError):  # it is not empty, or another run has just removed it
        folder.rmdir()


def rotate(directory: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest or the best, as transformers does."""
    if limit is None or limit <= 0:
        return
    checkpoints = sort_checkpoints(str(directory), use_mtime=True, best_model_checkpoint=best)
    keep = max(limit, 2 if best in checkpoints[:-1] else 1)
    for checkpoint in checkpoints[: max(len(checkpoints) - keep, 0)]:
        remove(Path(checkpoint))


def keep_only(directory: Path, best: str | None) -> None:
    """Remove every checkpoint except the best; none if there is no best."""
    for checkpoint in sort_checkpoints(str(directory)) if best is not None else []:
        if Path(checkpoint) != Path(str(best)):
            remove(Path(checkpoint))


def newest_complete(directory: Path) -> Path | None:
    """The complete checkpoint with the most steps in a directory, or None if there is none."""
    found = [Path(path) for path in sort_checkpoints(str(directory)) if is_checkpoint_name(Path(path).name)]
    return next((path for path in reversed(found) if is_complete(path)), None)


def checkpoint_to_resume(asked: str | Literal[True], directory: Path, with_deepspeed: bool) -> str:
    """The checkpoint to resume from: the given one, or with True the newest complete one in a directory.

    Raises CheckpointError if there is none, or if DeepSpeed wrote it and training does not use DeepSpeed.
    """
    checkpoint = newest_complete(directory) if asked is True else asked
    if checkpoint is None:
        raise CheckpointError("resume_from_checkpoint", f"expected a complete checkpoint in {directory}, found none")
    if not with_deepspeed and is_deepspeed_checkpoint(Path(checkpoint)):
        raise CheckpointError(
            f"{checkpoint}: was written with DeepSpeed, and only DeepSpeed can read its optimizer state; resume with "
            "DeepSpeed, or start a new training from its model with method='keep'"
        )
    return str(checkpoint)


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a checkpoint."""
    return _CHECKPOINT.fullmatch(name) is not None


def is_complete(folder: Path) -> bool:
    """Whether training can resume from a checkpoint: the trainer's state and all weights are there, undamaged.

    The optimizer and the scheduler must be there if anything is that the Trainer writes beside them: a checkpoint of
    `save_only_model` has neither. Weights in other formats than safetensors must exist; they are not read.
    """
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if _SENTINEL_NAME in names or not read_object(folder / TRAINER_STATE_NAME):
        return False
    if not _may_train_on(names):
        return False
    shards = read_object(folder / INDEX_NAME).get("weight_map") if INDEX_NAME in names else {}
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        return False
    files = {*shards.values(), *(name for name in (WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME) if name in names)}
    other_formats = any(name.startswith(_OTHER_WEIGHTS) for name in names)
    return all(_is_whole(folder / name) for name in files) and (bool(files) or other_formats)


def is_deepspeed_checkpoint(folder: Path) -> bool:
    """Whether DeepSpeed wrote the optimizer state of a checkpoint."""
    return folder.is_dir() and any(path.name.startswith(_DEEPSPEED) for path in folder.iterdir())


def was_distilled(folder: Path) -> bool:
    """Whether the training that wrote a checkpoint had a teacher: its logs then have `distillation_loss`."""
    history = read_object(folder / TRAINER_STATE_NAME).get("log_history")
    return isinstance(history, list) and any("distillation_loss" in entry for entry in history if type(entry) is dict)


def _may_train_on(names: set[str]) -> bool:
    """Whether these files include optimizer and scheduler, in any format, or neither of the two."""
    if any(name.startswith(_DEEPSPEED) for name in names):
        return "latest" in names  # DeepSpeed writes it last
    with_optimizer = [name for name in names if name.split(".")[0].split("_")[0] == "optimizer"]
    if with_optimizer or any(name.startswith(("scheduler", "rng_state")) for name in names):
        return bool(with_optimizer) and "scheduler.pt" in names
    return True


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says: not cut off."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False
