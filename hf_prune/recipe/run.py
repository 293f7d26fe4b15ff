"""Running a recipe: a dense run, a pruned run, and their results."""

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from ..config.calibration import CalibrationConfig
from ..config.pruning import PruningConfig
from ..engines.launched import is_first_process
from ..engines.processes import all_reduce
from ..errors import CalibrationError, CheckpointError, PushError, RecipeError, one_line
from ..masking.plan import Plan
from ..masking.searching import lines_about
from ..oneshot.planning import OneShotPlan
from ..oneshot.prune import prune
from ..oneshot.pruned import Progress, Pruned
from ..oneshot.quality import Trial, prune_to_quality
from ..oneshot.windows import Batch
from ..publish.card import write_card
from ..publish.card_explained import PAGE_NAME
from ..publish.push import check_push, push_model
from ..publish.record import Generation, Sample, lower_is_better
from ..publish.redact import without_tokens
from ..saved.model import SavedModel
from ..saved.report import make_report
from ..trainer.claims import claimed
from ..trainer.reporting import report_explanation
from .dense_run import Shared, as_text, open_saved, train, train_dense, with_dense_model
from .explaining import explain_run
from .outcome import AllScores, AtOnce, RunResult, Say, write_record
from .precision import slow_bfloat16
from .prepare import Prepared, calibration_data, make_evaluator, make_trainer, prepare, with_smaller_vocabulary
from .reports import close_reports, log_result
from .schema import Recipe
from .tasks import Generated, Scores, generate

# Shows how layers are pruned at once: entered before the first, and given to `prune`.
ShowLayers = Callable[[], AbstractContextManager[Progress | None]]


def run(
    recipe: Recipe, say: Say = print, show_layers: ShowLayers = nullcontext, shared: Shared | None = None
) -> RunResult | None:
    """Fine-tune dense, prune from there, evaluate both on the test split, and write everything into `output_dir`.

    With a `calibration`, the model is pruned at once, evaluated, and trained on with its zeros kept.

    `model/` and `dense/` there open with a plain `from_pretrained`; `model/README.md` is the model card. With
    `push_to_hub` in the training arguments, the Hub is asked at the start whether it may be pushed to, and `model/` is
    pushed at the end. If several processes were launched, each
    must call this function: the first one prints, writes files and returns the result, the others return None.

    With `shared`, the run is one of a sweep: the dense model is not trained, but that of `shared` is used, wherever it
    lies. The pruned model has the same weights, bit for bit.

    Raises RecipeError, before anything is written, if recipe, model and data do not fit together; LaunchError likewise
    if the processes do not train together as requested; and PushError, at the start or at the end.
    """
    if not is_first_process():
        say = _say_nothing
    _check_push(recipe)
    prepared = prepare(recipe, shared.examples if shared is not None else None)
    if recipe.calibration is not None:
        plan: Plan | OneShotPlan | None = prepared.plan_at_once()
    else:
        plan = None if prepared.has_target else prepared.plan()[0]
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(claimed(Path(recipe.output_dir), writes=is_first_process()))
        except CheckpointError as error:
            raise recipe.place(RecipeError(problems=error.problems)) from error
        return _run(recipe, prepared, plan, say, show_layers, shared)


