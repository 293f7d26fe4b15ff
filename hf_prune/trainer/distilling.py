"""`DistillingMixin`: adds a teacher's distillation loss to a Trainer's task loss."""

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer

from ..config.distillation import DistillationConfig
from ..distillation.compare import distance, hidden_distance, logits_to_compare
from ..distillation.losses import IGNORED, item_mask
from ..distillation.task_loss import TaskLoss, ask_loss
from ..distillation.teachers import find_teacher, takes_input, teacher_inputs
from ..engines.placing import place_frozen
from ..engines.processes import gather
from ..errors import DistillationConfigError, TeacherError
from ..model.names import plain_model
from .base import TrainerBase


class DistillingMixin(TrainerBase):
    """Mixes a distillation loss into a Trainer's loss; without a teacher, it changes nothing.

    Attributes:
        teacher: the teacher model, or None. A model that was given is this very object, frozen and moved to the
            training device.
        teacher_name: the path or Hub name that it was opened with, or None.
        distillation: the `DistillationConfig`, or None.
    """

    teacher: nn.Module | None = None
    teacher_name: str | None = None
    distillation: DistillationConfig | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        self._placed_teacher: nn.Module | None = None
        self._teacher_was_asked = False
        self._known_loss: TaskLoss | None = None
        super().__init__(*args, **kwargs)

    def _distil_from(self, teacher: nn.Module | str | os.PathLike, config: DistillationConfig | None) -> None:
        """Set the teacher. Raises TeacherError if it does not fit the model."""
        if self.args.n_gpu > 1:
            raise TeacherError(
                "teacher_model",
                f"distillation needs one process per GPU, got one for {self.args.n_gpu} GPUs; use accelerate launch",
            )
        self.distillation = config or DistillationConfig()
        if self.distillation.hidden_weight and not takes_input(cast(nn.Module, self.model), "output_hidden_states"):
            raise DistillationConfigError(
                "hidden_weight", "must be 0 for a model whose forward pass takes no output_hidden_states"
            )
        self.teacher = find_teacher(teacher, cast(nn.Module, self.model))
        self.teacher_name = None if isinstance(teacher, nn.Module) else str(teacher)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of the extended class; in training with a teacher, mixed with the distillation loss.

        Both are divided by the same number of items: of all micro-batches and processes if the Trainer counts them,
        otherwise of this micro-batch. So the result does not depend on how a batch is split. Models that accept this
        number and ignore it (T5, many classifiers) are corrected: the stock Trainer multiplies their loss by the number
        of micro-batches. How the loss treats it is found out before the first step, with up to five forward passes of
        the model in eval mode.

        Raises TeacherError if model or teacher return no logits, or logits of different shapes.
        """
        if self.teacher is None or not model.training:
            return self._extended_loss(model, inputs, return_outputs, num_items_in_batch)
        config = cast(DistillationConfig, self.distillation)
        if "labels" not in inputs:
            raise TeacherError("teacher_model", f"distillation needs inputs with labels, got {', '.join(inputs)}")
        labels = cast(torch.Tensor, inputs["labels"])
        task = self._task_loss(model, inputs, num_items_in_batch)
        asked = {**inputs, "output_hidden_states": True} if config.hidden_weight else dict(inputs)
        task_loss, outputs = self._extended_loss(model, dict(asked), True, num_items_in_batch)
        answers = self._ask_teacher(asked)
        logits, teacher_logits = logits_to_compare(outputs, answers)
        if not logits.requires_grad:
            raise TeacherError(
                "teacher_model",
                "expected a trainer that computes its loss from the logits, got one whose logits have no gradient "
                "(trainers of TRL); distil with PruningTrainer",
            )

        mask = item_mask(inputs.get("shift_labels", labels), task.shifts_labels and "shift_labels" not in inputs)
        over_all = self._is_over_all_micro_batches(num_items_in_batch)
        items: Any = mask.sum().clamp_min(1)
        scale = 1
        if over_all and num_items_in_batch is not None:
            if not task.divides_by_items and not getattr(self, "loss_is_scaled_for_ga", None):
                labelled = mask.sum()  # without any, a mean is 0 / 0
                task_loss = torch.where(labelled > 0, task_loss * labelled / num_items_in_batch, 0.0)
            items, scale = num_items_in_batch, self._loss_scale
        elif over_all:
            items = items * self.current_gradient_accumulation_steps

        problem = getattr(self._model_config, "problem_type", None)
        sums = {"distillation_loss": distance(logits, teacher_logits, labels, mask, config.temperature, problem)}
        if config.hidden_weight:
            pairs_of = self.pruner.layer_pairs if self.pruner is not None else lambda layers: None
            attention_mask = inputs.get("attention_mask")
            sums["hidden_loss"] = hidden_distance(config, outputs, answers, mask, attention_mask, pairs_of)
        terms = {name: value * scale / items for name, value in sums.items()}
        loss = config.weight * terms["distillation_loss"]
        if config.weight < 1:  # a loss that is not finite must not count, even times zero
            loss = loss + (1 - config.weight) * task_loss
        if config.hidden_weight:
            loss = loss + config.hidden_weight * terms["hidden_loss"]
        share = 1.0 if over_all else 1.0 / self.current_gradient_accumulation_steps
        self._note({name: value * share for name, value in {"task_loss": task_loss, **terms}.items()})
        return (loss, outputs) if return_outputs else loss

    def _extended_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool, items: Any) -> Any:
        """The loss of the extended class, called as the Trainer calls it."""
        with_outputs = {"return_outputs": True} if return_outputs else {}
        return super().compute_loss(model, inputs, num_items_in_batch=items, **with_outputs)

    def _is_over_all_micro_batches(self, num_items_in_batch: Any) -> bool:
        """Whether the Trainer adds up the losses of micro-batches without dividing by their number.

        This is the condition of `Trainer.training_step`.
        """
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None and hasattr(Trainer, "loss_is_scaled_for_ga"):  # older ones do not read it
            return said
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _task_loss(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any) -> TaskLoss:
        """How the task's loss treats labels and items; found out once, and equal on every process."""
        if self._known_loss is not None:
            return self._known_loss
        labels = cast(torch.Tensor, inputs["labels"])
        of_tokens = labels.dim() > 1 and not labels.is_floating_point() and "shift_labels" not in inputs
        if of_tokens and getattr(self._model_config, "is_encoder_decoder", False):
            of_tokens = False  # decoder inputs are shifted, so labels are not
        if num_items_in_batch is None and not of_tokens:
            return TaskLoss()

        def loss_of(labels: torch.Tensor, items: Any) -> torch.Tensor:
            return cast(torch.Tensor, self._extended_loss(model, {**inputs, "labels": labels}, False, items))

        model.eval()  # without dropout the loss is deterministic, and no random numbers are drawn
        try:
            with torch.no_grad():
                found = ask_loss(loss_of, labels, num_items_in_batch, of_tokens)
        except IndexError as error:
            raise TeacherError(
                "teacher_model",
                f"expected a loss that ignores labels of {IGNORED}, as those of transformers do, got an error: {error}",
            ) from error
        model.train()
        told = [0, 0, 0] if found is None else [1, int(found.shifts_labels), int(found.divides_by_items)]
        knows, shifts, divides = torch.stack(gather(torch.tensor(told))).amax(0).tolist()
        task = TaskLoss(bool(shifts), bool(divides))
        if knows:
            self._known_loss = task
        return task

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Any]) -> Any:
        """The teacher's outputs, from one forward pass."""
        if self._placed_teacher is None:
            self._placed_teacher = place_frozen(cast(nn.Module, self.teacher), self.accelerator)
        teacher = cast(nn.Module, self.teacher)
        self._teacher_was_asked = True
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return self._placed_teacher(**teacher_inputs(teacher, inputs, self.label_names))

    @property
    def _model_config(self) -> Any:
        """The configuration of the model under wrappers and adapters; None if it has none."""
        return getattr(plain_model(self.accelerator.unwrap_model(cast(nn.Module, self.model))), "config", None)

    @property
    def _loss_scale(self) -> int:
        """What the Trainer multiplies a loss by that is divided by the items of all processes."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    # ---- Every training ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Start a training, and find out again how the task's loss treats labels and items."""
        self._known_loss = None
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward of the extended class. Raises TeacherError if the teacher was not used."""
        self._teacher_was_asked = False
        loss = super().training_step(*args, **kwargs)
        if self.teacher is not None and not self._teacher_was_asked:
            raise TeacherError(
                "teacher_model",
                f"{type(self).__name__}.compute_loss must call super().compute_loss(), or the teacher is not used; "
                "call it there, or pass compute_loss_func",
            )
        return loss
