"""`PruningTrainer` and `PruningMixin`: what pruning needs of the Trainer that no callback can do."""

import inspect
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .callback import PruningCallback
from .checkpoints import UNFINISHED, keep_only, newest_complete, publish, remove_leftovers, rotate
from .config import PruningConfig
from .pruner import STATE_FILES, Pruner

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class PruningMixin(_Base):
    """Adds pruning to a Trainer class: `class PruningSFTTrainer(PruningMixin, SFTTrainer): ...`.

    The class takes one more argument, keyword-only:

        pruning_config: a `PruningConfig`, or a list of them that apply together or one after another. With None the
            trainer is the one it extends, without any callback of ours.

    Beyond what `PruningCallback` does, gradients are masked once a step, before they are clipped; `sparsity` and
    `target_sparsity` are in the logs of every reporter; every saved model has its masks beside it, also in what is
    pushed to the Hub; `resume_from_checkpoint` takes them from there; a checkpoint has its name only once it is
    complete; and the best model is chosen among those at final sparsity. `trainer.pruner` is the `Pruner`, or None.

    Raises, when it is made: TargetError if the configuration does not fit the model.
    """

    __signature__: inspect.Signature | None

    def __init__(
        self, *args: Any, pruning_config: PruningConfig | Sequence[PruningConfig] | None = None, **kwargs: Any
    ):
        self._pruning: PruningCallback | None = None
        self._unfinished: Path | None = None
        super().__init__(*args, **kwargs)
        if pruning_config is None:
            return
        assert self.model is not None  # Trainer.__init__ has made sure
        pruner = Pruner(self.model, pruning_config)
        self._pruning = PruningCallback(pruning_config, pruner, in_trainer=True)
        self.add_callback(self._pruning)
        _save_on_sigterm_at_step_end(self)

    def __init_subclass__(cls, **kwargs: Any):
        """Show the signature of the Trainer that is extended, and ours after it."""
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__signature__ = None  # that of its own __init__, not an inherited one
            return
        extended = next(base for base in cls.__mro__[1:] if base is not PruningMixin and "__init__" in base.__dict__)
        parameters = list(inspect.signature(extended).parameters.values())
        if any(parameter.name == "pruning_config" for parameter in parameters):
            return
        ours = inspect.signature(PruningMixin.__init__).parameters["pruning_config"]
        after = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        before = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        cls.__signature__ = inspect.Signature([*before, ours, *after])

    @property
    def pruner(self) -> Pruner | None:
        """The pruner; None without a `pruning_config`. Its `plan()` knows the steps that this trainer would train."""
        if self._pruning is None or self._pruning.pruner is None:
            return None
        pruner = self._pruning.pruner
        if pruner.expected_steps is None:
            pruner.expected_steps = training_steps(self.args, self.train_dataset)
        return pruner

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward as the extended class does them; before the clip, masked gradients become zero."""
        loss = super().training_step(*args, **kwargs)
        if self.pruner is not None and self.accelerator.sync_gradients:
            self.pruner.mask_gradients()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the extended class does, with `sparsity` and `target_sparsity` during training."""
        if self._pruning is not None and self.is_in_train:
            logs.update(self._pruning.log_values())
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.pruner is not None and self.args.should_save:
            self.pruner.save(output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._pruning is not None:
            self._pruning.resume_directory = Path(resume_from_checkpoint)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the extended class does; with True, go on from the newest checkpoint that is complete."""
        if self._pruning is not None:
            directory = Path(self._get_output_dir(trial=trial))
            self._pruning.resume_directory = None
            if resume_from_checkpoint is True:
                newest = newest_complete(directory)
                if newest is None:
                    raise ValueError(
                        f"resume_from_checkpoint: expected a complete checkpoint in {directory}, found none"
                    )
                resume_from_checkpoint = str(newest)
            if self.args.should_save:
                remove_leftovers(directory, everything=True)
        return super().train(resume_from_checkpoint, trial, *args, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        if self._pruning is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # resumed after the last step: the Trainer would make one more
            return None
        return super()._run_epoch(*args, **kwargs)

    # ---- A checkpoint is written in a folder aside and gets its name once it is complete ----

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        """The folder that checkpoints lie in; while one is written, the folder aside."""
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
        """Give the checkpoint that is being written its name, when every process has done its part; that path."""
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
        published = self._publish_checkpoint()
        folder = published if published is not None else Path(checkpoint_folder)
        if self.pruner is not None and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            for name in STATE_FILES:  # the Trainer copies only the model's own files
                shutil.copy(folder / name, Path(str(self.args.output_dir), name))
        super()._push_from_checkpoint(str(folder))

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self._pruning is not None and self.args.should_save and self.args.save_total_limit == 1:
            # The Trainer then keeps the best checkpoint alone, and would empty the other under its name.
            keep_only(Path(self._get_output_dir(trial=trial)), self.state.best_model_checkpoint)
        return super()._finalize_training(trial, *args, **kwargs)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Only a model at final sparsity can be the best."""
        if self.pruner is not None and not self.pruner.at_final_sparsity:
            return False
        return super()._determine_best_metric(*args, **kwargs)


class _SaveAtStepEnd(JITCheckpointCallback):
    """Saves and stops on SIGTERM as `enable_jit_checkpoint` asks for, but only when the step is wholly done.

    The Trainer's own saves before the optimizer step, with the random state of a batch that will be drawn again: a
    resumed run would differ. It also makes the checkpoint's folder before anything is in it.
    """

    def __init__(self, stock: JITCheckpointCallback):
        super().__init__()
        self.trainer, self.jit_manager = stock.trainer, stock.jit_manager

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the end of the step."""

    on_step_begin = on_epoch_end = on_pre_optimizer_step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Let the Trainer save and stop."""
        if self.jit_manager is not None and self.jit_manager.is_checkpoint_requested:
            self.jit_manager.is_checkpoint_requested = False
            control.should_save = True
            control.should_training_stop = True


def _save_on_sigterm_at_step_end(trainer: Trainer) -> None:
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, JITCheckpointCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(_SaveAtStepEnd(callback))


def training_steps(args: TrainingArguments, dataset: Any) -> int | None:
    """The optimizer steps of a training with these arguments on this data set; None where it has no length."""
    if args.max_steps > 0:
        return args.max_steps
    if dataset is None or not hasattr(dataset, "__len__"):
        return None
    batches = len(dataset) / (args.train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps_an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * steps_an_epoch)


class PruningTrainer(PruningMixin, Trainer):
    """`transformers.Trainer` that prunes the model while it trains it; takes one more argument, `pruning_config=`.

    trainer = PruningTrainer(model=model, args=args, train_dataset=train,
                             pruning_config=PruningConfig(method="magnitude", sparsity=0.8))
    trainer.train()
    """
