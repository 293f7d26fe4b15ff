"""`PruningTrainer` and `PruningMixin`: what pruning needs of the Trainer that no callback can do."""

import inspect
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..config.distillation import DistillationConfig
from ..config.pruning import PruningConfig
from ..engines.fsdp_checkpoints import is_fsdp_checkpoint, load_fsdp_model, load_fsdp_optimizer
from ..errors import TeacherError
from ..masking.pruner import Pruner
from ..publish.card import keep_card
from .callback import PruningCallback, check_needs
from .checkpoints import (
    UNFINISHED,
    is_deepspeed_checkpoint,
    keep_only,
    newest_complete,
    publish,
    remove_leftovers,
    rotate,
)
from .distilling import LossMixin
from .publishing import HubMixin
from .sigterm import save_on_sigterm_at_step_end


class PruningMixin(LossMixin, HubMixin):
    """Adds pruning to a Trainer class: `class PruningSFTTrainer(PruningMixin, SFTTrainer): ...`.

    Beyond what `PruningCallback` does, gradients are masked once a step, before they are clipped; `sparsity` and
    `target_sparsity` are in the logs of every reporter; every saved model has its masks beside it, and
    `resume_from_checkpoint` takes them from there; a checkpoint has its name only once it is complete; and the best
    model is chosen among those at final sparsity. `create_model_card` writes a card from what was measured, and
    `push_to_hub` makes one commit of the model and checks what the Hub then holds.

    Args:
        *args: those of the extended class.
        pruning_config: a `PruningConfig`, or a list of them that apply together or one after another. With None the
            trainer is the one it extends, without any callback of ours.
        peft_config: a configuration of PEFT; the model gets its adapters. A model that has them works the same.
        teacher_model: a model, or the path or Hub name of one, whose answers the model is to learn in training beside
            those of the data. A model that is given is frozen and moved as it is. It is in no checkpoint; each step
            costs one forward pass of it. Give it again to go on from a checkpoint.
        distillation_config: a `DistillationConfig`: how much the teacher counts. Only with a teacher.
        **kwargs: those of the extended class.

    Attributes:
        pruner: the `Pruner`, or None.
        failed_pushes: what went wrong with pushes during training (`hub_strategy`), a line each.

    Raises:
        TargetError: the configuration does not fit the model.
    """

    __signature__: inspect.Signature | None

    def __init__(
        self,
        *args: Any,
        pruning_config: PruningConfig | Sequence[PruningConfig] | None = None,
        peft_config: PeftConfig | None = None,
        teacher_model: nn.Module | str | os.PathLike | None = None,
        distillation_config: DistillationConfig | None = None,
        **kwargs: Any,
    ):
        own_teacher = teacher_model is not None and _takes(_extended_by(type(self)), "teacher_model")
        _check_distillation(teacher_model, distillation_config, own_teacher)
        self._pruning: PruningCallback | None = None
        self._unfinished: Path | None = None
        if peft_config is not None and _takes(_extended_by(type(self)), "peft_config"):
            kwargs["peft_config"] = peft_config
        elif peft_config is not None:
            model = kwargs.pop("model") if "model" in kwargs else next(iter(args), None)
            args, kwargs = args[1:], {"model": _with_adapters(model, peft_config), **kwargs}
        if own_teacher:  # a Trainer that distils by itself
            kwargs["teacher_model"], teacher_model = teacher_model, None
        super().__init__(*args, **kwargs)
        if teacher_model is not None:
            self._distil_from(teacher_model, distillation_config)
        if pruning_config is None:
            return
        assert self.model is not None  # Trainer.__init__ has made sure
        pruner = Pruner(self.model, pruning_config)
        check_needs(pruner.configs, self.args, self.is_deepspeed_enabled)
        self._pruning = PruningCallback(pruning_config, pruner, in_trainer=True)
        self.add_callback(self._pruning)
        self._never_save_token()
        save_on_sigterm_at_step_end(self)

    def __init_subclass__(cls, **kwargs: Any):
        """Show the signature of the Trainer that is extended, and ours after it."""
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__signature__ = None  # that of its own __init__, not an inherited one
            return
        extended = _extended_by(cls)
        if _takes(extended, "pruning_config"):
            return
        parameters = list(inspect.signature(extended).parameters.values())
        ours = [
            parameter
            for name, parameter in inspect.signature(PruningMixin.__init__).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not _takes(extended, name)
        ]
        after = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        before = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        keyword = [parameter for parameter in before if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
        positional = [parameter for parameter in before if parameter not in keyword]
        cls.__signature__ = inspect.Signature([*positional, *keyword, *ours, *after])

    @property
    def pruner(self) -> Pruner | None:
        """The pruner; None without a `pruning_config`. Its `plan()` knows the steps that this trainer would train."""
        if self._pruning is None or self._pruning.pruner is None:
            return None
        pruner = self._pruning.pruner
        if pruner.expected_steps is None:
            pruner.expected_steps = training_steps(self.args, self.train_dataset)
        return pruner

    # ---- Gradients and logs ----

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward as the extended class does them; before the clip, masked gradients become zero."""
        loss = super().training_step(*args, **kwargs)
        if self.pruner is not None and self.accelerator.sync_gradients:
            scaler = self.accelerator.scaler
            self.pruner.mask_gradients(scaler.get_scale() if scaler is not None else 1.0)
            self._note(self.pruner.penalties, shared=self.pruner.sharded)
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the extended class does, with `sparsity` and `target_sparsity` during training."""
        if self._pruning is not None and self.is_in_train:
            logs.update(self._pruning.log_values())
        super().log(logs, *args, **kwargs)

    # ---- Saving, and going on from what was saved ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the extended class does, for `from_pretrained`, with its masks beside it.

        Every process must call it. With sharded state dicts (FSDP2) the extended class saves models in checkpoints
        only; this one saves them whole.
        """
        if self.pruner is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or str(self.args.output_dir)
        self.pruner.save_from_all(folder, self.args.should_save)
        with (
            whole_state_dict(self.accelerator) if self._unfinished is None else nullcontext(),
            keep_card(folder) if self.args.should_save else nullcontext(),
        ):
            super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.accelerator.wait_for_everyone()  # a process that ended now could end the one that writes

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._pruning is not None and self._is_of_fsdp(resume_from_checkpoint):
            load_fsdp_model(cast(nn.Module, model if model is not None else self.model), Path(resume_from_checkpoint))
        elif model is None:
            super()._load_from_checkpoint(resume_from_checkpoint)  # not every class takes a model
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
        """Train as the extended class does; with True, go on from the newest checkpoint that is complete.

        Raises: ValueError, before anything is changed, where there is no checkpoint that training can go on from.
        """
        if self._pruning is not None:
            directory = Path(self._get_output_dir(trial=trial))
            self._pruning.resume_directory = None
            if resume_from_checkpoint:
                resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint, directory)
                self._pruning.resume_directory = Path(resume_from_checkpoint)
            if self.args.should_save:
                remove_leftovers(directory, everything=True)
        if isinstance(resume_from_checkpoint, str):
            self._warn_without_teacher(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint, trial, *args, **kwargs)
        finally:
            if self._pruning is not None:
                self._pruning.remove_hooks()

    def _checkpoint_to_resume(self, asked: str | Literal[True], directory: Path) -> str:
        """The checkpoint to go on from: the one that was asked for, with True the newest complete one in a directory.

        Raises ValueError if there is none, and for one of DeepSpeed where training goes on without.
        """
        checkpoint = newest_complete(directory) if asked is True else asked
        if checkpoint is None:
            raise ValueError(f"resume_from_checkpoint: expected a complete checkpoint in {directory}, found none")
        if not self.is_deepspeed_enabled and is_deepspeed_checkpoint(Path(checkpoint)):
            raise ValueError(
                f"{checkpoint}: expected a checkpoint of this way of training, got one of DeepSpeed, which alone reads "
                "its optimizer's state; go on with DeepSpeed, or start anew from its model with method='keep'"
            )
        return str(checkpoint)

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
        """Give the checkpoint its name before it is pushed: the Trainer pushes at the end of `_save_checkpoint`."""
        published = self._publish_checkpoint()
        super()._push_from_checkpoint(checkpoint_folder if published is None else str(published))

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


def _extended_by(cls: type) -> type:
    """The Trainer class that a class with `PruningMixin` extends."""
    return next(
        base
        for base in cls.__mro__[1:]
        if base not in (PruningMixin, LossMixin, HubMixin) and "__init__" in base.__dict__
    )


def _takes(trainer_class: type, name: str) -> bool:
    """Whether a Trainer class has an argument of this name."""
    return name in inspect.signature(trainer_class).parameters


def _check_distillation(teacher: Any, config: Any, own_teacher: bool) -> None:
    """Raise TeacherError for a configuration of the distillation that would not be used."""
    if config is None:
        return
    if teacher is None:
        raise TeacherError("teacher_model: expected one beside a distillation_config, got None")
    if own_teacher:
        raise TeacherError(
            "distillation_config: expected None for a Trainer that has a teacher_model of its own; it has arguments "
            "for how it distils"
        )
    if not isinstance(config, DistillationConfig):
        raise TeacherError(
            f"distillation_config: expected a DistillationConfig, got {type(config).__name__}; "
            "DistillationConfig.from_dict makes one of a dict"
        )


def _with_adapters(model: Any, peft_config: PeftConfig) -> PeftModel:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"peft_config: expected a model of transformers to put adapters on, got {type(model).__name__}; give "
            "model=, or a model that has its adapters"
        )
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config: expected a configuration of PEFT such as LoraConfig(), got {peft_config!r}")
    return cast(PeftModel, get_peft_model(model, peft_config))


class PruningTrainer(PruningMixin, Trainer):
    """`transformers.Trainer` that prunes the model while it trains it; `PruningMixin` says what it takes beyond that.

    In place of `Trainer`:

        trainer = PruningTrainer(model=model, args=args, train_dataset=train,
                                 pruning_config=PruningConfig(method="magnitude", sparsity=0.8))
        trainer.train()
    """
