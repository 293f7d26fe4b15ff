"""`PruningTrainer` and `PruningMixin`: what pruning needs of the Trainer that no callback can do."""

import inspect
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils.hub import PushInProgress

from .callback import PruningCallback, check_needs
from .card import write_card
from .checkpoints import (
    UNFINISHED,
    is_deepspeed_checkpoint,
    keep_only,
    newest_complete,
    publish,
    remove_leftovers,
    rotate,
)
from .config import PruningConfig
from .describe import is_shared_model, weights_digest
from .distributed import is_fsdp_checkpoint, load_fsdp_model, load_fsdp_optimizer
from .hub import push_model
from .hub_errors import explain_error
from .pruner import Pruner, state_files
from .record import Latency, RunRecord, SavedFile, load_record, save_record, saved_files
from .report import weight_files
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
    `target_sparsity` are in the logs of every reporter; every saved model has its masks beside it, and
    `resume_from_checkpoint` takes them from there; a checkpoint has its name only once it is complete; and the best
    model is chosen among those at final sparsity. `create_model_card` writes a card from what was measured, and
    `push_to_hub` makes one commit of the model and checks what the Hub then holds.

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
        self._hub = HfApi()  # its pushes in the background go one after another
        self._evaluated: list[Evaluated] = []
        self._said: dict[str, Any] = {}
        self._loaded_best = False
        super().__init__(*args, **kwargs)
        if pruning_config is None:
            return
        assert self.model is not None  # Trainer.__init__ has made sure
        pruner = Pruner(self.model, pruning_config)
        check_needs(pruner.configs, self.args)
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the extended class does, for `from_pretrained`, with its masks beside it.

        Every process must call it. With sharded state dicts (FSDP2) the extended class saves models in checkpoints
        only; this one saves them whole.
        """
        if self.pruner is None:
            super().save_model(output_dir, _internal_call)
            return
        self.pruner.save_from_all(output_dir or str(self.args.output_dir), self.args.should_save)
        with whole_state_dict(self.accelerator) if self._unfinished is None else nullcontext():
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._pruning is not None and self._is_of_fsdp(resume_from_checkpoint):
            load_fsdp_model(cast(nn.Module, model if model is not None else self.model), Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

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
        """Whether a checkpoint was written under FSDP, and training goes on without, which the Trainer cannot."""
        return not self.is_fsdp_enabled and is_fsdp_checkpoint(Path(checkpoint))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train as the extended class does; with True, go on from the newest checkpoint that is complete."""
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
            if resume_from_checkpoint:
                self._pruning.resume_directory = Path(resume_from_checkpoint)
                if not self.is_deepspeed_enabled and is_deepspeed_checkpoint(Path(resume_from_checkpoint)):
                    raise ValueError(
                        f"{resume_from_checkpoint}: expected a checkpoint of this way of training, got one of "
                        "DeepSpeed, which alone reads its optimizer's state; go on with DeepSpeed, or start anew from "
                        "its model with method='keep'"
                    )
            if self.args.should_save:
                remove_leftovers(directory, everything=True)
        try:
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)
        finally:
            if self._pruning is not None:
                self._pruning.remove_hooks()

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

    # ---- Pushes during training: in the background, of a copy that no later step changes ----

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        published = self._publish_checkpoint()
        folder = published if published is not None else Path(checkpoint_folder)
        if self.pruner is None:
            super()._push_from_checkpoint(str(folder))
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        digest = self._digest() if self._makes_card else ""
        if not self.is_world_process_zero():
            return
        in_progress: Any = self.push_in_progress
        if in_progress is not None and not in_progress.is_done() and not self.args.hub_always_push:
            return
        when = f"step {self.state.global_step}"
        if not self._makes_card:
            for path in state_files(folder):  # the Trainer copies only the model's own files
                shutil.copy(path, Path(str(self.args.output_dir), path.name))
            super()._push_from_checkpoint(str(folder))
            known = [job for _, job in self._pushes]
            self._pushes += [(when, job) for job in cast(Any, self.push_in_progress).jobs if job not in known]
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        copy = Path(tempfile.mkdtemp(prefix="_push_", dir=str(self.args.output_dir)))
        shutil.copytree(folder, copy, copy_function=link_or_copy, dirs_exist_ok=True)
        whole = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: folder.name}
        place = whole.get(HubStrategy(self.args.hub_strategy))
        files = [path for path in copy.rglob("*") if path.is_file()] if place is not None else []
        also = {f"{place}/{path.relative_to(copy).as_posix()}": path for path in files}
        message = f"Training in progress, {when}"
        said = {name: value for name, value in self._said.items() if name != "dense_metrics"}  # of the end of training
        job = self._hub.run_as_future(self._push_copy, copy, self._make_record(said, digest), also, message)
        self._pushes.append((when, job))
        self.push_in_progress: Any = PushInProgress(cast(Any, [job]))

    def _push_copy(self, copy: Path, record: RunRecord, also: Mapping[str, Path], message: str) -> CommitInfo:
        try:
            save_record(copy, record.model_copy(update={"weights": saved_files(weight_files(copy))}))
            return push_model(
                copy,
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
        """Wait for the pushes that were begun, and tell those that failed."""
        errors = [(when, job.exception()) for when, job in self._pushes]
        self.failed_pushes = [
            f"{when}: {explain_error(error, self.args.hub_token)}" for when, error in errors if error is not None
        ]
        if self.failed_pushes:
            logger.error(
                "Of %d pushes to the Hub during training %d failed; push the model with trainer.push_to_hub().\n%s",
                len(errors),
                len(self.failed_pushes),
                "\n".join(self.failed_pushes),
            )
        self._pushes = []

    # ---- What was measured, the card, and the push ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the extended class does, and remember what was measured of which weights, for the card."""
        output = super().evaluation_loop(*args, **kwargs)
        if not self._makes_card or not output.metrics:
            return output
        digest = self._digest()
        if self.is_world_process_zero():
            bound = inspect.signature(super().evaluation_loop).bind(*args, **kwargs).arguments
            prefix = bound.get("metric_key_prefix", "eval")
            dataset = getattr(bound["dataloader"], "dataset", None)
            values, samples = dict(output.metrics), output.num_samples or 0
            self._evaluated.append(Evaluated(digest, prefix, values, samples, dataset))
        return output

    def _digest(self) -> str:
        """The digest of the model's weights as they are, on the first process; every process must ask for it."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.is_world_process_zero() and not is_shared_model(model):
            return ""
        return weights_digest(model)

    @property
    def _repo_id(self) -> str:
        return self.hub_model_id or self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name

    @property
    def _makes_card(self) -> bool:
        """Whether card and push are ours: not without pruning, nor for adapters, whose zeros are elsewhere."""
        return self.pruner is not None and not isinstance(self.accelerator.unwrap_model(self.model), PeftModel)

    def create_model_card(self, *args: Any, dense_metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        """Save the model into `output_dir`, and write its card beside it.

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
        said = dict(inspect.signature(super().create_model_card).bind(*args, **kwargs).arguments)
        said |= {"dataset": said.pop("dataset_name", None) or said.get("dataset"), "dense_metrics": dense_metrics}
        said = self._said | {name: value for name, value in said.items() if value is not None}
        folder = Path(str(self.args.output_dir))
        earlier = load_record(folder) if self.state.global_step == 0 else None
        self.save_model(_internal_call=True)
        digest = self._digest()
        if not self.is_world_process_zero():
            return
        record = self._make_record(said, digest, saved_files(weight_files(folder)), measure_trainer(self))
        self._said = said  # it holds for later cards, too
        base = record.base_model
        if base is not None and base.license is None and not record.chosen.get("license"):
            logger.warning(
                "The card says nothing of a license, for that of %s is not known: its card names none, or cannot be "
                "read. Give one, license=..., or write it into the card.",
                base.name,
            )
        if earlier is not None and earlier.weights == record.weights:
            # The model of an earlier run, as it was: what that run was is still so.
            record = earlier.model_copy(update={"evaluations": record.evaluations or earlier.evaluations})
        save_record(folder, record)
        write_card(folder)

    def _make_record(
        self,
        said: Mapping[str, Any],
        digest: str,
        weights: dict[str, SavedFile] | None = None,
        latency: Latency | None = None,
    ) -> RunRecord:
        """The record of this trainer's run, for the model as it is now, in the files of weights."""
        assert self.pruner is not None  # or the card would not be ours
        return record_of(
            self,
            weights or {},
            configs=self.pruner.configs,
            target_sparsity=self.pruner.target_sparsity,
            kept_step=int((self.state.best_global_step if self._loaded_best else self.state.global_step) or 0),
            evaluated=[evaluated for evaluated in self._evaluated if evaluated.digest == digest],
            latency=latency,
            given=Given(**{"model_name": self._repo_id.rsplit("/", 1)[-1], **said}),
        )

    def push_to_hub(
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
    ) -> Any:
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
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()

        def push() -> CommitInfo:
            return push_model(
                str(self.args.output_dir),
                self._repo_id,
                private=private if private is not None else self.args.hub_private_repo,
                revision=revision if revision is not None else self.args.hub_revision,
                create_pr=create_pr,
                with_masks=with_masks,
                message=commit_message or "End of training",
                token=token if token is not None else self.args.hub_token,
            ).commit

        return push() if blocking else self._hub.run_as_future(push)


@contextmanager
def whole_state_dict(accelerator: Accelerator) -> Iterator[None]:
    """Save models whole, whatever kind of state dict FSDP was set to; other ways of training are left alone."""
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


def link_or_copy(source: str, target: str) -> None:
    """A hard link to a file, which costs nothing, or a copy where there can be none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


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
