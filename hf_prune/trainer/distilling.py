"""What a Trainer's loss is made of: the task's own, and what a teacher adds to it."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import nested_gather

from ..config.distillation import DistillationConfig
from ..distillation.compare import logits_to_compare, states_to_compare, token_weights
from ..distillation.losses import IGNORED, binary_divergence, divergence, hidden_difference, item_mask, squared_error
from ..distillation.task_loss import TaskLoss, ask_loss
from ..distillation.teachers import find_teacher, takes_input, teacher_inputs
from ..engines.placing import place_frozen
from ..errors import DistillationConfigError, TeacherError
from ..model.names import plain_model

logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    _Base = Trainer  # what this is mixed into
else:
    _Base = object


class LossMixin(_Base):
    """Mixes what a teacher adds into a Trainer's loss; without a teacher, all is as in the extended class.

    Attributes:
        teacher: the model that is distilled from, or None. One that was given as a model is this very object, frozen
            and moved to where the engine has models.
        teacher_name: the path or Hub name that it was opened with, or None.
        distillation: how, or None.
    """

    teacher: nn.Module | None = None
    teacher_name: str | None = None
    distillation: DistillationConfig | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        self._placed_teacher: nn.Module | None = None
        self._teacher_was_asked = False
        self._begin_terms()
        super().__init__(*args, **kwargs)

    def _begin_terms(self) -> None:
        """Begin to add up, and to find out what the task's loss does, anew."""
        self._terms: dict[str, torch.Tensor] = {}
        self._terms_since: int | None = None  # the completed optimizer steps where what is added up begins
        self._known_loss: TaskLoss | None = None

    def _distil_from(self, teacher: nn.Module | str | os.PathLike, config: DistillationConfig | None) -> None:
        """Take a teacher for the trainings to come. Raises TeacherError for one that does not fit."""
        if self.args.n_gpu > 1:
            raise TeacherError(
                "teacher_model",
                f"expected one process for each GPU, got one for {self.args.n_gpu}; start with accelerate launch",
            )
        self.distillation = config or DistillationConfig()
        if self.distillation.hidden_weight and not takes_input(cast(nn.Module, self.model), "output_hidden_states"):
            raise DistillationConfigError(
                "hidden_weight", "expected 0 for a model whose forward pass takes no output_hidden_states"
            )
        self.teacher = find_teacher(teacher, cast(nn.Module, self.model))
        self.teacher_name = None if isinstance(teacher, nn.Module) else str(teacher)

    def _warn_without_teacher(self, checkpoint: Path) -> None:
        """Say so if a training was distilled and is to go on without a teacher."""
        path = checkpoint / TRAINER_STATE_NAME
        if self.teacher is not None or not path.exists():
            return
        history = TrainerState.load_from_json(str(path)).log_history
        if any("distillation_loss" in entry for entry in history):
            logger.warning(
                "%s: this training had a teacher; it goes on without, for no teacher_model is given", checkpoint
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss as the extended class computes it; in training with a teacher, mixed with what it adds.

        Both are divided by the same number: of the items of all micro-batches and processes where the Trainer counts
        them, else of this micro-batch's. So batches may be split as one likes. Models that are told the number and
        ignore it (many that classify, T5) are corrected: the stock Trainer multiplies their loss by the number of
        micro-batches. What the loss does is found out before the first step, by up to five forward passes of the model
        in eval mode.

        Raises TeacherError where the model or the teacher gives no logits, or those of other shapes.
        """
        if self.teacher is None or not model.training:
            return self._extended_loss(model, inputs, return_outputs, num_items_in_batch)
        config = cast(DistillationConfig, self.distillation)
        if "labels" not in inputs:
            raise TeacherError("teacher_model", f"expected inputs with labels to distil, got {', '.join(inputs)}")
        labels = cast(torch.Tensor, inputs["labels"])
        task = self._task_loss(model, inputs, num_items_in_batch)
        asked = {**inputs, "output_hidden_states": True} if config.hidden_weight else dict(inputs)
        task_loss, outputs = self._extended_loss(model, dict(asked), True, num_items_in_batch)
        answers = self._ask_teacher(asked)
        logits, teacher_logits = logits_to_compare(outputs, answers)
        if not logits.requires_grad:
            raise TeacherError(
                "teacher_model",
                "expected a trainer whose loss is made of logits, got one that makes them only to be "
                "looked at (TRL's); distil with PruningTrainer",
            )

        mask = item_mask(inputs.get("shift_labels", labels), task.shifts_labels and "shift_labels" not in inputs)
        over_all = self._is_over_all_micro_batches(num_items_in_batch)
        items: Any = mask.sum().clamp_min(1)
        scale = 1
        if over_all and num_items_in_batch is not None:
            if not task.divides_by_items and not getattr(self, "loss_is_scaled_for_ga", None):
                labelled = mask.sum()  # with none, a mean is 0 / 0
                task_loss = torch.where(labelled > 0, task_loss * labelled / num_items_in_batch, 0.0)
            items, scale = num_items_in_batch, self._loss_scale
        elif over_all:
            items = items * self.current_gradient_accumulation_steps

        sums = {"distillation_loss": self._distance(logits, teacher_logits, labels, mask, config.temperature)}
        if config.hidden_weight:
            sums["hidden_loss"] = self._hidden(config, outputs, answers, inputs, mask)
        terms = {name: value * scale / items for name, value in sums.items()}
        loss = config.weight * terms["distillation_loss"]
        if config.weight < 1:  # or a loss that is not finite would count, times zero
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
        """Whether the Trainer takes losses for parts of that of all micro-batches, and does not divide by their number.

        This is the condition of `Trainer.training_step`.
        """
        said: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if said is not None:
            return said
        return (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func is not None

    def _task_loss(self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Any) -> TaskLoss:
        """What the task's loss does; found out once, and the same on every process."""
        if self._known_loss is not None:
            return self._known_loss
        labels = cast(torch.Tensor, inputs["labels"])
        of_tokens = labels.dim() > 1 and not labels.is_floating_point() and "shift_labels" not in inputs
        if of_tokens and getattr(self._model_config, "is_encoder_decoder", False):
            of_tokens = False  # a decoder reads the labels before, so none are shifted
        if num_items_in_batch is None and not of_tokens:
            return TaskLoss()

        def loss_of(labels: torch.Tensor, items: Any) -> torch.Tensor:
            return cast(torch.Tensor, self._extended_loss(model, {**inputs, "labels": labels}, False, items))

        model.eval()  # without dropout the same batch has the same loss, and no random number is drawn
        try:
            with torch.no_grad():
                found = ask_loss(loss_of, labels, num_items_in_batch, of_tokens)
        except IndexError as error:
            raise TeacherError(
                "teacher_model",
                f"expected a loss that leaves out labels of {IGNORED}, as those of transformers do, got "
                f"an error: {error}",
            ) from error
        model.train()
        told = [0, 0, 0] if found is None else [1, int(found.shifts_labels), int(found.divides_by_items)]
        of_all = nested_gather(torch.tensor([told], device=labels.device), self.args.parallel_mode)
        knows, shifts, divides = cast(torch.Tensor, of_all).amax(0).tolist()
        task = TaskLoss(bool(shifts), bool(divides))
        if knows:
            self._known_loss = task
        return task

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Any]) -> Any:
        """The teacher's outputs: one forward pass."""
        if self._placed_teacher is None:
            self._placed_teacher = place_frozen(cast(nn.Module, self.teacher), self.accelerator)
        teacher = cast(nn.Module, self.teacher)
        self._teacher_was_asked = True
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return self._placed_teacher(**teacher_inputs(teacher, inputs, self.label_names))

    @property
    def _model_config(self) -> Any:
        """The configuration of the model under wrappers and adapters; None where it has none."""
        return getattr(plain_model(self.accelerator.unwrap_model(cast(nn.Module, self.model))), "config", None)

    @property
    def _loss_scale(self) -> int:
        """What the Trainer multiplies a loss by that was divided by the items of all processes."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _kind(self, logits: torch.Tensor, labels: torch.Tensor) -> str:
        """What the labels are, as models decide it: `classes`, `yes_or_no` for each label, or `numbers`."""
        problem = getattr(self._model_config, "problem_type", None)
        if problem == "regression" or logits.shape[-1] == 1:
            return "numbers"
        return "yes_or_no" if labels.is_floating_point() else "classes"

    def _distance(
        self,
        logits: torch.Tensor,
        of_teacher: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """How far the model's answers are from the teacher's, summed over items."""
        kind = self._kind(logits, labels)
        expected = logits.shape[:-1] if kind == "classes" else logits.shape
        if mask.shape != expected and mask.numel() != math.prod(expected):
            raise TeacherError(
                "teacher_model",
                f"expected labels of shape {tuple(expected)} for logits of {tuple(logits.shape)}, got "
                f"{tuple(mask.shape)}",
            )
        if kind == "classes":
            return divergence(logits, of_teacher, mask, temperature)
        mask = mask.reshape(expected)
        if kind == "yes_or_no":
            return binary_divergence(logits, of_teacher, mask, temperature)
        return squared_error(logits, of_teacher, mask)

    def _hidden(
        self,
        config: DistillationConfig,
        outputs: Mapping[str, Any],
        answers: Mapping[str, Any],
        inputs: Mapping[str, Any],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The difference of hidden states, summed over items; of encoder-decoders, that of the decoder."""
        states, of_teacher = states_to_compare(config, outputs, answers)
        if len(mask) != len(states[0]):
            raise DistillationConfigError(
                "hidden_weight",
                f"expected 0 where labels are of several texts together, got {len(mask)} labels for "
                f"{len(states[0])} texts",
            )
        items_are_tokens = outputs["logits"].dim() == 3
        weights = [token_weights(state, mask, items_are_tokens, inputs.get("attention_mask")) for state in states]
        return hidden_difference(states, of_teacher, weights)

    # ---- Logs ----

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Every attempt at training adds up anew: `auto_find_batch_size` makes several."""
        self._begin_terms()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward as the extended class does them. Raises TeacherError if nobody asked the teacher."""
        if self._terms_since is None:
            self._terms_since = self.state.global_step
        self._teacher_was_asked = False
        loss = super().training_step(*args, **kwargs)
        if self.teacher is not None and not self._teacher_was_asked:
            raise TeacherError(
                "teacher_model",
                f"expected a loss that super().compute_loss() is part of, got that of "
                f"{type(self).__name__}.compute_loss, where the teacher is never asked; call it there, or give "
                "compute_loss_func",
            )
        return loss

    def _note(self, terms: Mapping[str, torch.Tensor], shared: bool = False) -> None:
        """Add up terms of the loss, as the Trainer adds up the loss; `shared` are sums over what processes hold."""
        factor = self.accelerator.num_processes if shared else 1  # the log has the mean over processes
        for name, value in terms.items():
            self._terms[name] = self._terms.get(name, 0.0) + value.detach().float() * factor

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the extended class does; with the loss of training, its terms, the means of an optimizer step."""
        if "loss" in logs and self._terms_since is not None:
            steps = max(self.state.global_step - self._terms_since, 1)
            for name, value in self._terms.items():
                logs[name] = nested_gather(value, self.args.parallel_mode).mean().item() / steps
            self._terms, self._terms_since = {}, None
        super().log(logs, *args, **kwargs)
