"""Everything that a run needs, loaded and checked before anything is written."""

import copy
import inspect
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from ..config.distillation import DistillationConfig, check_width
from ..distillation.compare import logits_to_compare, states_to_compare
from ..distillation.teachers import find_teacher, teacher_inputs
from ..engines.launch import check_engine, check_sharding, wrapping_layers
from ..engines.launched import launched_processes, wants_deepspeed, wants_fsdp
from ..engines.processes import wait_for_all
from ..errors import (
    CalibrationError,
    DistillationConfigError,
    PruningConfigError,
    RecipeError,
    StructureError,
    TargetError,
    TeacherError,
    one_line,
)
from ..foreign.transformers import opened_whole
from ..masking.plan import Plan
from ..masking.pruner import Pruner
from ..model.expressions import refuse_slow
from ..model.names import every_name
from ..oneshot.planning import OneShotPlan, plan_prune
from ..oneshot.prune import check_prune
from ..oneshot.windows import Batch, as_batches, sample_batches
from ..publish.record import RemovedTokens
from ..structure.chosen import Chosen
from ..structure.vocabulary import SmallerVocabulary, smaller_vocabulary
from ..trainer.callback import check_needs, check_saving
from ..trainer.latency import SAMPLES
from ..trainer.training import training_steps
from .data import load_data
from .explain_data import check_explained
from .models import check_finite, check_length, freeze, load_model, load_tokenizer, set_generation, set_padding
from .names import resolve_name
from .schema import Recipe
from .tasks import TASKS, Task, TextGeneration


@dataclass(frozen=True)
class Examples:
    """The tokenized data of a run, for others with the same data: `rows` before and `data` after it, and the tokenizer.

    `tokenizer` is as tokenizing left it, and no run has it: each gets a copy.
    """

    recipe: Recipe
    task: Task
    tokenizer: PreTrainedTokenizerBase
    rows: datasets.DatasetDict
    data: datasets.DatasetDict

    def fit(self, recipe: Recipe) -> bool:
        """Whether another recipe has the same data, tokenized in the same way."""
        other = self.recipe
        names = ("task", "dataset", "metrics", "generation")
        fields = ("name", "gguf_file", "config", "tokenizer")
        return all(getattr(recipe, name) == getattr(other, name) for name in names) and all(
            getattr(recipe.model, name) == getattr(other.model, name) for name in fields
        )


@dataclass
class Prepared:
    """Everything that a run needs, loaded. `new_weights` are not in the model's file and were drawn at random.

    `rows` are the rows of `data` before they were tokenized; `vocabulary` is what is left of the tokenizer for the
    pruned run, where tokens are removed. Once they are, `teacher` and `removed_tokens` are there, and `dense_fields`:
    the field of the dense model's configuration that counts its tokens. `dense_folder` is where the dense model is
    saved.
    """

    recipe: Recipe
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: datasets.DatasetDict
    new_weights: list[str]
    rows: datasets.DatasetDict
    dense_folder: Path
    vocabulary: SmallerVocabulary | None = None
    teacher: PreTrainedModel | None = None
    removed_tokens: RemovedTokens | None = None
    dense_fields: dict[str, int] = field(default_factory=dict)

    @property
    def has_target(self) -> bool:
        """Whether what is pruned is found for a target, by measuring the model."""
        return any(config.has_target for config in self.recipe.pruning_configs)

    def plan_at_once(self) -> OneShotPlan:
        """What is pruned at once, for a recipe with a calibration. Raises RecipeError as `plan` does."""
        calibration = self.recipe.calibration_config
        assert calibration is not None
        try:
            length = None if isinstance(self.task, TextGeneration) else self.recipe.dataset.max_length
            plan = plan_prune(self.model, self.recipe.pruning_configs[0], calibration, length)
            return replace(plan, target_quality=self.recipe.target_quality)
        except (PruningConfigError, TargetError) as error:
            raise self.recipe.place(RecipeError(problems=error.problems_under("pruning"))) from error

    def plan(self, directory: Path | None = None) -> tuple[Plan, Chosen | None]:
        """What the pruned run would prune, and what was chosen for a target; the model is measured for one.

        It is measured as the pruned run gets it, without unused tokens. `directory` is where `latency_table.json` is
        kept. Raises RecipeError for a pruning section that does not fit the model.
        """
        pruned = self
        if self.has_target and self.vocabulary is not None:
            pruned = _without_tokens(replace(self, model=copy.deepcopy(self.model)), self.vocabulary)
        steps = training_steps(self.recipe.training_arguments(), self.data["train"])
        try:
            pruner = Pruner(pruned.model, self.recipe.pruning_configs, example=pruned._example)
            pruner.search(directory, dense_fields=pruned.dense_fields)
            return pruner.plan(steps).of_model(pruned.model), pruner.chosen
        except (PruningConfigError, StructureError, TargetError) as error:
            raise self.recipe.place(RecipeError(problems=error.problems_under("pruning"))) from error

    def _example(self) -> dict[str, Any]:
        """A batch of the first training samples."""
        data = _taken(self)
        samples = [data[index] for index in range(min(SAMPLES, len(data)))]
        return dict(self.task.collator(self.tokenizer, self.model)(samples))


