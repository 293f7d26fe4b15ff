"""`PushesMixin`: pushes during training, in the background, from a copy of the checkpoint."""

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

from huggingface_hub import CommitInfo, HfApi

from ..foreign.transformers import HubStrategy, PushInProgress
from ..publish.hub_errors import explain_error
from ..publish.push import push_model
from ..publish.record import RunRecord, save_record
from ..saved.files import lies_inside
from ..saved.model import SavedModel
from ..saved.pruning_state import state_files
from .base import TrainerBase

logger = logging.getLogger(__name__)


class PushesMixin(TrainerBase):
    """Pushes each checkpoint that `hub_strategy` selects, with its card, in one commit.

    Attributes:
        failed_pushes: a line for each push during training (`hub_strategy`) that failed, with the reason.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.failed_pushes: list[str] = []
        self._pushes: list[tuple[str, Future]] = []  # of this training: when each was started, and its job
        self._hub = HfApi()  # its background pushes run one after another
        super().__init__(*args, **kwargs)

    def _never_save_token(self) -> None:
        """Keep the token out of `training_args.bin`, which the Trainer saves and pushes during training."""
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the extended class does; afterwards `failed_pushes` has the failed pushes of this training."""
        self.failed_pushes = []
        return super().train(*args, **kwargs)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._finalize_training(*args, **kwargs)
        self._report_pushes()
        return output

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Start the push of a complete checkpoint, if `hub_strategy` selects it; every process must call it."""
        if self.pruner is None:
            super()._push_from_checkpoint(checkpoint_folder)
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        digest = self._digest() if self._makes_card else ""
        if not self.is_world_process_zero():
            return
        in_progress: Any = self.push_in_progress
        if in_progress is not None and not in_progress.is_done() and not self.args.hub_always_push:
            return
        if self._makes_card:
            self._push_with_card(Path(checkpoint_folder), digest)
        else:
            self._push_without_card(Path(checkpoint_folder))

    def _push_without_card(self, folder: Path) -> None:
        """Start the extended class's pushes of a checkpoint, with the masks included."""
        if self.push_in_progress is not None:  # it reads the files that are overwritten now
            self.push_in_progress.wait_until_done()
        for path in state_files(folder):  # the Trainer copies only the model's own files
            shutil.copy(path, Path(str(self.args.output_dir), path.name))
        super()._push_from_checkpoint(str(folder))
        known = [job for _, job in self._pushes]
        when = f"step {self.state.global_step}"
        self._pushes += [(when, job) for job in cast(Any, self.push_in_progress).jobs if job not in known]

    def _push_with_card(self, folder: Path, digest: str) -> None:
        """Start a push of model and card in one commit, with the checkpoint if `hub_strategy` includes it."""
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        copy = Path(tempfile.mkdtemp(prefix="_push_", dir=str(self.args.output_dir)))
        files = copy_folder(folder, copy)
        places = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        place = places.get(HubStrategy(self.args.hub_strategy))
        also = {f"{place}/{path.relative_to(copy).as_posix()}": path for path in files if place is not None}
        said = {name: value for name, value in self._said.items() if name != "dense_metrics"}  # of the end of training
        record = self._make_record(said, digest)
        when = f"step {self.state.global_step}"
        job = self._hub.run_as_future(self._push_copy, copy, record, also, f"Training in progress, {when}")
        self._pushes.append((when, job))
        self.push_in_progress: Any = PushInProgress(cast(Any, [job]))

    def _push_copy(self, copy: Path, record: RunRecord, also: Mapping[str, Path], message: str) -> CommitInfo:
        """Push the copy of a checkpoint, with its record and the files in `also`, and remove the copy."""
        try:
            saved = SavedModel(copy)
            save_record(copy, record.model_copy(update={"weights": saved.hashes}))
            return push_model(
                saved,
                self._repo_id,
                revision=self.args.hub_revision,
                with_masks=True,
                also=also,
                message=message,
                token=self.args.hub_token,
            ).commit
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    def _report_pushes(self) -> None:
        """Wait for the pushes that were started, and report those that failed."""
        errors = [(when, job.exception()) for when, job in self._pushes]
        self.failed_pushes = [
            f"{when}: {explain_error(error, self.args.hub_token)}" for when, error in errors if error is not None
        ]
        if self.failed_pushes:
            logger.error(
                "Of %d pushes to the Hub during training, %d failed; push the model with trainer.push_to_hub().\n%s",
                len(errors),
                len(self.failed_pushes),
                "\n".join(self.failed_pushes),
            )
        self._pushes = []


class UnsavedToken(str):
    """A token that is pickled as None: the Trainer saves its arguments, and pushes them during training."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()

    def __copy__(self) -> "UnsavedToken":
        return self

    def __deepcopy__(self, memo: dict) -> "UnsavedToken":
        return self


def copy_folder(folder: Path, copy: Path) -> list[Path]:
    """Copy a folder by hard links where possible. Returns the files of the copy, without links to outside."""
    shutil.copytree(folder, copy, symlinks=True, copy_function=link_or_copy, dirs_exist_ok=True)
    return [path for path in copy.rglob("*") if path.is_file() and lies_inside(path, copy)]


def link_or_copy(source: str, target: str) -> None:
    """Make a hard link to a file, or a copy if the file system does not allow links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
