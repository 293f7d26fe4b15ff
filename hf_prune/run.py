"""Run a recipe: data and model in, a dense run, a pruned run, and what came of them out."""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)

from .callback import check_needs
from .card import write_card
from .config import PruningConfig, PruningConfigError
from .data import load_data
from .describe import describe_base, describe_dataset, without_paths, without_tokens
from .distillation import DistillationConfig, DistillationConfigError
from .distributed import wait_for_all
from .hub import PushResult, push_model
from .launch import check_engine, check_sharding, is_first_process, wrapping_layers
from .messages import one_line
from .metrics import recovery
from .plan import Plan
from .pruner import Pruner
from .recipe import Recipe, RecipeError, package_version, resolve_name
from .recipe_model import check_finite, check_length, freeze, load_model, load_tokenizer, set_generation, set_padding
from .record import Evaluation, Generation, Sample, Source, save_record, saved_files
from .report import Report, make_report, weight_files
from .targets import TargetError
from .tasks import TASKS, Generated, Scores, Task, generate
from .teachers import TeacherError, find_teacher, teacher_inputs
from .trainer import training_steps, whole_state_dict
from .trainer_loss import logits_to_compare, states_to_compare
from .trainer_record import Given, measure_trainer, record_of

Say = Callable[[str], None]


@dataclass
class Prepared:
    """All that a run needs, loaded: nothing has been written yet. `new_weights` were drawn, not in the model's file."""

    recipe: Recipe
    task: Task
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: datasets.DatasetDict
    new_weights: list[str]

    def plan(self) -> Plan:
        """What the pruned run would prune. Raises RecipeError for pruning that does not fit."""
        steps = training_steps(self.recipe.training_arguments(), self.data["train"])
        try:
            return Pruner(self.model, self.recipe.pruning_configs).plan(steps)
        except (PruningConfigError, TargetError) as error:
            fields = [field.name for field in dataclasses.fields(PruningConfig)]
            lines = str(error).splitlines()
            named = [f"pruning{'.' if line.partition(':')[0] in fields else ': '}{line}" for line in lines]
            raise self.recipe.place(RecipeError(named)) from error


@dataclass(frozen=True)
class RunResult:
    """What a recipe came to: metrics on the test part, by name; `dense` is None where no dense run was made.

    `groups` has the same for each group of the test part; `generation` what both wrote.
    """

    recipe: dict[str, Any]
    dense: dict[str, float] | None
    pruned: dict[str, float]
    groups: dict[str, dict[str, dict[str, float] | None]]
    generation: Generation | None
    report: Report
    main_metric: str
    test_samples: int
    seconds: dict[str, float]
    files: list[Path]
    pushed: PushResult | None = None

    @property
    def recovery(self) -> float | None:
        """How much of the dense model's main metric the pruned one keeps; None where that cannot be said."""
        if not self.dense:
            return None
        return recovery(self.main_metric, self.dense[self.main_metric], self.pruned[self.main_metric])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "recipe": self.recipe,
            "dense": self.dense,
            "pruned": self.pruned,
            "groups": self.groups,
            "generation": self.generation.model_dump() if self.generation is not None else None,
            "main_metric": self.main_metric,
            "recovery": self.recovery,
            "test_samples": self.test_samples,
            "prunable_sparsity": self.report.prunable_sparsity,
            "overall_sparsity": self.report.sparsity,
            "seconds": self.seconds,
        }


def prepare(recipe: Recipe) -> Prepared:
    """Load and check all that a recipe names. Raises RecipeError where data or model are not what it says.

    Raises LaunchError where several processes were launched and do not train together as was asked.
    """
    try:
        return _prepare(recipe)
    except RecipeError as error:
        raise recipe.place(error) from error


def _prepare(recipe: Recipe) -> Prepared:
    if recipe.model.name is not None:
        resolve_name("model.name", recipe.model.name)
    task = TASKS[recipe.task](recipe)
    _check_output(Path(recipe.output_dir))
    args = recipe.training_arguments()
    with args.main_process_first():  # the other processes find what it has put into the cache
        data = task.read(load_data(recipe.dataset, task.columns))
    tokenizer = load_tokenizer(recipe.model)
    set_seed(args.seed)  # what is new in the model is drawn at random
    model, new_weights = load_model(recipe.model, task, tokenizer)
    check_finite(model)
    set_padding(model, tokenizer)
    check_length(model, tokenizer, recipe.dataset.max_length)
    set_generation(model, recipe)
    freeze(model, recipe.model.freeze)
    with args.main_process_first():
        data = task.tokenize(data, tokenizer, model)
    prepared = Prepared(recipe, task, model, tokenizer, data, new_weights)
    for dense in (False, True):
        _try_trainer(prepared, dense)
    return prepared