def _run(
    recipe: Recipe,
    prepared: Prepared,
    plan: Plan | OneShotPlan | None,
    say: Say,
    show_layers: ShowLayers,
    shared: Shared | None,
) -> RunResult | None:
    dtype = prepared.model.dtype
    output = Path(recipe.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise recipe.place(RecipeError("output_dir", f"cannot be created: {one_line(error)}")) from error
    if prepared.new_weights:
        say(f"Not in the model's file and initialised at random: {', '.join(prepared.new_weights)}")
    slow = slow_bfloat16(recipe)
    if slow is not None:
        say(slow)
    seconds: dict[str, float] = {}
    if plan is None:  # a target that cannot be reached is refused before anything is trained
        prepared.plan(output)

    at_once = AtOnce() if recipe.calibration is not None else None
    dense: Scores | None = None
    dense_run = shared.dense if shared is not None else None
    if dense_run is not None:
        say(f"The dense model is the one in {dense_run.folder}")
        prepared = with_dense_model(prepared, dense_run.folder, dtype)
    elif recipe.dense is not None:
        dense_run, trainer = train_dense(prepared, say)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            prepared = with_dense_model(prepared, dense_run.folder, dtype)
    if dense_run is not None:
        dense = dense_run.scores
        seconds["dense"] = dense_run.seconds
        if at_once is not None:
            at_once.base, at_once.dense_steps = dense_run.base, dense_run.steps

    whole = prepared
    prepared = with_smaller_vocabulary(prepared)
    tokens = prepared.removed_tokens
    if tokens is not None:
        say(f"Removed {tokens.before - tokens.after:,} of {tokens.before:,} tokens, which no text of the data has")
    if at_once is not None:
        start = time.perf_counter()
        assert plan is not None
        most = "at most " if recipe.target_quality is not None else ""
        say(f"Pruning {most}{plan.final_sparsity:.1%} of {plan.weights:,} prunable weights at once")
        prepared = _prune_at_once(prepared, at_once, say, show_layers)
        seconds["pruning"] = time.perf_counter() - start
        dense = at_once.base if recipe.dense is None and not recipe.trains_on else dense
    start = time.perf_counter()
    trainer = make_trainer(prepared, dense=False) if recipe.trains_on else make_evaluator(prepared)
    pruner = getattr(trainer, "pruner", None)
    if at_once is not None:
        say("Fine-tuning the pruned model, with its zeros kept" if recipe.trains_on else "Evaluating the pruned model")
    elif plan is not None:
        say(f"Fine-tuning and pruning {plan.final_sparsity:.1%} of {plan.weights:,} prunable weights")
    else:
        chosen = cast(Any, pruner).search(output, trainer.args.device, dense_fields=prepared.dense_fields)
        say("\n".join(lines_about(chosen)))
        say(f"Fine-tuning and pruning for {chosen.target.words}")
    if recipe.trains_on:
        train(trainer, recipe, dense=False)
    pruned = prepared.task.evaluate(trainer, prepared.data["test"])
    validation = _validate(prepared, trainer) if shared is not None else None
    trainer.save_model(str(output / "model"), _internal_call=True)
    if at_once is not None and at_once.pruned is not None:
        at_once.pruned.save(output / "model")
    seconds["pruned"] = time.perf_counter() - start
    say(f"Pruned model on the test split: {as_text(pruned[''])}")
    if not is_first_process():
        return None

    # From here on no process waits for another.
    alone = trainer.args.world_size == 1  # or what a forward pass costs is not measured
    dense_folder = whole.dense_folder if dense_run is not None else None
    dense_model = open_saved(prepared.task, dense_folder, dtype) if dense_folder is not None and alone else None
    generation = None
    if alone:
        pruned_model = open_saved(prepared.task, output / "model", dtype)
        generation = _generate(prepared, trainer, pruned_model, dense_model, whole.tokenizer)
    saved = SavedModel(output / "model")
    if at_once is not None and at_once.pruned is not None and recipe.target_quality is not None:
        target_sparsity = at_once.pruned.sparsity
    else:
        target_sparsity = plan.final_sparsity if plan is not None else cast(Any, pruner).target_sparsity
    scores = AllScores(pruned, dense, at_once, validation, dense_run.validation if dense_run is not None else None)
    record = write_record(saved, prepared, trainer, target_sparsity, scores, dense_model, generation, say)
    explanation = explain_run(recipe, dense_folder, dtype, say)
    if explanation is not None:
        write_card(saved)
    file_bytes = {"dense": SavedModel(dense_folder).file_bytes} if dense_folder is not None else {}
    files = [*([dense_folder] if dense_folder is not None else []), output / "model", output / "results.json"]
    if explanation is not None:
        report_explanation(trainer, explanation, "test")
        files.append(output / "model" / PAGE_NAME)
    result = RunResult(
        recipe=without_tokens(recipe.model_dump()),
        dense=dense[""] if dense is not None else None,
        base=scores.base[""] if scores.base is not None else None,
        at_once=scores.at_once[""] if scores.at_once is not None else None,
        pruned=pruned[""],
        groups={group: scores.of_group(group) for group in pruned if group},
        generation=generation,
        report=make_report(saved),
        main_metric=next(iter(pruned[""])),
        test_samples=len(prepared.data["test"]),
        seconds=seconds,
        files=files,
        costs=record.costs,
        parameters={
            **({"dense": dense_run.parameters} if dense_run is not None else {}),
            "pruned": sum(tensor.weights for tensor in saved.tensors),
        },
        file_bytes={**file_bytes, "pruned": saved.file_bytes},
        vocabulary={"dense": tokens.before, "pruned": tokens.after} if tokens is not None else {},
        validation=scores.of_validation,
    )
    if shared is not None:
        if recipe.trains_on:
            log_result(trainer, result)
        close_reports(trainer)
    (output / "results.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n", encoding="utf-8")
    args = trainer.args
    if args.push_to_hub:
        repo_id = _repo_id(args)
        say(f"Pushing to {repo_id}")
        pushed = push_model(saved, repo_id, args.hub_private_repo, args.hub_revision, token=args.hub_token, say=say)
        result = dataclasses.replace(result, pushed=pushed)
    return result


def _prune_at_once(prepared: Prepared, at_once: AtOnce, say: Say, show_layers: ShowLayers) -> Prepared:
    """Prune the model at once, in place, and evaluate it; the same with a copy to distil from, where one is needed."""
    recipe, calibration = prepared.recipe, prepared.recipe.calibration_config
    assert calibration is not None
    args = recipe.training_arguments()
    model = cast(Any, prepared.model).to(args.device)
    if recipe.dense is None and not prepared.new_weights:
        at_once.base = prepared.task.evaluate(make_evaluator(prepared), prepared.data["test"])
        say(f"Model before pruning on the test split: {as_text(at_once.base[''])}")
    if recipe.distillation is not None and recipe.teacher is None and recipe.dense is None:
        prepared = dataclasses.replace(prepared, teacher=copy.deepcopy(model))
    [config] = recipe.pruning_configs
    batches = calibration_data(prepared)
    with show_layers() as progress:
        if recipe.target_quality is None:
            at_once.pruned = prune(model, config, batches, calibration, progress=progress)
        else:
            at_once.pruned = _prune_to_quality(prepared, config, batches, calibration, say, progress)
    for note in at_once.pruned.notes:
        say(note)
    if recipe.trains_on:
        at_once.scores = prepared.task.evaluate(make_evaluator(prepared), prepared.data["test"])
        say(f"Pruned model before it is trained on, on the test split: {as_text(at_once.scores[''])}")
    return prepared


def _prune_to_quality(
    prepared: Prepared,
    config: PruningConfig,
    batches: list[Batch],
    calibration: CalibrationConfig,
    say: Say,
    progress: Progress | None,
) -> Pruned:
    """Prune the model to the highest sparsity that keeps the target quality, by the main metric on validation data."""
    recipe, target = prepared.recipe, prepared.recipe.target_quality
    assert target is not None
    evaluator = make_evaluator(prepared)
    validation = prepared.data["validation"]
    name, dense_value = next(iter(prepared.task.evaluate(evaluator, validation, "validation")[""].items()))

    def value_of(model: PreTrainedModel) -> float:
        return prepared.task.evaluate(evaluator, validation, "validation")[""][name]

    def tried(trial: Trial) -> None:
        say(f"Sparsity {trial.sparsity:.4g}: {name} {trial.value:.4f} on validation data, quality {trial.quality:.3f}")

    try:
        pruned, _ = prune_to_quality(
            prepared.model,
            config,
            batches,
            value_of,
            target,
            calibration,
            greater_is_better=not lower_is_better(name),
            dense_value=dense_value,
            progress=progress,
            tried=tried,
        )
    except CalibrationError as error:
        raise recipe.place(RecipeError(problems=error.problems_under("calibration"))) from error
    return pruned


def _validate(prepared: Prepared, trainer: Trainer) -> dict[str, float]:
    return prepared.task.evaluate(trainer, prepared.data["validation"], "validation")[""]


def _repo_id(args: TrainingArguments) -> str:
    return args.hub_model_id or Path(str(args.output_dir)).resolve().name


def _check_push(recipe: Recipe) -> None:
    """Raise PushError, on every process, if the Hub says now that the push at the end would be refused."""
    args = recipe.training_arguments()
    if not args.push_to_hub:
        return
    error = None
    if is_first_process():
        try:
            check_push(_repo_id(args), args.hub_private_repo, args.hub_revision, args.hub_token)
        except PushError as refused:
            error = refused
    if bool(all_reduce(torch.tensor(int(error is not None)))):
        raise error or PushError("the first process asked the Hub whether the model may be pushed, and was refused")


def _generate(
    prepared: Prepared,
    trainer: Trainer,
    model: PreTrainedModel,
    dense_model: PreTrainedModel | None,
    dense_tokenizer: PreTrainedTokenizerBase,
) -> Generation | None:
    """The texts that the saved models, pruned and dense, generate from the same prompts; None for other tasks."""
    prompts = prepared.task.samples(prepared.data, prepared.tokenizer)
    if not prompts:
        return None

    def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Generated:
        set_seed(trainer.args.seed)
        options = prepared.recipe.generation.options
        return generate(cast(Any, model).to(trainer.args.device), tokenizer, prompts, options)

    pruned = write(model, prepared.tokenizer)
    dense = write(dense_model, dense_tokenizer) if dense_model is not None else None
    return Generation(
        samples=[
            Sample(prompt=prompt, pruned=text, dense=dense.texts[index] if dense is not None else None)
            for index, (prompt, text) in enumerate(zip(prompts, pruned.texts, strict=True))
        ],
        tokens_per_second=pruned.tokens_per_second,
        dense_tokens_per_second=dense.tokens_per_second if dense is not None else None,
    )


def _say_nothing(text: str) -> None:
    """The `say` of processes other than the first."""
