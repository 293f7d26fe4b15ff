"""`PruningTrainer` and `PruningMixin`: what pruning needs of the Trainer that no callback can do."""

import inspect
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from .callback import PruningCallback
from .card import write_card
from .checkpoints import UNFINISHED, keep_only, newest_complete, publish, remove_leftovers, rotate
from .config import PruningConfig
from .describe import metrics_of
from .hub import explain_error, push_model
from .pruner import STATE_FILES, Pruner
from .record import save_record
from .trainer_record import Evaluated, Given, measure_trainer, record_of

logger = logging.getLogger(__name__)

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
    complete; and the best model is chosen among those at final sparsity. `create_model_card` writes a card from what
    was measured, and `push_to_hub` makes one commit of the model and checks what the Hub then holds.

    Attributes:
        pruner: the `Pruner`, or None.
        failed_pushes: what went wrong with pushes during training (`hub_strategy`), a line each.

    Raises, when it is made: TargetError if the configuration does not fit the model.
    """

    __signature__: inspect.Signature | None

    def __init__(
        self, *args: Any, pruning_config: PruningConfig | Sequence[PruningConfig] | None = None, **kwargs: Any
    ):
        self._pruning: PruningCallback | None = None
        self._unfinished: Path | None = None
        self.failed_pushes: list[str] = []
        self._pushes: list[tuple[str, Future]] = []
        self._evaluated: list[Evaluated] = []
        self._trainings = 0
        self._loaded_best = False
        self._saved: tuple[str, tuple[int, int]] | None = None
        super().__init__(*args, **kwargs)
        if pruning_config is None:
            return
        assert self.model is not None  # Trainer.__init__ has made sure
        pruner = Pruner(self.model, pruning_config)
        self._pruning = PruningCallback(pruning_config, pruner, in_trainer=True)
        self.add_callback(self._pruning)
        if self.args.hub_token is not None:
            self.args.hub_token = UnsavedToken(self.args.hub_token)
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
            self._saved = (output_dir or str(self.args.output_dir), self._weights_are_those_of)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._pruning is not None:
            self._pruning.resume_directory = Path(resume_from_checkpoint)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the extended class does; with True, go on from the newest checkpoint that is complete."""
        self._trainings += 1
        self._loaded_best = False
        self.failed_pushes = []
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
        self._note_pushes()

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if self._pruning is not None and self.args.should_save and self.args.save_total_limit == 1:
            # The Trainer then keeps the best checkpoint alone, and would empty the other under its name.
            keep_only(Path(self._get_output_dir(trial=trial)), self.state.best_model_checkpoint)
        output = super()._finalize_training(trial, *args, **kwargs)
        self._report_pushes()
        return output

    def _load_best_model(self, *args: Any, **kwargs: Any) -> None:
        super()._load_best_model(*args, **kwargs)
        self._loaded_best = True

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """Only a model at final sparsity can be the best."""
        if self.pruner is not None and not self.pruner.at_final_sparsity:
            return False
        return super()._determine_best_metric(*args, **kwargs)

    # ---- Pushes during training: the Trainer makes them in the background, and forgets all but the last ----

    def _note_pushes(self) -> None:
        in_progress: Any = getattr(self, "push_in_progress", None)
        jobs = in_progress.jobs if in_progress is not None else []
        known = [job for _, job in self._pushes]
        self._pushes += [(f"step {self.state.global_step}", job) for job in jobs if job not in known]

    def _report_pushes(self) -> None:
        """Wait for the pushes that were begun, and tell those that failed."""
        for when, job in self._pushes:
            error = job.exception()
            if error is not None:
                self.failed_pushes.append(f"{when}: {explain_error(error, self.args.hub_token)}")
        if self.failed_pushes:
            logger.error(
                "%d of %d pushes to the Hub during training failed, and what they held is not there; push the model "
                "with trainer.push_to_hub(). %s",
                len(self.failed_pushes),
                len(self._pushes),
                "; ".join(self.failed_pushes),
            )
        self._pushes = []

    # ---- What was measured, the card, and the push ----

    @property
    def _weights_are_those_of(self) -> tuple[int, int]:
        """Which training the model's weights are of, and after which step of it."""
        step = self.state.best_global_step if self._loaded_best else self.state.global_step
        return self._trainings, int(step or 0)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the extended class does, and remember what was measured of which weights, for the card."""
        output = super().evaluation_loop(*args, **kwargs)
        if self._pruning is not None and output.metrics:
            bound = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
            metrics = metrics_of(output.metrics, bound.get("metric_key_prefix", "eval"))
            dataset = getattr(bound["dataloader"], "dataset", None)
            self._evaluated.append(Evaluated(*self._weights_are_those_of, metrics, output.num_samples, dataset))
        return output

    def _last_evaluated(self) -> Evaluated | None:
        """The last evaluation of the weights that the model has now."""
        training, step = self._weights_are_those_of
        for evaluated in reversed(self._evaluated):
            if (evaluated.training, evaluated.step) == (training, step) and evaluated.metrics:
                return evaluated
        for entry in reversed(self.state.log_history):  # of a run that was resumed since
            metrics = metrics_of(entry)
            if entry.get("step") == step and metrics:
                return Evaluated(training, step, metrics)
        return None

    @property
    def _makes_card(self) -> bool:
        """Whether card and push are ours: not without pruning, nor for adapters, whose zeros are elsewhere."""
        return self.pruner is not None and not isinstance(self.accelerator.unwrap_model(self.model), PeftModel)

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """Write the card of the model into `output_dir`, with the model if its weights have not been saved there yet.

        README.md says what was counted in the saved files and measured by this trainer, and nothing else; beside it lie
        `sparsity.json`, `run_record.json` and `assets/`. What a person wrote into README.md is kept.

        Args:
            *args, **kwargs: those of the extended class.
            dense_metrics: what `evaluate` returned for the dense model on the same data, to be compared with. Without
                it, the card says that the dense baseline was not measured.
        """
        if not self._makes_card:
            super().create_model_card(*args, **kwargs)
            return
        folder = str(self.args.output_dir)
        if self._saved != (folder, self._weights_are_those_of):
            self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return
        assert self.pruner is not None  # or the card would not be ours
        said = dict(inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments)
        said |= {"dataset": said.pop("dataset_name", None) or said.get("dataset")}
        given = Given(**said, dense_metrics=dense_metrics)
        step = self._weights_are_those_of[1]
        target = self.pruner.target_sparsity
        evaluated, latency = self._last_evaluated(), measure_trainer(self)
        record = record_of(self, folder, self.pruner.configs, target, step, evaluated, latency, given)
        save_record(folder, record)
        write_card(folder)

    def push_to_hub(  # type: ignore[override]  # the extended class's arguments, and ours by name
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        create_pr: bool = False,
        with_masks: bool = False,
        **kwargs: Any,
    ) -> CommitInfo | Future | None:
        """Save the model, make its card, push both in one commit, and check what the Hub then holds.

        Args:
            commit_message, blocking, token, revision, private, **kwargs: those of the extended class.
            create_pr: whether the commit is a pull request.
            with_masks: whether masks and the pruning state go with it, to resume training from there.

        Returns: the commit, or its future if not `blocking`; None in processes other than the first.

        Raises: PushError, saying what is and is not on the Hub; and what `hf_prune.hub.push_model` raises.
        """
        if not self._makes_card:
            return super().push_to_hub(commit_message, blocking, token, revision, private=private, **kwargs)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        repo_id = self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name
        self.save_model(_internal_call=True)
        kwargs.setdefault("model_name", repo_id.rsplit("/", 1)[-1])
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()

        def push() -> CommitInfo:
            return push_model(
                str(self.args.output_dir),
                repo_id,
                private=private if private is not None else self.args.hub_private_repo,
                revision=revision if revision is not None else self.args.hub_revision,
                create_pr=create_pr,
                with_masks=with_masks,
                message=commit_message or "End of training",
                token=token if token is not None else self.args.hub_token,
            ).commit

        return push() if blocking else HfApi().run_as_future(push)


class UnsavedToken(str):
    """A token that is None once it was pickled: the Trainer saves its arguments, and pushes them in training."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(None), ()

    def __copy__(self) -> "UnsavedToken":
        return self

    def __deepcopy__(self, memo: dict) -> "UnsavedToken":
        return self


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
