"""Checkpoint folders: complete or not there. A folder is filled elsewhere and gets its name in one step.

While a checkpoint is written it lies in `_unfinished/` beside the others, where no resume and no upload looks (the
Trainer's uploads leave out names that begin with `_`). What is to be deleted is moved there first, too.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..foreign.transformers import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME, sort_checkpoints

UNFINISHED = "_unfinished"

_WEIGHTS_NAMES = ("model.safetensors", "adapter_model.safetensors")

_INDEX_NAME = "model.safetensors.index.json"

_SENTINEL_NAME = "checkpoint-is-incomplete.txt"

_DEEPSPEED = "global_step"

_OTHER_WEIGHTS = ("pytorch_model", _DEEPSPEED)  # pickles and FSDP's shards, DeepSpeed's shards


def publish(unfinished: Path, final: Path) -> None:
    """Give a filled folder its name; what has that name already is replaced."""
    if final.exists():
        remove(final)
    unfinished.rename(final)
    remove_leftovers(final.parent)


def remove(folder: Path) -> None:
    """Delete a folder such that it is never seen half empty under its name."""
    aside = folder.parent / UNFINISHED / f"deleted-{folder.name}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
    remove_leftovers(folder.parent)


def remove_leftovers(directory: Path, everything: bool = False) -> None:
    """Remove `_unfinished/` if it is empty; with `everything`, also if a run that was killed left something in it."""
    folder = directory / UNFINISHED
    if everything:
        shutil.rmtree(folder, ignore_errors=True)
    elif folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def rotate(directory: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, never the newest nor the best; as transformers chooses them."""
    if limit is None or limit <= 0:
        return
    checkpoints = sort_checkpoints(str(directory), use_mtime=True, best_model_checkpoint=best)
    keep = max(limit, 2 if best in checkpoints[:-1] else 1)
    for checkpoint in checkpoints[: max(len(checkpoints) - keep, 0)]:
        remove(Path(checkpoint))


def keep_only(directory: Path, best: str | None) -> None:
    """Remove every checkpoint but the best; none if there is no best."""
    for checkpoint in sort_checkpoints(str(directory)) if best is not None else []:
        if Path(checkpoint) != Path(str(best)):
            remove(Path(checkpoint))


def newest_complete(directory: Path) -> Path | None:
    """The complete checkpoint with the most steps in a directory, or None if there is none."""
    found = [Path(path) for path in sort_checkpoints(str(directory)) if _is_checkpoint(Path(path))]
    return next((path for path in reversed(found) if is_complete(path)), None)


def checkpoint_to_resume(asked: str | Literal[True], directory: Path, with_deepspeed: bool) -> str:
    """The checkpoint to go on from: the one that was asked for, with True the newest complete one in a directory.

    Raises CheckpointError if there is none, and for one of DeepSpeed where training goes on without.
    """
    checkpoint = newest_complete(directory) if asked is True else asked
    if checkpoint is None:
        raise CheckpointError("resume_from_checkpoint", f"expected a complete checkpoint in {directory}, found none")
    if not with_deepspeed and is_deepspeed_checkpoint(Path(checkpoint)):
        raise CheckpointError(
            f"{checkpoint}: expected a checkpoint of this way of training, got one of DeepSpeed, which alone reads "
            "its optimizer's state; go on with DeepSpeed, or start anew from its model with method='keep'"
        )
    return str(checkpoint)


def _is_checkpoint(folder: Path) -> bool:
    return folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdecimal()


def is_complete(folder: Path) -> bool:
    """Whether training can go on from a checkpoint: its state and weights are there and whole.

    The optimizer and the scheduler must be there if anything is that the Trainer writes beside them: a checkpoint of
    `save_only_model` has neither. Weights in other formats than safetensors are only looked for, not into.
    """
    names = {path.name for path in folder.iterdir()}
    if _SENTINEL_NAME in names or _read_json(folder / TRAINER_STATE_NAME) is None:
        return False
    if not _may_train_on(names):
        return False
    index = _read_json(folder / _INDEX_NAME) if _INDEX_NAME in names else {"weight_map": {}}
    if index is None:
        return False
    files = {*index["weight_map"].values(), *(name for name in _WEIGHTS_NAMES if name in names)}
    other_formats = any(name.startswith(_OTHER_WEIGHTS) for name in names)
    return all(_is_whole(folder / name) for name in files) and (bool(files) or other_formats)


def is_deepspeed_checkpoint(folder: Path) -> bool:
    """Whether DeepSpeed wrote the optimizer's state of a checkpoint."""
    return folder.is_dir() and any(path.name.startswith(_DEEPSPEED) for path in folder.iterdir())


def was_distilled(folder: Path) -> bool:
    """Whether the training that wrote a checkpoint had a teacher: its logs have what one added to the loss."""
    history = (_read_json(folder / TRAINER_STATE_NAME) or {}).get("log_history", [])
    return any("distillation_loss" in entry for entry in history)


def _may_train_on(names: set[str]) -> bool:
    """Whether optimizer and scheduler are among these files, in any of the ways in which they are saved, or neither."""
    if any(name.startswith(_DEEPSPEED) for name in names):
        return "latest" in names  # DeepSpeed writes it last
    with_optimizer = [name for name in names if name.split(".")[0].split("_")[0] == "optimizer"]
    if with_optimizer or any(name.startswith(("scheduler", "rng_state")) for name in names):
        return bool(with_optimizer) and "scheduler.pt" in names
    return True


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _read_json(file: Path) -> Any:
    """The content of a file, or None if it is missing or broken."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
