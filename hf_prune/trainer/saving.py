"""`SavingMixin`: saves models and checkpoints with their masks, and resumes from them.

A checkpoint is written in another folder, which is renamed once it is complete.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ..engines.fsdp_checkpoints import is_fsdp_checkpoint, load_fsdp_model, load_fsdp_optimizer
from ..engines.processes import raised_by_all
from ..foreign.transformers import PREFIX_CHECKPOINT_DIR, SCHEDULER_NAME, TRAINER_STATE_NAME
from ..masking.structures import SmallerModel
from ..publish.card import keep_card
from ..saved.files import WEIGHTS_NAME
from ..saved.shapes import check_shapes
from .base import TrainerBase
from .checkpoints import UNFINISHED, keep_only, publish, rotate


class SavingMixin(TrainerBase):
    """Saves masks with every model, makes checkpoints visible only when complete, and reads those of FSDP."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._unfinished: Path | None = None
        self._smaller: SmallerModel | None = None  # that is being saved in place of a sharded model
        super().__init__(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the extended class does, for `from_pretrained`, with its masks beside it.

        Every process must call it. With sharded state dicts (FSDP2), where the extended class saves no model outside
        checkpoints, the whole model is saved.
        """
        if self.pruner is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or str(self.args.output_dir)
        self.pruner.hold_zeros()
        of_checkpoint = self._unfinished is not None
        self._smaller = self.pruner.smaller_model() if self.pruner.sharded and not of_checkpoint else None
        if self._smaller is None:
            self.pruner.save_from_all(folder, self.args.should_save)
        elif self.args.should_save:
            self._smaller.save(folder)
        with (
            whole_state_dict(self.accelerator) if self._unfinished is None else nullcontext(),
            keep_card(folder) if self.args.should_save else nullcontext(),
        ):
            super().save_model(output_dir, _internal_call)
        smaller, self._smaller = self._smaller, None
        of_all = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with raised_by_all() if of_all or of_checkpoint else nullcontext():  # else one process may save alone
            if self.args.should_save and (smaller is not None or self.pruner.removed is not None):
                check_shapes(folder)
        if of_all:
            self.accelerator.wait_for_everyone()  # a process that exits now could stop the one that writes

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model, or the smaller one that is left of a sharded model, whose whole tensors are given."""
        if self._smaller is None or not state_dict:
            super()._save(output_dir, state_dict)
            return
        whole, self.model = self.model, self._smaller.skeleton
        try:
            super()._save(output_dir, self._smaller.cut.tensors(state_dict))
        finally:
            self.model = whole

    # ---- Resuming ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._pruning is not None and self.model_init is not None and self.pruner is not None and model is None:
            self.pruner.cut_as_saved(resume_from_checkpoint, cast(nn.Module, self.model))
        if self._pruning is not None and self._is_of_fsdp(resume_from_checkpoint):
            load_fsdp_model(cast(nn.Module, model if model is not None else self.model), Path(resume_from_checkpoint))
        elif model is None:
            super()._load_from_checkpoint(resume_from_checkpoint)  # not every class takes a model
            self._load_renamed(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        super()._load_best_model(*args, **kwargs)
        if self.state.best_model_checkpoint is not None:
            self._load_renamed(self.state.best_model_checkpoint)

    def _load_renamed(self, checkpoint: str) -> None:
        """Load the weights of a class that saves them under other names than its own, such as those of ViT and Mixtral.

        The Trainer (5.23) leaves such weights as they were, with a warning.
        """
        model = self.model
        if self.pruner is None or self.pruner.sharded or not isinstance(model, PreTrainedModel):
            return
        names = _names_in(Path(checkpoint))
        if names - model.state_dict().keys():
            opened = type(model).from_pretrained(checkpoint, dtype=model.dtype)
            model.load_state_dict(opened.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._pruning is not None and self._is_of_fsdp(checkpoint):
            load_fsdp_optimizer(
                cast(nn.Module, self.model), cast(torch.optim.Optimizer, self.optimizer), Path(checkpoint)
            )
            cast(Any, self.lr_scheduler).load_state_dict(
                torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
            )
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _is_of_fsdp(self, checkpoint: str) -> bool:
        """Whether FSDP wrote a checkpoint and training does not use FSDP, which the Trainer does not support."""
        return not self.is_fsdp_enabled and is_fsdp_checkpoint(Path(checkpoint))

    # ---- Checkpoints ----

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        """The folder of checkpoints; while one is being written, `_unfinished/` in it."""
        directory = super()._get_output_dir(*args, **kwargs)
        return directory if self._unfinished is None else str(self._unfinished.parent)

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        if self._pruning is None:
            super()._save_checkpoint(model, trial, *args, **kwargs)
            return
        directory = Path(self._get_output_dir(trial=trial))
        self._unfinished = directory / UNFINISHED / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)
            self._publish_checkpoint()
        finally:
            self._unfinished = None
        if self.args.should_save:
            rotate(directory, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _publish_checkpoint(self) -> Path | None:
        """Rename the checkpoint that is being written once every process is done; returns its final path."""
        if self._unfinished is None:
            return None
        unfinished, self._unfinished = self._unfinished, None
        directory = unfinished.parents[1]
        final = directory / unfinished.name
        self.accelerator.wait_for_everyone()
        best = directory / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == final or best.exists():
            self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / TRAINER_STATE_NAME))
            publish(unfinished, final)
        self.accelerator.wait_for_everyone()
        return final

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Rename the checkpoint before it is pushed: the Trainer pushes at the end of `_save_checkpoint`."""
        published = self._publish_checkpoint()
        super()._push_from_checkpoint(checkpoint_folder if published is None else str(published))

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self._pruning is not None and self.args.should_save and self.args.save_total_limit == 1:
            # The Trainer then keeps only the best checkpoint, and would delete the other in place, not atomically.
            keep_only(Path(self._get_output_dir(trial=trial)), self.state.best_model_checkpoint)
        return super()._finalize_training(trial, *args, **kwargs)


def _names_in(folder: Path) -> set[str]:
    """The names of the weights of a model in a folder, from `model.safetensors`; none without it."""
    path = folder / WEIGHTS_NAME
    if not path.exists():
        return set()
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


@contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Save whole models, whatever state dict type FSDP is set to; without FSDP this does nothing."""
    plugin = accelerator.state.fsdp_plugin if accelerator.is_fsdp2 else None
    if plugin is None:
        yield
        return
    kind = plugin.state_dict_type
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kind)
