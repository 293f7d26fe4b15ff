"""The dense run of a recipe: trained, evaluated and saved, for its pruned run or for those of several recipes."""

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel, Trainer

from ..engines.processes import wait_for_all
from ..foreign.transformers import keep_origin, opened_whole
from ..model.names import shape_of
from ..publish.card import write_card
from ..publish.record import save_record
from ..publish.redact import without_paths, without_tokens
from ..saved.model import SavedModel
from ..trainer.latency import measure_trainer
from ..trainer.recording import CardInput, record_of
from ..trainer.saving import whole_state_dict
from .models import freeze
from .outcome import Say, as_written, describe_data, describe_model, evaluation_of
from .prepare import Examples, Prepared, make_trainer
from .schema import Recipe
from .tasks import Scores, Task


@dataclass(frozen=True)
class DenseRun:
    """A dense model that was trained and saved, and what was measured of it.

    Attributes:
        folder: where it is saved.
        scores: its metrics on the test split.
        base: those of the model before it was trained, for recipes that prune at once; None if not measured.
        validation: its metrics on the validation split; None if not measured.
        parameters: the number of its parameters.
        steps: for how many optimizer steps it was trained.
        seconds: how long it took to train, evaluate and save it.
    """

    folder: Path
    scores: Scores
    base: Scores | None
    validation: dict[str, float] | None
    parameters: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Shared:
    """What the runs of a sweep share: the tokenized data, and the dense run where the recipe has one.

    A run with it is also evaluated on the validation split, and logs its results where its Trainer reports to.
    """

    examples: Examples
    dense: DenseRun | None


def train_dense(prepared: Prepared, say: Say, validate: bool = False) -> tuple[DenseRun, Trainer]:
    """Train the model dense, in place, evaluate it on the test split, and save it in `prepared.dense_folder`.

    With `validate`, it is evaluated on the validation split, too.
    """
    say("Fine-tuning the dense model")
    start = time.perf_counter()
    recipe, task, data = prepared.recipe, prepared.task, prepared.data
    trainer = make_trainer(prepared, dense=True)
    base = None
    if recipe.calibration is not None and not prepared.new_weights:
        base = task.evaluate(trainer, data["test"])
        say(f"Model without training on the test split: {as_text(base[''])}")
    train(trainer, recipe, dense=True)
    scores = task.evaluate(trainer, data["test"])
    validation = task.evaluate(trainer, data["validation"], "validation")[""] if validate else None
    shapes = [shape_of(parameter) for parameter in cast(PreTrainedModel, trainer.model).parameters()]
    with whole_state_dict(trainer.accelerator):
        trainer.save_model(str(prepared.dense_folder))
    say(f"Dense model on the test split: {as_text(scores[''])}")
    run = DenseRun(
        folder=prepared.dense_folder,
        scores=scores,
        base=base,
        validation=validation,
        parameters=sum(map(math.prod, shapes)),
        steps=trainer.state.global_step,
        seconds=time.perf_counter() - start,
    )
    return run, trainer


def write_dense_record(saved: SavedModel, prepared: Prepared, trainer: Trainer, run: DenseRun, say: Say) -> None:
    """Write the record and the card of a dense model beside it, with what a forward pass costs."""
    record = record_of(
        trainer,
        saved.hashes,
        configs=[],
        target_sparsity=None,
        kept_step=trainer.state.global_step,
        evaluated=[],
        costs=measure_trainer(trainer),
        given=CardInput(model_name=saved.folder.parent.name),
    )
    evaluations = [evaluation_of(prepared, metrics, group=group) for group, metrics in run.scores.items()]
    if run.validation is not None:
        evaluations.append(evaluation_of(prepared, run.validation, "validation"))
    changes = {
        "base_model": describe_model(prepared, say),
        "training_data": describe_data(prepared, "train"),
        "evaluations": evaluations,
        "recipe": without_paths(without_tokens(as_written(prepared.recipe))),
    }
    save_record(saved, record.model_copy(update=changes))
    write_card(saved)


def with_dense_model(prepared: Prepared, folder: Path, dtype: torch.dtype) -> Prepared:
    """The same with the dense model that is saved in a folder, in place of the model.

    One that an engine has sharded cannot be trained again, and one of another run is not at hand.
    """
    wait_for_all()  # the first process saves
    with opened_whole():
        model = open_saved(prepared.task, folder, dtype)
    keep_origin(model.config, prepared.model.config)  # its base model is still the one that the recipe names
    freeze(model, prepared.recipe.model.freeze)
    return dataclasses.replace(prepared, model=model, dense_folder=folder)


def train(trainer: Trainer, recipe: Recipe, dense: bool) -> None:
    """Train. Raises RecipeError for a best model chosen by a metric that evaluations do not have."""
    try:
        trainer.train()
    except KeyError as error:  # only the first evaluation shows which metrics there are
        if "metric_for_best_model" not in str(error):
            raise
        raise recipe.place(recipe.argument_error(dense, error)) from error


def open_saved(task: Task, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A saved model of a task, as a plain `from_pretrained` opens it."""
    return task.auto_class.from_pretrained(folder, dtype=dtype, trust_remote_code=False)


def as_text(metrics: dict[str, float]) -> str:
    """Metrics in a line of text."""
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
