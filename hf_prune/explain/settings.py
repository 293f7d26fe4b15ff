"""How a model is explained, what is known of it beside its weights, and which models can be explained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import PreTrainedModel

from ..errors import ExplainError
from ..foreign.transformers import TASK_MAPPING
from ..publish.record import Source
from ..saved.files import SavedFile
from ..saved.removed import Removed

Task = Literal["text-classification", "text-generation"]

TASKS: tuple[Task, ...] = ("text-classification", "text-generation")


@dataclass(frozen=True)
class Settings:
    """How an explanation is measured.

    Attributes:
        resamples: of the bootstrap.
        seed: of the bootstrap, of the samples that are drawn, and of perturbations.
        batch_size: samples that pass through a model together.
        expressions: name -> regular expression of slices of texts, beside those that are built in.
        show_texts: whether texts of samples may be written into the explanation.
        drift_samples: on how many samples hidden states are compared.
        training_samples: on how many samples of the training data the gap is measured.
        perturbations: whether classifiers are asked about perturbed texts.
        costs: whether forward passes are timed, and energy is measured.
    """

    resamples: int = 1000
    seed: int = 0
    batch_size: int = 32
    expressions: Mapping[str, str] = field(default_factory=dict)
    show_texts: bool = False
    drift_samples: int = 256
    training_samples: int = 1000
    perturbations: bool = True
    costs: bool = True


@dataclass(frozen=True)
class Known:
    """What is known of the models beside their weights in memory.

    Attributes:
        model: the name of the pruned model; `dense_model` that of the dense one.
        data: what the samples are.
        command: measures the explanation again, in the folder of the pruned model.
        files: the weight files of the pruned model; their bytes are `file_bytes`, those of the dense one
            `dense_file_bytes`.
        nonzero: how many weights in the files are not zero; None to count them in the model.
        prunable: the names of the tensors that could be pruned; None for those that are by default.
        removed: what was cut out of the model.
        notes: what could not be said.
    """

    model: str
    data: Source
    command: str
    dense_model: str | None = None
    files: Mapping[str, SavedFile] = field(default_factory=dict)
    file_bytes: int | None = None
    dense_file_bytes: int | None = None
    nonzero: int | None = None
    dense_nonzero: int | None = None
    prunable: Sequence[str] | None = None
    removed: Removed | None = None
    notes: tuple[str, ...] = ()


def task_of(model: type[PreTrainedModel]) -> Task:
    """The task of a class of models. Raises ExplainError for others than those that can be explained."""
    for task in TASKS:
        if model.__name__ in TASK_MAPPING[task].values():
            return task
    raise ExplainError(
        "model",
        f"expected a model for {' or '.join(TASKS)} (such as BertForSequenceClassification or LlamaForCausalLM), got "
        f"{model.__name__}",
    )


def check_model(model: PreTrainedModel) -> Task:
    """The task of a model. Raises ExplainError for one that cannot be explained."""
    task, config = task_of(type(model)), model.config
    if task == "text-generation" and getattr(config, "is_encoder_decoder", False):
        raise ExplainError("model", f"expected a model without an encoder for {task}, got {type(model).__name__}")
    if task == "text-classification":
        problem = getattr(config, "problem_type", None)
        if len(labels_of(model)) < 2 or problem in ("regression", "multi_label_classification"):
            raise ExplainError(
                "model",
                "expected a classifier with one label for each text, of two or more, got one with "
                f"{len(labels_of(model))} ({problem or 'regression'})",
            )
    return task


def have_same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models have the same parameters, by name and value."""
    weights, others = dict(one.named_parameters()), dict(other.named_parameters())
    return weights.keys() == others.keys() and all(
        weight.dtype == others[name].dtype and torch.equal(weight.detach().cpu(), others[name].detach().cpu())
        for name, weight in weights.items()
    )


def labels_of(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's labels, in the order of its outputs."""
    return [str(name) for _, name in sorted((model.config.id2label or {}).items())]


def check_pair(pruned: PreTrainedModel, dense: PreTrainedModel) -> None:
    """Raise ExplainError for a dense model that answers other questions than the pruned one."""
    if check_model(dense) != check_model(pruned):
        raise ExplainError("dense", f"expected a model like {type(pruned).__name__}, got {type(dense).__name__}")
    if task_of(type(pruned)) == "text-classification" and labels_of(dense) != labels_of(pruned):
        raise ExplainError(
            "dense",
            f"expected the labels of the pruned model, {labels_of(pruned)}, got {labels_of(dense)}",
        )