def prepare(recipe: Recipe, examples: Examples | None = None) -> Prepared:
    """Load and check everything that a recipe names. Raises RecipeError if the data or the model do not fit it.

    `examples` are the tokenized data of another run, which are used again if the recipe has the same. Raises
    LaunchError if several processes were launched and do not train together as requested.
    """
    try:
        return _prepare(recipe, examples if examples is not None and examples.fit(recipe) else None)
    except RecipeError as error:
        raise recipe.place(error) from error


def examples_of(prepared: Prepared) -> Examples:
    """The tokenized data of a run that has not begun, for other runs."""
    tokenizer = copy.deepcopy(prepared.tokenizer)
    return Examples(prepared.recipe, prepared.task, tokenizer, prepared.rows, prepared.data)


def _prepare(recipe: Recipe, examples: Examples | None) -> Prepared:
    if recipe.model.name is not None:
        resolve_name("model.name", recipe.model.name)
    task = TASKS[recipe.task](recipe) if examples is None else examples.task
    _check_output(Path(recipe.output_dir))
    args = recipe.training_arguments()
    if examples is None:
        with args.main_process_first():  # the other processes find what it has put into the cache
            data = task.read(load_data(recipe.dataset, task.columns))
        tokenizer = load_tokenizer(recipe.model)
    else:
        data, tokenizer = examples.rows, copy.deepcopy(examples.tokenizer)
    check_explained(recipe)
    set_seed(args.seed)  # what is new in the model is drawn at random
    with opened_whole():  # every process needs the weights to plan the pruning
        model, new_weights = load_model(recipe.model, task, tokenizer)
    check_finite(model)
    set_padding(model, tokenizer)
    check_length(model, tokenizer, recipe.dataset.max_length)
    set_generation(model, recipe)
    _check_expressions(recipe, model)
    freeze(model, recipe.model.freeze)
    if examples is None:
        with args.main_process_first():
            tokenized = task.tokenize(data, tokenizer, model)
    else:
        tokenized = examples.data
    vocabulary = _smaller_vocabulary(recipe, model, tokenizer, task.texts(data))
    dense_folder = Path(recipe.output_dir, "dense")
    prepared = Prepared(recipe, task, model, tokenizer, tokenized, new_weights, data, dense_folder, vocabulary)
    for dense in (False, True):
        _try_trainer(prepared, dense)
    if recipe.calibration_config is not None:
        _check_calibration(prepared)
    return prepared


def _taken(prepared: Prepared) -> datasets.Dataset:
    """The training split with the columns that the model takes."""
    data = prepared.data["train"]
    taken = {*inspect.signature(prepared.model.forward).parameters, "label", "label_ids"}
    return data.select_columns([name for name in data.column_names if name in taken])


def calibration_data(prepared: Prepared) -> list[Batch]:
    """The batches that a recipe's model is calibrated with, from the training split.

    Language models get windows of `calibration.length` tokens of its texts; other models get samples as they are
    trained with, labels included, chosen with `calibration.seed`. Raises RecipeError if there are too few.
    """
    config, task = prepared.recipe.calibration_config, prepared.task
    assert config is not None
    try:
        if isinstance(task, TextGeneration):
            return as_batches(task.texts(prepared.rows), prepared.model, prepared.tokenizer, config)
        return sample_batches(_taken(prepared), task.collator(prepared.tokenizer, prepared.model), config)
    except CalibrationError as error:
        raise RecipeError(problems=error.problems_under("calibration")) from error


