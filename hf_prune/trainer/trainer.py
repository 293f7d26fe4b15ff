"""`PruningTrainer` and `PruningMixin`: what pruning needs of the Trainer that no callback can do."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..config.distillation import DistillationConfig
from ..config.pruning import PruningConfig
from ..errors import ArgumentError, TeacherError
from ..foreign.transformers import check_trainer
from ..masking.pruner import Pruner
from .callback import PruningCallback, check_needs
from .distilling import DistillingMixin
from .publishing import PublishingMixin
from .pushes import PushesMixin
from .saving import SavingMixin
from .sigterm import save_on_sigterm_at_step_end
from .training import TrainingMixin

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from torch.utils.data import Dataset, IterableDataset
    from transformers import (
        BaseImageProcessor,
        DataCollator,
        EvalPrediction,
        FeatureExtractionMixin,
        PreTrainedTokenizerBase,
        ProcessorMixin,
        TrainerCallback,
        TrainingArguments,
    )


class PruningMixin(TrainingMixin, SavingMixin, DistillingMixin, PushesMixin, PublishingMixin):
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
        """Check the methods of the Trainer that is extended, and show its signature, and ours after it.

        Raises IncompatibleVersionError where a method is gone, or has changed such that ours does not fit it.
        """
        super().__init_subclass__(**kwargs)
        mixins = PruningMixin.__mro__[:-1]
        if issubclass(cls, Trainer):
            check_trainer(cls.__mro__[cls.__mro__.index(mixins[-1]) + 1 :], mixins)
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


def _extended_by(cls: type) -> type:
    """The Trainer class that a class with `PruningMixin` extends."""
    return next(
        base for base in cls.__mro__[1:] if base not in PruningMixin.__mro__[:-1] and "__init__" in base.__dict__
    )


def _takes(trainer_class: type, name: str) -> bool:
    """Whether a Trainer class has an argument of this name."""
    return name in inspect.signature(trainer_class).parameters


def _check_distillation(teacher: Any, config: Any, own_teacher: bool) -> None:
    """Raise TeacherError for a configuration of the distillation that would not be used."""
    if config is None:
        return
    if teacher is None:
        raise TeacherError("teacher_model", "expected one beside a distillation_config, got None")
    if own_teacher:
        raise TeacherError(
            "distillation_config",
            "expected None for a Trainer that has a teacher_model of its own; it has arguments for how it distils",
        )
    if not isinstance(config, DistillationConfig):
        raise TeacherError(
            "distillation_config",
            f"expected a DistillationConfig, got {type(config).__name__}; "
            "DistillationConfig.from_dict makes one of a dict",
        )


def _with_adapters(model: Any, peft_config: PeftConfig) -> PeftModel:
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            "peft_config",
            f"expected a model of transformers to put adapters on, got {type(model).__name__}; give model=, or a model "
            "that has its adapters",
        )
    if not isinstance(peft_config, PeftConfig):
        raise ArgumentError(
            "peft_config", f"expected a configuration of PEFT such as LoraConfig(), got {peft_config!r}"
        )
    return cast(PeftModel, get_peft_model(model, peft_config))


class PruningTrainer(PruningMixin, Trainer):
    """`transformers.Trainer` that prunes the model while it trains it; `PruningMixin` says what it takes beyond that.

    In place of `Trainer`:

        trainer = PruningTrainer(model=model, args=args, train_dataset=train,
                                 pruning_config=PruningConfig(method="magnitude", sparsity=0.8))
        trainer.train()
    """

    if TYPE_CHECKING:  # for editors and type checkers; at run time whatever the installed Trainer takes is passed on

        def __init__(
            self,
            model: PreTrainedModel | nn.Module | None = None,
            args: TrainingArguments | None = None,
            data_collator: DataCollator | None = None,
            train_dataset: Dataset | IterableDataset | datasets.Dataset | None = None,
            eval_dataset: Dataset | dict[str, Dataset] | datasets.Dataset | None = None,
            processing_class: PreTrainedTokenizerBase
            | BaseImageProcessor
            | FeatureExtractionMixin
            | ProcessorMixin
            | None = None,
            model_init: Callable[..., PreTrainedModel] | None = None,
            compute_loss_func: Callable | None = None,
            compute_metrics: Callable[[EvalPrediction], dict] | None = None,
            callbacks: list[TrainerCallback] | None = None,
            optimizers: tuple[Optimizer | None, LambdaLR | None] = (None, None),
            optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
            preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
            *,
            pruning_config: PruningConfig | Sequence[PruningConfig] | None = None,
            peft_config: PeftConfig | None = None,
            teacher_model: nn.Module | str | os.PathLike | None = None,
            distillation_config: DistillationConfig | None = None,
        ): ...
