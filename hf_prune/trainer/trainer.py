"""`PruningTrainer` and `PruningMixin`: pruning, distillation and publishing in a Trainer class."""

import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..config.distillation import DistillationConfig, check_width
from ..config.pruning import PruningConfig
from ..engines.launched import check_processes
from ..errors import ArgumentError, TeacherError
from ..foreign.transformers import check_trainer
from ..masking.finding import as_configs
from ..masking.pruner import Pruner
from .callback import PruningCallback, check_needs, check_saving
from .distilling import DistillingMixin
from .explaining import ExplainingMixin
from .latency import example_of
from .measuring import MeasuringMixin
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


class PruningMixin(
    TrainingMixin, SavingMixin, DistillingMixin, PushesMixin, PublishingMixin, MeasuringMixin, ExplainingMixin
):
    """Adds pruning to a Trainer class: `class PruningSFTTrainer(PruningMixin, SFTTrainer): ...`.

    Beyond what `PruningCallback` does, gradients are masked once per step, before they are clipped; `sparsity` and
    `target_sparsity` are in the logs of every reporter; every saved model has its masks beside it, and
    `resume_from_checkpoint` restores them; a checkpoint gets its name only when it is complete; and the best model is
    chosen among those at final sparsity. `create_model_card` writes a card from measurements, and `push_to_hub` pushes
    the model in one commit and checks what the Hub then holds.

    Args:
        *args: arguments of the extended class.
        pruning_config: a `PruningConfig`, or a list of them that apply together or one after another. With None the
            trainer behaves as the class it extends, and has no additional callback.
        peft_config: a PEFT configuration; its adapters are added to the model. A model that has adapters works too.
        teacher_model: a model, or the path or Hub name of one, whose outputs the model learns in training, beside the
            labels. A given model is frozen, and moved to the training device. It is not saved in checkpoints; each step
            costs one forward pass of it. Pass it again to resume from a checkpoint.
        distillation_config: a `DistillationConfig`: the weight and temperature of distillation. Only with a teacher.
        **kwargs: arguments of the extended class.

    Attributes:
        pruner: the `Pruner`, or None.
        failed_pushes: a line for each push during training (`hub_strategy`) that failed, with the reason.

    Raises:
        TargetError: the configuration does not fit the model.
        LaunchError: several processes were launched, and do not train together.
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
        if pruning_config is not None:
            check_width(distillation_config, [config.structure for config in as_configs(pruning_config)])
        if peft_config is not None and _takes(_extended_by(type(self)), "peft_config"):
            kwargs["peft_config"] = peft_config
        elif peft_config is not None:
            model = kwargs.pop("model") if "model" in kwargs else next(iter(args), None)
            args, kwargs = args[1:], {"model": _with_adapters(model, peft_config), **kwargs}
        if own_teacher:  # a Trainer class with distillation of its own
            kwargs["teacher_model"], teacher_model = teacher_model, None
        super().__init__(*args, **kwargs)
        if pruning_config is not None:
            check_processes(self.args)
        if teacher_model is not None:
            self._distil_from(teacher_model, distillation_config)
        if pruning_config is None:
            return
        assert self.model is not None  # ensured by Trainer.__init__
        pruner = Pruner(self.model, pruning_config, example=partial(example_of, self))
        check_needs(pruner.configs, self.args, self.is_deepspeed_enabled)
        check_saving(pruner.configs, self.accelerator.state.deepspeed_plugin)
        self._pruning = PruningCallback(pruning_config, pruner, in_trainer=True)
        self.add_callback(self._pruning)
        self._never_save_token()
        save_on_sigterm_at_step_end(self)

    def __init_subclass__(cls, **kwargs: Any):
        """Check the methods of the extended Trainer class, and set a signature with its arguments and the added ones.

        Raises IncompatibleVersionError if an overridden method is gone, or if its signature has changed.
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
    """Raise TeacherError for a distillation configuration that would not be used."""
    if config is None:
        return
    if teacher is None:
        raise TeacherError("teacher_model", "must be given with a distillation_config, got None")
    if own_teacher:
        raise TeacherError(
            "distillation_config",
            "must not be set for a Trainer class with a teacher_model of its own; use that class's arguments",
        )
    if not isinstance(config, DistillationConfig):
        raise TeacherError(
            "distillation_config",
            f"expected a DistillationConfig, got {type(config).__name__}; "
            "DistillationConfig.from_dict makes one from a dict",
        )


def _with_adapters(model: Any, peft_config: PeftConfig) -> PeftModel:
    if not isinstance(model, PreTrainedModel):
        raise ArgumentError(
            "peft_config",
            f"expected a model of transformers to add adapters to, got {type(model).__name__}; pass model=, or a model "
            "that already has adapters",
        )
    if not isinstance(peft_config, PeftConfig):
        raise ArgumentError("peft_config", f"expected a PEFT configuration such as LoraConfig(), got {peft_config!r}")
    return cast(PeftModel, get_peft_model(model, peft_config))


class PruningTrainer(PruningMixin, Trainer):
    """A `transformers.Trainer` that prunes the model during training; `PruningMixin` describes the added arguments.

    In place of `Trainer`:

        trainer = PruningTrainer(model=model, args=args, train_dataset=train,
                                 pruning_config=PruningConfig(method="magnitude", sparsity=0.8))
        trainer.train()
    """

    if TYPE_CHECKING:  # for editors and type checkers; at run time all arguments of the installed Trainer are accepted

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
