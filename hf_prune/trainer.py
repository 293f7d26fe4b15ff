"""`PruningTrainer` and `PruningMixin`: what pruning needs of the Trainer that no callback can do."""

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainingArguments

from .callback import PruningCallback
from .config import PruningConfig
from .pruner import Pruner

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
    `target_sparsity` are in the logs of every reporter; every saved model has its masks beside it; and
    `resume_from_checkpoint` takes them from there. `trainer.pruner` is the `Pruner`, or None.

    Raises, when it is made: TargetError if the configuration does not fit the model.
    """

    def __init__(
        self, *args: Any, pruning_config: PruningConfig | Sequence[PruningConfig] | None = None, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self._pruning: PruningCallback | None = None
        if pruning_config is None:
            return
        assert self.model is not None  # Trainer.__init__ has made sure
        pruner = Pruner(self.model, pruning_config)
        self._pruning = PruningCallback(pruning_config, pruner, in_trainer=True)
        self.add_callback(self._pruning)

    def __init_subclass__(cls, **kwargs: Any):
        """Show the signature of the Trainer that is extended, and ours after it."""
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__signature__ = None  # type: ignore[attr-defined]  # that of its own __init__, not an inherited one
            return
        extended = next(base for base in cls.__mro__[1:] if base is not PruningMixin and "__init__" in base.__dict__)
        parameters = list(inspect.signature(extended).parameters.values())
        if any(parameter.name == "pruning_config" for parameter in parameters):
            return
        ours = inspect.signature(PruningMixin.__init__).parameters["pruning_config"]
        after = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        before = [parameter for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        cls.__signature__ = inspect.Signature([*before, ours, *after])  # type: ignore[attr-defined]

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
