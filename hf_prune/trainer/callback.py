"""`PruningCallback`: events of the Trainer -> `Pruner`.

One optimizer step of `transformers.Trainer`, and what is done at each event:

    on_train_begin           start the pruner, or resume it from the checkpoint; an update due at step 0
    for each micro-batch:
        forward, backward    gradients of masked weights become zero as they are accumulated
        on_substep_end       weights back to zero, for optimizers that change them in backward
    clip gradients
    on_pre_optimizer_step    criteria that read gradients see them
    optimizer.step()
    on_optimizer_step        weights back to zero, for optimizers that do not work element by element
    on_step_end              masks are updated if due; weights and moments follow
    on_log                   sparsity and target_sparsity join the logs
    evaluate, save
    on_save                  masks, configuration and state go into the checkpoint
    on_train_end             gradients are left alone again
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config.pruning import PruningConfig
from ..engines.choose import shared_merge_error
from ..engines.optimizers import updates_in_backward
from ..errors import PruningConfigError, PruningStateError
from ..foreign.transformers import PREFIX_CHECKPOINT_DIR
from ..masking.pruner import Pruner
from ..masking.readings import check_reads
from ..saved.pruning_state import state_files

logger = logging.getLogger(__name__)


class PruningCallback(TrainerCallback):
    """Prunes the model of any `Trainer` while it is trained: `Trainer(..., callbacks=[PruningCallback(config)])`.

    Masks, weights and moments are as exact as with `PruningTrainer`. What a callback cannot reach is the reporters'
    logs (sparsity is in `state.log_history` and on the progress bar only) and the Hub push of a checkpoint, which the
    Trainer makes before `on_save`.

    Args:
        config: one configuration, or several that apply together or one after another.
        pruner: a pruner made beforehand, in place of one made from `config` when training begins.
        in_trainer: whether a `PruningMixin` masks the gradients after backward and saves masks with each model; if not,
            the callback does both, by hooks on the parameters and in `on_save`.
    """

    def __init__(
        self,
        config: PruningConfig | Sequence[PruningConfig],
        pruner: Pruner | None = None,
        in_trainer: bool = False,
    ):
        self.config = config
        self.pruner = pruner
        self.resume_directory: Path | None = None
        self._in_trainer = in_trainer
        self._training = False
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the pruner on the model as it is now, or resume it from the checkpoint."""
        model: nn.Module = kwargs["model"]
        optimizer = kwargs.get("optimizer")
        if self.pruner is None:
            self.pruner = Pruner(model, self.config)
        check_needs(self.pruner.configs, args, with_deepspeed=bool(args.deepspeed))
        directory = self.resume_directory or _checkpoint_directory(args, state)
        if state.global_step == 0:
            self.pruner.start(state.max_steps, model, optimizer=optimizer)
        elif state_files(directory):
            self.pruner.resume(state.max_steps, directory, model, optimizer)
        else:
            logger.warning("%s has no masks: the training so far was dense; pruning begins here.", directory)
            self.pruner.start(state.max_steps, model, state.global_step, optimizer)
        if not self.pruner.at_final_sparsity:
            _forget_best(state)
        if self.pruner.has_penalties and updates_in_backward(optimizer):
            raise PruningConfigError("penalty", f"expected none with {args.optim}, which steps inside backward")
        if self.pruner.has_penalties and args.fp16 and not self._in_trainer and not self.pruner.steps_in_backward:
            raise PruningConfigError("penalty", "expected none with fp16 in a callback; use PruningTrainer, or bf16")
        if self.pruner.remembers_gradients and args.fp16 and not self._in_trainer:
            raise PruningConfigError(
                "method", "expected no 'movement' with fp16 in a callback; use PruningTrainer, or bf16"
            )
        self._training = True
        for hook in self._hooks:
            hook.remove()
        if not self._in_trainer or self.pruner.steps_in_backward:
            self._hooks = self.pruner.mask_gradients_in_backward(optimizer)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget a best model that was not at final sparsity, where the trainer has taken one for the best."""
        if self.pruner is not None and not self.pruner.at_final_sparsity:
            _forget_best(state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put masked weights back to zero where backward itself has moved them, before the next micro-batch."""
        if self.pruner is not None and updates_in_backward(kwargs["optimizer"]):
            self.pruner.mask_weights()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the pruner the gradients of the whole batch, where it wants them and the trainer has not."""
        wanted = self.pruner is not None and (self.pruner.needs_gradients or self.pruner.has_penalties)
        if self.pruner is not None and wanted and not self._in_trainer:
            self.pruner.mask_gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put masked weights back to zero where the optimizer may have moved them."""
        if self.pruner is not None:
            self.pruner.after_optimizer_step(kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update masks if that is due after the step that was just completed."""
        if self.pruner is not None:
            self.pruner.update(state.global_step, kwargs["optimizer"])

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add sparsity to the logs, where the trainer has not."""
        logs = kwargs.get("logs")
        if logs is not None and self._training and not self._in_trainer:
            for name, value in self.log_values().items():
                logs.setdefault(name, value)
                state.log_history[-1].setdefault(name, value)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put masks, configuration and state into the checkpoint, where the trainer has not."""
        if self.pruner is not None and not self._in_trainer:
            self.pruner.save_from_all(_checkpoint_directory(args, state), args.should_save)
        if self.pruner is not None and not self.pruner.at_final_sparsity:
            _forget_best(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave gradients alone again, and say so if the schedule has not come to its end.

        Raises PruningStateError if the best model was to be loaded and none was saved at final sparsity.
        """
        self._training = False
        self.remove_hooks()
        if self.pruner is None:
            return
        if not self.pruner.at_final_sparsity:
            logger.warning(
                "Training ended after %d optimizer steps, pruning would have after %d: sparsity is %.2f%%, not %.2f%%.",
                state.global_step,
                self.pruner.last_update_step,
                100 * self.pruner.sparsity,
                100 * (self.pruner.target_sparsity or 0.0),
            )
        if args.load_best_model_at_end and state.best_model_checkpoint is None:
            raise PruningStateError(
                "load_best_model_at_end",
                f"expected a checkpoint that was evaluated at final sparsity, from step "
                f"{self.pruner.last_update_step} on, found none after {state.global_step} steps; the model is the last "
                "one. End pruning earlier, or evaluate and save later.",
            )

    def log_values(self) -> dict[str, float]:
        """`sparsity` (masked share of the targets now) and `target_sparsity` (at the end), once training has begun."""
        if self.pruner is None or self.pruner.target_sparsity is None or not self.pruner.targets:
            return {}
        return {"sparsity": self.pruner.sparsity, "target_sparsity": self.pruner.target_sparsity}

    def remove_hooks(self) -> None:
        """Leave the model and its optimizer as they were: training is over, or has failed."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self.pruner is not None:
            self.pruner.stop_collecting()


def check_needs(configs: Sequence[PruningConfig], args: TrainingArguments, with_deepspeed: bool) -> None:
    """Raise PruningConfigError for a method that reads what this way of training does not show."""
    for config in configs:
        check_reads(config, shows_gradients=not with_deepspeed, shows_inputs=not args.torch_compile)
    if with_deepspeed and any(config.adapters == "sparse_merge" for config in configs):
        raise shared_merge_error()


def _forget_best(state: TrainerState) -> None:
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _checkpoint_directory(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the checkpoint of this step lies; in a hyperparameter search the newest one, in the folder of its trial."""
    output, name = Path(str(args.output_dir)), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    in_trials = output.glob(f"*/{name}") if state.is_hyper_param_search else ()
    return max(in_trials, key=lambda path: path.stat().st_mtime_ns, default=output / name)
