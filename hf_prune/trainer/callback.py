"""`PruningCallback`: calls a `Pruner` at the events of a Trainer.

One optimizer step of `transformers.Trainer`, and what happens at each event:

    on_train_begin           start the pruner, or resume it from the checkpoint; updates due at step 0
    for each micro-batch:
        forward, backward    gradients of masked weights are zeroed as they are accumulated
        on_substep_end       masked weights are zeroed, for optimizers that change weights in backward
    clip gradients
    on_pre_optimizer_step    gradients are collected for criteria that read them
    optimizer.step()
    on_optimizer_step        masked weights are zeroed, for optimizers that do not work element by element
    on_step_end              masks are updated if due, and weights and moments with them
    on_log                   sparsity and target_sparsity are added to the logs
    evaluate, save
    on_save                  masks, configuration and state are saved in the checkpoint
    on_train_end             hooks are removed
"""

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config.checks import as_path
from ..config.pruning import PruningConfig
from ..engines.choose import SHARED_MERGE, is_shared_model
from ..engines.optimizers import updates_in_backward
from ..errors import PruningConfigError, PruningStateError, StructureError
from ..foreign.transformers import PREFIX_CHECKPOINT_DIR
from ..masking.finding import as_configs
from ..masking.pruner import Pruner
from ..masking.readings import check_reads
from ..methods.table import remembers_gradients
from ..model.anatomy import has_adapters
from ..saved.pruning_state import state_files
from ..structure.chosen import target_of
from .latency import SAMPLES

logger = logging.getLogger(__name__)

# What ZeRO-3 needs to be set to save whole models.
_GATHERED = "stage3_gather_16bit_weights_on_model_save"


