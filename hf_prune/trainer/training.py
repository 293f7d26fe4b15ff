"""`TrainingMixin`: masked gradients, logs, and the start and end of training."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..engines.processes import gather
from ..masking.pruner import Pruner
from .base import TrainerBase
from .callback import PruningCallback
from .checkpoints import checkpoint_to_resume, was_distilled
from .claims import claimed

logger = logging.getLogger(__name__)


class TrainingMixin(TrainerBase):
    """Masks gradients before they are clipped, and adds sparsity and the terms of the loss to the logs."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._pruning: PruningCallback | None = None
        self._loaded_best = False
        self._begin_terms()
        super().__init__(*args, **kwargs)

    def _begin_terms(self) -> None:
        """Reset the sums of the terms of the loss."""
        self._terms: dict[str, torch.Tensor] = {}
        self._terms_since: int | None = None  # the completed optimizer steps at which the sums begin

    @property
    def pruner(self) -> Pruner | None:
        """The pruner; None without a `pruning_config`. Its `plan()` uses the number of steps of this trainer."""
        if self._pruning is None or self._pruning.pruner is None:
            return None
        pruner = self._pruning.pruner
        if pruner.expected_steps is None:
            pruner.expected_steps = training_steps(self.args, self.train_dataset)
        return pruner

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the extended class does; `resume_from_checkpoint=True` resumes from the newest complete checkpoint.

        Raises: CheckpointError, before anything is changed, if there is no checkpoint to resume from, or if another
        training writes to the folder. PruningConfigError for a target, such as a speed-up, that cannot be reached.
        """
        directory = Path(self._get_output_dir(trial=trial)) if self._pruning is not None else Path()
        if self._pruning is not None:
            self._pruning.resume_directory = None
            if resume_from_checkpoint:
                resume_from_checkpoint = checkpoint_to_resume(
                    resume_from_checkpoint, directory, self.is_deepspeed_enabled
                )
                self._pruning.resume_directory = Path(resume_from_checkpoint)
                if self._pruning.pruner is not None:
                    self._pruning.pruner.cut_as_saved(resume_from_checkpoint)
        checkpoint = resume_from_checkpoint or None
        if self.teacher is None and isinstance(checkpoint, str) and was_distilled(Path(checkpoint)):
            logger.warning(
                "%s was trained with a teacher; training continues without one, as no teacher_model is given",
                checkpoint,
            )
        self._loaded_best = False
        if self._pruning is None:
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)
        with claimed(directory, writes=self.args.should_save):
            try:
                if self._pruning.pruner is not None and checkpoint is None:
                    self._pruning.pruner.search(directory, self.args.device)  # before an engine shards the model
                return super().train(resume_from_checkpoint, trial, *args, **kwargs)
            finally:
                self._pruning.remove_hooks()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Start a training with new sums: `auto_find_batch_size` starts several."""
        self._begin_terms()
        return super()._inner_training_loop(*args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._pruning is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # resumed after the last step: the Trainer would train one more
            return None
        return super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of the extended class; then gradients are masked, before they are clipped."""
        if self._terms_since is None:
            self._terms_since = self.state.global_step
        loss = super().training_step(*args, **kwargs)
        if self.pruner is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.pruner.mask_gradients(scaler.get_scale() if scaler is not None else 1.0)
            self._note(self.pruner.penalties, shared=self.pruner.sharded)
        return loss

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Choose the best model among those at final sparsity only."""
        if self.pruner is not None and not self.pruner.at_final_sparsity:
            return False
        return super()._determine_best_metric(*args, **kwargs)

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        super()._load_best_model(*args, **kwargs)
        self._loaded_best = True

    # ---- Logs ----

    def _note(self, terms: Mapping[str, torch.Tensor], shared: bool = False) -> None:
        """Add to the sums of the terms of the loss; with `shared`, each process has the sum over its own shards."""
        factor = self.accelerator.num_processes if shared else 1  # the log has the mean over processes
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + value.detach().float() * factor

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the extended class does, with `sparsity` and `target_sparsity` during training.

        The terms of the training loss are logged with it, averaged over optimizer steps.
        """
        if self._pruning is not None and self.is_in_train:
            logs.update(self._pruning.log_values())
        if "loss" in logs and self._terms_since is not None:
            steps = max(self.state.global_step - self._terms_since, 1)
            for name, value in self._terms.items():
                logs[name] = torch.stack(gather(value)).mean().item() / steps
            self._terms, self._terms_since = {}, None
        super().log(logs, *args, **kwargs)


def training_steps(args: TrainingArguments, dataset: Any) -> int | None:
    """The number of optimizer steps of a training on this data set; None if the data set has no length."""
    if args.max_steps > 0:
        return args.max_steps
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    batches = len(dataset) / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps_an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps_an_epoch)