def _check_calibration(prepared: Prepared) -> None:
    """Raise RecipeError for what cannot be pruned at once, before anything is trained."""
    recipe, config = prepared.recipe, prepared.recipe.calibration_config
    assert config is not None
    args = recipe.training_arguments()
    if launched_processes() > 1 or wants_fsdp(args) or wants_deepspeed(args):
        raise RecipeError(
            "calibration",
            f"expected one process without FSDP and DeepSpeed, as layers are pruned one after another, got "
            f"{launched_processes()}; prune with hf-prune prune, and train the model on with many in a recipe with "
            "pruning: {method: keep}",
        )
    if config.device is not None:
        raise RecipeError(
            "calibration.device",
            "must not be set in a recipe, whose model is where the Trainer computes; use hf-prune prune with --device "
            f"{config.device} --offload-weights, and train the model on in a recipe with pruning: {{method: keep}}",
        )
    try:
        check_prune(prepared.model, recipe.pruning_configs[0], calibration_data(prepared), config)
    except (PruningConfigError, TargetError, CalibrationError) as error:
        raise RecipeError(problems=error.problems_under("pruning")) from error


def _smaller_vocabulary(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> SmallerVocabulary | None:
    """What is left of the tokenizer where a recipe has unused tokens removed; RecipeError if they cannot be."""
    if recipe.model.vocabulary is None:
        return None
    try:
        vocabulary = smaller_vocabulary(model, tokenizer, texts)
        vocabulary.check(model)
    except StructureError as error:
        raise RecipeError("model.vocabulary", one_line(error)) from error
    return vocabulary


def with_smaller_vocabulary(prepared: Prepared) -> Prepared:
    """The same with the vocabulary of the pruned run: the model and the teacher without the other tokens, in place.

    Every process must call this, before it trains.
    """
    vocabulary, recipe = prepared.vocabulary, prepared.recipe
    if vocabulary is None:
        return prepared
    teacher = None
    if recipe.distillation_config is not None and (recipe.teacher is not None or recipe.dense is not None):
        wait_for_all()  # the first process saves the dense model
        given = recipe.teacher or prepared.dense_folder
        with opened_whole():
            teacher = cast(PreTrainedModel, find_teacher(given, prepared.model))
    return replace(_without_tokens(prepared, vocabulary, teacher), teacher=teacher)


def _without_tokens(
    prepared: Prepared, vocabulary: SmallerVocabulary, teacher: PreTrainedModel | None = None
) -> Prepared:
    """The same with a smaller vocabulary, whose other tokens are removed from the model and a teacher, in place."""
    recipe = prepared.recipe
    before = _parameters(prepared.model)
    try:
        dense_fields = vocabulary.cut(prepared.model)
        if teacher is not None:
            vocabulary.cut(teacher)
    except StructureError as error:
        raise recipe.place(RecipeError("model.vocabulary", one_line(error))) from error
    with recipe.training_arguments().main_process_first():
        data = prepared.task.tokenize(prepared.rows, vocabulary.tokenizer, prepared.model)
    parameters = before - _parameters(prepared.model)
    removed = RemovedTokens(
        before=len(prepared.tokenizer),
        after=len(vocabulary.tokenizer),
        parameters=parameters,
        bytes=parameters * prepared.model.dtype.itemsize,
    )
    return replace(
        prepared, tokenizer=vocabulary.tokenizer, data=data, removed_tokens=removed, dense_fields=dense_fields
    )


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check_expressions(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raise RecipeError for an expression that takes too long to match: other people may have written the recipe."""
    names = every_name(model)
    configs = recipe.pruning_configs
    of_pruning = [
        text for config in configs for text in (*(config.targets or ()), *config.exclude, *(config.overrides or ()))
    ]
    try:
        refuse_slow("model.freeze", recipe.model.freeze, names)
        refuse_slow("pruning", of_pruning, names)
    except TargetError as error:
        raise RecipeError(problems=error.problems) from error


def make_evaluator(prepared: Prepared) -> Trainer:
    """Make a Trainer with the arguments of the pruned run that evaluates the model as it is."""
    return _make(prepared, prepared.task.trainers[0], prepared.recipe.training_arguments())


def make_trainer(prepared: Prepared, dense: bool) -> Trainer:
    """Make the Trainer of the dense run, or of the pruned run."""
    stock, pruning = prepared.task.trainers
    extra: dict[str, Any] = {} if dense else {"pruning_config": prepared.recipe.training_configs}
    if not dense and prepared.recipe.distillation_config is not None:
        wait_for_all()  # the first process saves the dense model
        extra |= {
            "teacher_model": prepared.teacher or prepared.recipe.teacher or prepared.dense_folder,
            "distillation_config": prepared.recipe.distillation_config,
        }
    return _make(prepared, stock if dense else pruning, prepared.recipe.training_arguments(dense), **extra)


def _make(prepared: Prepared, trainer: type[Trainer], args: TrainingArguments, **extra: Any) -> Trainer:
    with wrapping_layers(prepared.model):
        return trainer(
            model=prepared.model,
            args=args,
            train_dataset=prepared.data["train"],
            eval_dataset=prepared.data["validation"],
            processing_class=prepared.tokenizer,
            data_collator=prepared.task.collator(prepared.tokenizer, prepared.model),
            compute_metrics=prepared.task.compute_metrics(prepared.tokenizer),
            **extra,
        )


def _try_trainer(prepared: Prepared, dense: bool) -> None:
    """Make a Trainer and its optimizer and drop them: arguments that they refuse are reported before any run."""
    recipe = prepared.recipe
    if dense and recipe.dense is None:
        return
    with tempfile.TemporaryDirectory() as scratch:
        args = recipe.training_arguments(dense, output_dir=scratch, push_to_hub=False)
        check_sharding(args)
        try:
            with wrapping_layers(prepared.model):
                trainer = prepared.task.trainers[0](
                    model=prepared.model,
                    args=args,
                    train_dataset=prepared.data["train"],
                    eval_dataset=prepared.data["validation"],
                    processing_class=prepared.tokenizer,
                    data_collator=prepared.task.collator(prepared.tokenizer, prepared.model),
                )
            trainer.create_optimizer()
        except (ValueError, ImportError, RuntimeError, TypeError, OSError) as error:
            raise recipe.argument_error(dense, error) from error
        check_engine(trainer)
        if not dense:
            if recipe.calibration is None:
                _check_method(prepared, trainer)
            _check_teacher(prepared, trainer)


def _check_method(prepared: Prepared, trainer: Trainer) -> None:
    """Raise RecipeError for a method that needs data which this way of training does not provide."""
    try:
        check_needs(prepared.recipe.pruning_configs, trainer.args, trainer.is_deepspeed_enabled)
        check_saving(prepared.recipe.pruning_configs, trainer.accelerator.state.deepspeed_plugin)
    except PruningConfigError as error:
        raise RecipeError(problems=error.problems_under("pruning")) from error


def _check_teacher(prepared: Prepared, trainer: Trainer) -> None:
    """Raise RecipeError for a teacher that cannot be opened or does not fit, and for layers that cannot be compared."""
    name, config = prepared.recipe.teacher, prepared.recipe.distillation_config
    if config is None:
        return
    try:
        check_width(config, [one.structure for one in prepared.recipe.pruning_configs])
        teacher = find_teacher(name, prepared.model) if name is not None else prepared.model
        if trainer.args.world_size == 1:  # else models may be too large for one process
            _try_teacher(prepared.model, teacher, trainer, config)
    except (TeacherError, DistillationConfigError) as error:
        names = {"teacher_model": "teacher"}
        problems = [(f"distillation.{names.get(key, key)}", message) for key, message in error.problems]
        raise RecipeError(problems=problems) from error


@torch.no_grad()
def _try_teacher(
    student: torch.nn.Module, teacher: torch.nn.Module, trainer: Trainer, config: DistillationConfig
) -> None:
    """Compare the outputs of model and teacher on one batch. Raises as training would, and TeacherError otherwise."""
    hidden = {"output_hidden_states": True} if config.hidden_weight else {}
    batch = {**next(iter(trainer.get_train_dataloader())), **hidden}
    outputs = []
    for model in (student, teacher):
        device = next(model.parameters()).device
        inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        try:
            outputs.append(model.eval()(**teacher_inputs(model, inputs, trainer.label_names)))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise TeacherError(
                "teacher_model", f"model and teacher must accept the training batches, got: {one_line(error)}"
            ) from error
    logits_to_compare(*outputs)
    if hidden:
        states_to_compare(config, *outputs)


def _check_output(output: Path) -> None:
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise RecipeError("output_dir", f"expected a folder, found a file at {str(there)!r}")