class PruningCallback(TrainerCallback):
    """Prunes the model of any `Trainer` during training: `Trainer(..., callbacks=[PruningCallback(config)])`.

    Masks, weights and moments are as exact as with `PruningTrainer`. What a callback cannot change is the reporters'
    logs (sparsity is only in `state.log_history` and on the progress bar), the Hub push of a checkpoint, which the
    Trainer makes before `on_save`, so without the masks, and `trainer.save_model(DIR)`, which saves the sparse weights
    alone: call `callback.pruner.save(DIR)` after it, and reports and cards know the configuration.

    Args:
        config: one configuration, or several that apply together or one after another.
        pruner: an existing pruner to use; by default one is made from `config` when training begins.
        in_trainer: whether a `PruningMixin` masks the gradients after backward and saves masks with each model; if not,
            the callback does both, with hooks on the parameters and in `on_save`.

    Attributes:
        resume_directory: the checkpoint that training resumes from. The Trainer does not tell a callback which one that
            is: if it is not in `output_dir`, set this before `trainer.train(resume_from_checkpoint=...)`; otherwise
            PruningStateError is raised if there is no such folder in `output_dir`.
    """

    def __init__(
        self,
        config: PruningConfig | Sequence[PruningConfig],
        pruner: Pruner | None = None,
        in_trainer: bool = False,
    ):
        self.config = config if pruner is not None else as_configs(config)
        self.pruner = pruner
        self.resume_directory: str | os.PathLike | None = None
        self._in_trainer = in_trainer
        self._training = False
        self._hooks: list[Any] = []
        self._shrinks_at_end = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the pruner on the model as it is now, or resume it from the checkpoint."""
        model: nn.Module = kwargs["model"]
        optimizer = kwargs.get("optimizer")
        if self.pruner is None:
            self.pruner = Pruner(model, self.config, example=partial(_first_samples, kwargs.get("train_dataloader")))
        check_needs(self.pruner.configs, args, with_deepspeed=bool(args.deepspeed))
        if not self._in_trainer and is_shared_model(model):
            _refuse_structures(
                self.pruner.configs,
                "cannot be removed in PruningCallback from a model that is sharded over processes, which the Trainer "
                "saves whole; use PruningTrainer, or PruningMixin with your Trainer class, or train with DDP or ZeRO-2",
            )
        directory = as_path(self.resume_directory or _checkpoint_directory(args, state))
        if state.global_step == 0:
            self.pruner.search(args.output_dir, model=model)
            self.pruner.start(state.max_steps, model, optimizer=optimizer)
        elif state_files(directory):
            # The Trainer has loaded the weights of a checkpoint; a base model of adapters is not among them.
            guessed = self.resume_directory is None and not has_adapters(model) and not args.deepspeed
            self.pruner.resume(state.max_steps, directory, model, optimizer, zeros_loaded=guessed)
        elif self.resume_directory is None and not directory.is_dir():
            raise PruningStateError(
                f"{directory}: expected the checkpoint that training resumes from, got no such folder, so its masks "
                "are unknown; set resume_directory of the PruningCallback to the checkpoint's folder before train()"
            )
        else:
            logger.warning("%s has no masks: training was dense so far, and pruning starts now.", directory)
            self.pruner.start(state.max_steps, model, state.global_step, optimizer)
        if not self.pruner.at_final_sparsity:
            _forget_best(state)
        if self.pruner.has_penalties and updates_in_backward(optimizer):
            raise PruningConfigError("penalty", f"must not be set with {args.optim}, which steps inside backward")
        if self.pruner.has_penalties and args.fp16 and not self._in_trainer and not self.pruner.steps_in_backward:
            raise PruningConfigError(
                "penalty", "must not be set with fp16 in PruningCallback; use PruningTrainer, or bf16"
            )
        remembering = [
            config.method for config in self.pruner.configs if remembers_gradients(config.method, config.structure)
        ]
        if remembering and args.fp16 and not self._in_trainer:
            raise PruningConfigError(
                "method", f"{remembering[0]!r} cannot be used with fp16 in PruningCallback; use PruningTrainer, or bf16"
            )
        self._training = True
        self._shrinks_at_end = False
        self._hook_gradients(optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a best model that was not at final sparsity, if the trainer has chosen one."""
        if self.pruner is not None and not self.pruner.at_final_sparsity:
            _forget_best(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set masked weights back to zero before the next micro-batch, if the optimizer updates them in backward."""
        if self.pruner is not None and updates_in_backward(kwargs["optimizer"]):
            self.pruner.mask_weights()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass the gradients of the whole batch to the pruner, if it needs them and the trainer does not do it."""
        wanted = self.pruner is not None and (self.pruner.needs_gradients or self.pruner.has_penalties)
        if self.pruner is not None and wanted and not self._in_trainer:
            self.pruner.mask_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set masked weights back to zero if the optimizer may have changed them."""
        if self.pruner is not None:
            self.pruner.after_optimizer_step(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update masks if due after the step that was just completed."""
        if self.pruner is not None:
            self.pruner.update(state.global_step, kwargs["optimizer"])
            if self.pruner.can_shrink and not self._shrinks_at_end:
                self._shrink(args, kwargs["optimizer"])

    def _shrink(self, args: TrainingArguments, optimizer: Any) -> None:
        """Cut removed structures out of the model while it is trained, or note that it has to wait for the end."""
        assert self.pruner is not None
        alone = args.world_size == 1 and args.n_gpu <= 1 and not args.torch_compile and not args.deepspeed
        self._shrinks_at_end = not alone
        if alone:
            try:
                self.pruner.shrink(optimizer)
            except StructureError as error:
                logger.info("The masked units are cut out of the model when training ends, not now: %s", error)
                self._shrinks_at_end = True
            self._hook_gradients(optimizer)

    def _hook_gradients(self, optimizer: Any) -> None:
        """Mask gradients in backward, if the trainer does not do it."""
        assert self.pruner is not None
        for hook in self._hooks:
            hook.remove()
        if not self._in_trainer or self.pruner.steps_in_backward:
            self._hooks = self.pruner.mask_gradients_in_backward(optimizer)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add sparsity to the logs, if the trainer does not do it."""
        logs = kwargs.get("logs")
        if logs is not None and self._training and not self._in_trainer:
            for name, value in self.log_values().items():
                logs.setdefault(name, value)
                state.log_history[-1].setdefault(name, value)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save masks, configuration and state in the checkpoint, if the trainer does not do it."""
        if self.pruner is not None and not self._in_trainer:
            directory = _checkpoint_directory(args, state)
            if self.pruner.hold_zeros():
                logger.warning(
                    "%s: the Trainer saved the model before these weights were set to zero; use PruningTrainer, which "
                    "sets them to zero first",
                    directory,
                )
            self.pruner.save_from_all(directory, args.should_save)
        if self.pruner is not None and not self.pruner.at_final_sparsity:
            _forget_best(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks, hold the zeros, and warn if training stopped before the schedule ended.

        Raises PruningStateError if the best model was to be loaded and none was saved at final sparsity.
        """
        self._training = False
        self.remove_hooks()
        if self.pruner is None:
            return
        self.pruner.hold_zeros()  # the best model may be one that a stock Trainer saved before `on_save`
        if self.pruner.can_shrink:
            self.pruner.shrink()
        self.pruner.measure_target()
        if not self.pruner.at_final_sparsity:
            logger.warning(
                "Training stopped at step %d, before pruning ended at step %d: sparsity is %.2f%%, not %.2f%%.",
                state.global_step,
                self.pruner.last_update_step,
                100 * self.pruner.sparsity,
                100 * (self.pruner.target_sparsity or 0.0),
            )
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            raise PruningStateError(
                "load_best_model_at_end",
                f"after {state.global_step} steps no checkpoint has been evaluated at final sparsity, which is reached "
                f"at step {self.pruner.last_update_step}; the model is that of the last step. End pruning earlier, or "
                "evaluate and save later.",
            )

    def log_values(self) -> dict[str, float]:
        """`sparsity` (current share of masked weights) and `target_sparsity` (at the end); empty before training."""
        if self.pruner is None or self.pruner.target_sparsity is None:
            return {}
        if not self.pruner.targets and self.pruner.removed is None:
            return {}
        return {"sparsity": self.pruner.sparsity, "target_sparsity": self.pruner.target_sparsity}

    def remove_hooks(self) -> None:
        """Remove all hooks from the model and its optimizer, when training is over or has failed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.pruner is not None:
            self.pruner.stop_collecting()


def _first_samples(loader: Any) -> Any:
    """A batch of the first samples of a loader's data set, put together as the loader does; None if it has none."""
    dataset: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if collate is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    with torch.random.fork_rng():
        return collate([dataset[index] for index in range(min(SAMPLES, len(dataset)))])


def check_needs(configs: Sequence[PruningConfig], args: TrainingArguments, with_deepspeed: bool) -> None:
    """Raise PruningConfigError for a method that reads what this way of training does not give access to."""
    for config in configs:
        check_reads(config, shows_gradients=not with_deepspeed, shows_inputs=not args.torch_compile)
    if with_deepspeed and any(config.adapters == "sparse_merge" for config in configs):
        raise PruningConfigError(*SHARED_MERGE)


def check_saving(configs: Sequence[PruningConfig], deepspeed_plugin: Any) -> None:
    """Raise PruningConfigError for structures where ZeRO-3, by its plugin of accelerate, saves no whole model."""
    if deepspeed_plugin is None or deepspeed_plugin.zero_stage != 3:
        return
    if deepspeed_plugin.hf_ds_config.get_value(f"zero_optimization.{_GATHERED}") is not True:
        _refuse_structures(
            configs,
            "cannot be removed where ZeRO-3 saves no whole model, of which the smaller one is made: set "
            f"{_GATHERED} to true in DeepSpeed's configuration",
        )


def _refuse_structures(configs: Sequence[PruningConfig], why: str) -> None:
    for config in configs:
        target = target_of(config)
        if config.structure is not None or target is not None:
            raise PruningConfigError(target.name if target is not None else "structure", why)


def _forget_best(state: TrainerState) -> None:
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _checkpoint_directory(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of this step's checkpoint; in a hyperparameter search the newest one, in the folder of its trial."""
    output, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    in_trials = output.glob(f"*/{name}") if state.is_hyper_param_search else ()
    return max(in_trials, key=lambda path: path.stat().st_mtime_ns, default=output / name)
