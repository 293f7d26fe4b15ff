"""What a Trainer's loss is made of: the task's own, and what a teacher adds to it."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_pt_utils import nested_gather

from .distillation import (
    IGNORED,
    DistillationConfig,
    binary_divergence,
    divergence,
    hidden_difference,
    item_mask,
    layer_pairs,
    squared_error,
)
from .teachers import TeacherError, accepted_inputs, decoder_inputs, find_teacher, place_teacher

if TYPE_CHECKING:
    _Base = Trainer  # what this is mixed into
else:
    _Base = object


class LossMixin(_Base):
    """Mixes what a teacher adds into a Trainer's loss; without a teacher, all is as in the extended class.

    Attributes:
        teacher: the model that is distilled from, or None.
        distillation: how, or None.
    """

    teacher: nn.Module | None = None
    distillation: DistillationConfig | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        self._terms: dict[str, torch.Tensor] = {}
        self._terms_since: int | None = None  # the completed optimizer steps where what is added up begins
        super().__init__(*args, **kwargs)

    def _distil_from(self, teacher: nn.Module | str | os.PathLike, config: DistillationConfig | None) -> None:
        """Take a teacher for the trainings to come. Raises TeacherError for one that does not fit."""
        if self.args.n_gpu > 1:
            raise TeacherError(
                f"teacher_model: expected one process for each GPU, got one for {self.args.n_gpu}; start with "
                "accelerate launch"
            )
        self.distillation = config or DistillationConfig()
        self.teacher = find_teacher(teacher, cast(nn.Module, self.model))
        self._placed_teacher: nn.Module | None = None
        self._divides_by_items: bool | None = None

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
        micro-batches.

        Raises TeacherError where the model or the teacher gives no logits, or those of other shapes.
        """
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        config = cast(DistillationConfig, self.distillation)
        if "labels" not in inputs:
            raise TeacherError(f"teacher_model: expected inputs with labels to distil, got {', '.join(inputs)}")
        wanted = {"output_hidden_states": True} if config.hidden_weight else {}
        labels = cast(torch.Tensor, inputs["labels"])
        task_loss, outputs = super().compute_loss(model, {**inputs, **wanted}, True, num_items_in_batch)
        answers = self._ask_teacher({**inputs, **wanted}, labels)
        logits, wanted_logits = _logits("model", outputs), _logits("teacher", answers)
        if not logits.requires_grad:
            raise TeacherError(
                "teacher_model: expected a trainer whose loss is made of logits, got one that makes them only to be "
                "looked at (TRL's); distil with PruningTrainer"
            )
        if logits.shape != wanted_logits.shape:
            raise TeacherError(
                f"teacher_model: expected logits of shape {tuple(logits.shape)}, as the model gives, got "
                f"{tuple(wanted_logits.shape)}"
            )
        mask = self._items(inputs, labels)
        counted = num_items_in_batch is not None and (
            self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        )
        items: Any = num_items_in_batch if counted else mask.sum().clamp_min(1)
        scale = self._loss_scale if counted else 1
        if counted and self._ignores_items(task_loss, logits, inputs, mask, items):
            task_loss = task_loss * mask.sum() / items
        sums = {"distillation_loss": self._distance(logits, wanted_logits, labels, mask, config.temperature)}
        if config.hidden_weight:
            sums["hidden_loss"] = self._hidden(config, outputs, answers, inputs, mask)
        terms = {name: value * scale / items for name, value in sums.items()}
        loss = (1 - config.weight) * task_loss + config.weight * terms["distillation_loss"]
        if config.hidden_weight:
            loss = loss + config.hidden_weight * terms["hidden_loss"]
        share = 1.0 if counted else 1.0 / self.current_gradient_accumulation_steps
        self._note({name: value * share for name, value in {"task_loss": task_loss, **terms}.items()})
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _ask_teacher(self, inputs: dict[str, Any], labels: torch.Tensor) -> Any:
        """The teacher's outputs: one forward pass, without labels where it can do without."""
        if self._placed_teacher is None:
            self._placed_teacher = place_teacher(cast(nn.Module, self.teacher), self.accelerator)
        teacher = cast(nn.Module, self.teacher)
        asked = {name: value for name, value in inputs.items() if name not in self.label_names}
        if "decoder_input_ids" not in asked:
            asked |= decoder_inputs(teacher, labels)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            return self._placed_teacher(**accepted_inputs(teacher, asked))

    def _items(self, inputs: Mapping[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """Which items of the logits have a label."""
        if "shift_labels" in inputs:
            return item_mask(inputs["shift_labels"], shifted=False)
        return item_mask(labels, shifted=self._shifts_labels)

    @property
    def _shifts_labels(self) -> bool:
        """Whether labels stand at the token itself, and the loss compares them with the logits of the one before."""
        plain = self._plain_model
        shifts = LOSS_MAPPING.get(getattr(plain, "loss_type", None) or "") is ForCausalLMLoss
        return shifts and not plain.config.is_encoder_decoder

    @property
    def _plain_model(self) -> Any:
        model = cast(Any, self.accelerator.unwrap_model(self.model))
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    @property
    def _loss_scale(self) -> int:
        """What the Trainer multiplies a loss by that was divided by the items of all processes."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _kind(self, logits: torch.Tensor, labels: torch.Tensor) -> str:
        """What the labels are, as models decide it: `classes`, `yes_or_no` for each label, or `numbers`."""
        problem = getattr(self._plain_model.config, "problem_type", None)
        if problem == "regression" or logits.shape[-1] == 1:
            return "numbers"
        return "yes_or_no" if labels.is_floating_point() else "classes"

    def _distance(
        self,
        logits: torch.Tensor,
        wanted: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """How far the model's answers are from the teacher's, summed over items."""
        kind = self._kind(logits, labels)
        expected = logits.shape[:-1] if kind == "classes" else logits.shape
        if mask.shape != expected and mask.numel() != math.prod(expected):
            raise TeacherError(
                f"teacher_model: expected labels of shape {tuple(expected)} for logits of {tuple(logits.shape)}, got "
                f"{tuple(mask.shape)}"
            )
        if kind == "classes":
            return divergence(logits, wanted, mask, temperature)
        mask = mask.reshape(expected)
        if kind == "yes_or_no":
            return binary_divergence(logits, wanted, mask, temperature)
        return squared_error(logits, wanted, mask)

    def _ignores_items(
        self,
        task_loss: torch.Tensor,
        logits: torch.Tensor,
        inputs: Mapping[str, Any],
        mask: torch.Tensor,
        items: Any,
    ) -> bool:
        """Whether the task's loss is a mean over this micro-batch, although it was to be divided by all items.

        No model tells. So where the two differ, the loss is compared with the cross entropy of the logits, until it
        has been seen once.
        """
        if self.compute_loss_func is not None:
            return False
        if self._kind(logits, inputs["labels"]) != "classes":
            return True
        share = float(mask.sum() / items)
        if share in (0.0, 1.0):
            return False
        if self._divides_by_items is None:
            labels = inputs.get("shift_labels", inputs["labels"])
            if "shift_labels" not in inputs and self._shifts_labels:
                labels = labels.roll(-1, dims=-1)
            labels = labels.masked_fill(~mask, IGNORED).flatten()
            answers = logits.detach().float().reshape(-1, logits.shape[-1])
            mean = float(nn.functional.cross_entropy(answers, labels, ignore_index=IGNORED)) * self._loss_scale
            seen = float(task_loss.detach())
            self._divides_by_items = abs(seen - mean * share) < abs(seen - mean)
        return not self._divides_by_items

    def _hidden(
        self,
        config: DistillationConfig,
        outputs: Mapping[str, Any],
        answers: Mapping[str, Any],
        inputs: Mapping[str, Any],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """The difference of hidden states, summed over items; of encoder-decoders, that of the decoder."""
        states, wanted = _hidden_states("model", outputs), _hidden_states("teacher", answers)
        pairs = layer_pairs(len(states), len(wanted), config.hidden_layers)
        weights = _token_weights(states[0], mask, inputs.get("attention_mask"))
        return hidden_difference([states[one] for one, _ in pairs], [wanted[other] for _, other in pairs], weights)

    # ---- Logs ----

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Forward and backward as the extended class does them."""
        if self._terms_since is None:
            self._terms_since = self.state.global_step
        return super().training_step(*args, **kwargs)

    def _forget_terms(self) -> None:
        """Begin to add up anew."""
        self._terms, self._terms_since = {}, None

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
            self._forget_terms()
        super().log(logs, *args, **kwargs)


def _logits(whose: str, outputs: Any) -> torch.Tensor:
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if not torch.is_tensor(logits):
        came = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise TeacherError(f"teacher_model: expected logits in the outputs of the {whose}, got {came}")
    return logits


def _hidden_states(whose: str, outputs: Mapping[str, Any]) -> Sequence[torch.Tensor]:
    for name in ("decoder_hidden_states", "hidden_states"):
        states = outputs.get(name)
        if states:
            return cast(Sequence[torch.Tensor], states)
    raise TeacherError(f"hidden_weight: expected 0, for the {whose} gives no hidden states, only {', '.join(outputs)}")


def _token_weights(states: torch.Tensor, mask: torch.Tensor, attention_mask: Any) -> torch.Tensor:
    """How much each token counts, so that each item counts once: those with a label, or all of a sample together."""
    tokens = states.shape[1:-1]
    if mask.shape == states.shape[:-1]:
        return mask.float()
    of_samples = mask.reshape(len(states), -1).float().sum(1).reshape(-1, *(1 for _ in tokens))
    seen = torch.ones(states.shape[:-1], device=states.device)
    if torch.is_tensor(attention_mask) and attention_mask.shape == states.shape[:-1]:
        seen = attention_mask.float()
    dims = tuple(range(1, seen.dim()))
    return of_samples * seen / seen.sum(dims, keepdim=True).clamp_min(1)