def run(recipe: Recipe, say: Say = print) -> RunResult | None:
    """Fine-tune dense, prune from there, evaluate both on the test part, and write everything into `output_dir`.

    `model/` there opens with a plain `from_pretrained`, and so does `dense/`; `model/README.md` is its card. With
    `push_to_hub` in the training arguments, `model/` is pushed at the end. Where several processes were launched, each
    must call it: the first says and writes things and returns the result, the others return None.

    Raises RecipeError, before anything is written, where the recipe, the model and the data do not fit together,
    LaunchError likewise where the processes do not train together as was asked, and PushError.
    """
    if not is_first_process():
        say = _say_nothing
    prepared = prepare(recipe)
    dtype = prepared.model.dtype
    plan = prepared.plan()
    output = Path(recipe.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise recipe.place(RecipeError([f"output_dir: it cannot be made: {one_line(error)}"])) from error
    if prepared.new_weights:
        say(f"Drawn at random, for they are not in the model's file: {', '.join(prepared.new_weights)}")
    seconds: dict[str, float] = {}

    dense: Scores | None = None
    if recipe.dense is not None:
        say("Fine-tuning dense")
        start = time.perf_counter()
        trainer = _make_trainer(prepared, dense=True)
        trainer.train()
        dense = prepared.task.evaluate(trainer, prepared.data["test"])
        with whole_state_dict(trainer.accelerator):
            trainer.save_model(str(output / "dense"))
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            prepared = _with_saved_model(prepared, output / "dense", dtype)
        seconds["dense"] = time.perf_counter() - start
        say(f"Dense model on the test part: {_as_text(dense[''])}")

    say(f"Fine-tuning while {plan.final_sparsity:.1%} of {plan.weights:,} prunable weights are pruned")
    start = time.perf_counter()
    trainer = _make_trainer(prepared, dense=False)
    trainer.train()
    pruned = prepared.task.evaluate(trainer, prepared.data["test"])
    trainer.save_model(str(output / "model"), _internal_call=True)
    seconds["pruned"] = time.perf_counter() - start
    say(f"Pruned model on the test part: {_as_text(pruned[''])}")
    if not is_first_process():
        return None

    # From here on no process waits for another.
    alone = trainer.args.world_size == 1  # or the latency is not measured
    dense_model = _open(prepared.task, output / "dense", dtype) if dense is not None and alone else None
    generation = (
        _generate(prepared, trainer, _open(prepared.task, output / "model", dtype), dense_model) if alone else None
    )
    _write_record(prepared, trainer, plan.final_sparsity, dense, dense_model, pruned, generation, say)
    files = [output / name for name in (*(["dense"] if dense else []), "model", "results.json")]
    result = RunResult(
        recipe=without_tokens(recipe.model_dump()),
        dense=dense[""] if dense is not None else None,
        pruned=pruned[""],
        groups={
            group: {"dense": dense[group] if dense is not None else None, "pruned": values}
            for group, values in pruned.items()
            if group
        },
        generation=generation,
        report=make_report(output / "model"),
        main_metric=next(iter(pruned[""])),
        test_samples=len(prepared.data["test"]),
        seconds=seconds,
        files=files,
    )
    (output / "results.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    args = trainer.args
    if args.push_to_hub:
        repo_id = args.hub_model_id or output.resolve().name
        say(f"Pushing to {repo_id}")
        pushed = push_model(
            output / "model", repo_id, args.hub_private_repo, args.hub_revision, token=args.hub_token, say=say
        )
        result = dataclasses.replace(result, pushed=pushed)
    return result


def _write_record(
    prepared: Prepared,
    trainer: Trainer,
    target_sparsity: float,
    dense: Scores | None,
    dense_model: PreTrainedModel | None,
    pruned: Scores,
    generation: Generation | None,
    say: Say,
) -> None:
    """Write the record and the card of the run into `model/`."""
    recipe = prepared.recipe
    folder = Path(recipe.output_dir, "model")
    record = record_of(
        trainer,
        saved_files(weight_files(folder)),
        configs=recipe.pruning_configs,
        target_sparsity=target_sparsity,
        kept_step=trainer.state.global_step,
        evaluated=[],
        latency=measure_trainer(trainer, dense_model),
        given=Given(model_name=Path(recipe.output_dir).resolve().name),
    )
    if record.distillation is not None and recipe.teacher is None:
        dense_run = Source(name="the dense run of the recipe")
        record = record.model_copy(
            update={"distillation": record.distillation.model_copy(update={"teacher": dense_run})}
        )
    tested = _describe_data(prepared, "test")
    evaluations = [
        Evaluation(
            metrics=metrics,
            part="test",
            main_metric=next(iter(metrics)),
            dense_metrics=dense[group] if dense is not None else None,
            samples=prepared.task.group_sizes.get(group, len(prepared.data["test"])),
            dataset=_only(tested, recipe, group),
        )
        for group, metrics in pruned.items()
    ]
    record = record.model_copy(
        update={
            "base_model": _describe_model(prepared, say),
            "training_data": _describe_data(prepared, "train"),
            "evaluations": evaluations,
            "generation": generation,
            "recipe": without_paths(without_tokens(_as_written(recipe))),
        }
    )
    save_record(folder, record)
    write_card(folder)


def _as_written(recipe: Recipe) -> dict[str, Any]:
    """What a file would say that gives this recipe."""
    content = recipe.model_dump(exclude_unset=True)
    return {key: value for key, value in content.items() if key != "distillation" or value is not None}


def _only(source: Source, recipe: Recipe, group: str) -> Source:
    """The source of a group of its rows."""
    if not group:
        return source
    taken = f"where {recipe.dataset.group_by} is {group}"
    return source.model_copy(update={"rows": f"{source.rows}, {taken}" if source.rows else taken})


def _generate(
    prepared: Prepared, trainer: Trainer, model: PreTrainedModel, dense_model: PreTrainedModel | None
) -> Generation | None:
    """What the saved models, pruned and dense, write from the same texts; None for tasks that generate nothing."""
    prompts = prepared.task.samples(prepared.data, prepared.tokenizer)
    if not prompts:
        return None

    def write(model: PreTrainedModel) -> Generated:
        set_seed(trainer.args.seed)
        return generate(
            cast(Any, model).to(trainer.args.device), prepared.tokenizer, prompts, prepared.recipe.generation.options
        )

    pruned = write(model)
    dense = write(dense_model) if dense_model is not None else None
    return Generation(
        samples=[
            Sample(prompt=prompt, pruned=text, dense=dense.texts[index] if dense is not None else None)
            for index, (prompt, text) in enumerate(zip(prompts, pruned.texts, strict=True))
        ],
        tokens_per_second=pruned.tokens_per_second,
        dense_tokens_per_second=dense.tokens_per_second if dense is not None else None,
    )


def _open(task: Task, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return task.auto_class.from_pretrained(folder, dtype=dtype)


def _with_saved_model(prepared: Prepared, folder: Path, dtype: torch.dtype) -> Prepared:
    """The same with the model as it was saved: one that an engine has sharded cannot be trained again."""
    wait_for_all()  # the first process saves
    model = _open(prepared.task, folder, dtype)
    for name in ("_name_or_path", "_commit_hash"):  # it is still made from the model that the recipe names
        setattr(model.config, name, getattr(prepared.model.config, name, None))
    freeze(model, prepared.recipe.model.freeze)
    return dataclasses.replace(prepared, model=model)


def _say_nothing(text: str) -> None:
    """What processes other than the first say."""


def _describe_model(prepared: Prepared, say: Say) -> Source | None:
    section = prepared.recipe.model
    if section.name is None:
        return None
    path = resolve_name("model.name", section.name)
    source, problem = describe_base(path, section.base_model, getattr(prepared.model.config, "_commit_hash", None))
    if problem is not None:
        say(f"The model's card says nothing of a license: {problem}")
    return source


def _describe_data(prepared: Prepared, part: str) -> Source:
    """A part of the data: of which data set, and in words which of its rows."""
    section = prepared.recipe.dataset
    known = describe_dataset(prepared.data[part])
    package = section.name.removeprefix("package:").partition("/")[0] if section.name.startswith("package:") else None
    split = getattr(section, f"{part}_split")
    taken = [f"where {column} is {value}" for column, value in section.where.items()]
    if split is None:
        taken.insert(0, f"rows held out of {section.train_split} with seed {section.split_seed}")
    elif part == "train" and (section.test_size or section.validation_size):
        taken.insert(0, f"the other rows of {split}")
    on_hub = known is not None and known.hub_name is not None
    return Source(
        name=f"{package} (Python package, version {package_version(package)})" if package else Path(section.name).name,
        hub_name=known.hub_name if known is not None else None,
        revision=known.revision if known is not None else None,
        config=section.config,
        split=split if on_hub else None,
        rows=", ".join(taken) or None,
    )


def _make_trainer(prepared: Prepared, dense: bool) -> Trainer:
    stock, pruning = prepared.task.trainers
    extra: dict[str, Any] = {} if dense else {"pruning_config": prepared.recipe.pruning_configs}
    if not dense and prepared.recipe.distillation_config is not None:
        wait_for_all()  # the first process saves the dense model
        extra |= {
            "teacher_model": prepared.recipe.teacher or Path(prepared.recipe.output_dir, "dense"),
            "distillation_config": prepared.recipe.distillation_config,
        }
    with wrapping_layers(prepared.model):
        return (stock if dense else pruning)(
            model=prepared.model,
            args=prepared.recipe.training_arguments(dense),
            train_dataset=prepared.data["train"],
            eval_dataset=prepared.data["validation"],
            processing_class=prepared.tokenizer,
            data_collator=prepared.task.collator(prepared.tokenizer, prepared.model),
            compute_metrics=prepared.task.compute_metrics(prepared.tokenizer),
            **extra,
        )


def _as_text(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _try_trainer(prepared: Prepared, dense: bool) -> None:
    """Make a Trainer and its optimizer, and let go of them: arguments that they object to are told before any run."""
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
            _check_method(prepared, trainer)
            _check_teacher(prepared, trainer)


def _check_method(prepared: Prepared, trainer: Trainer) -> None:
    """Raise RecipeError for a method that reads what this way of training does not show."""
    try:
        check_needs(prepared.recipe.pruning_configs, trainer.args, trainer.is_deepspeed_enabled)
    except PruningConfigError as error:
        raise RecipeError([f"pruning.{problem}" for problem in error.problems]) from error


def _check_teacher(prepared: Prepared, trainer: Trainer) -> None:
    """Raise RecipeError for a teacher that cannot be opened or does not fit, and for layers that cannot be compared."""
    name, config = prepared.recipe.teacher, prepared.recipe.distillation_config
    if config is None:
        return
    try:
        teacher = find_teacher(name, prepared.model) if name is not None else prepared.model
        if trainer.args.world_size == 1:  # else models may be too large for one process
            _try_teacher(prepared.model, teacher, trainer, config)
    except TeacherError as error:
        message = one_line(error).removeprefix("teacher_model: ")
        raise RecipeError([f"distillation.teacher: {message}"]) from error
    except DistillationConfigError as error:
        raise RecipeError([f"distillation.{problem}" for problem in error.problems]) from error


@torch.no_grad()
def _try_teacher(
    student: torch.nn.Module, teacher: torch.nn.Module, trainer: Trainer, config: DistillationConfig
) -> None:
    """Compare what model and teacher say of one batch. Raises as training would, and TeacherError for other errors."""
    hidden = {"output_hidden_states": True} if config.hidden_weight else {}
    batch = {**next(iter(trainer.get_train_dataloader())), **hidden}
    outputs = []
    for model in (student, teacher):
        device = next(model.parameters()).device
        inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        try:
            outputs.append(model.eval()(**teacher_inputs(model, inputs, trainer.label_names)))
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise TeacherError(f"teacher_model: expected a model that reads the batches, got: {error}") from error
    logits_to_compare(*outputs)
    if hidden:
        states_to_compare(config, *outputs)


def _check_output(output: Path) -> None:
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir():
        raise RecipeError([f"output_dir: expected a folder, found a file at {str(there)!r}"])
