"""The commands of `hf-prune`, one function each; those that prune at once are in one_shot.py, those
that pack in packing.py.

A command imports what it needs when it runs: `--help`, `recipes` and `init` load neither torch nor transformers.
"""

import atexit
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..engines.launched import is_first_process, launched_processes
from ..errors import (
    PruningConfigError,
    PushError,
    RecipeError,
    ReportError,
    StructureError,
    TargetError,
    one_line,
)
from ..recipe.shipped import TEMPLATES, find_recipe, shipped_recipes, summary, template
from .compare import compare_command
from .explain import explain_command
from .export import export_command
from .messages import errors_as_lines, quiet
from .one_shot import prune_command, sensitivity_command
from .packing import pack_command, unpack_command
from .print_plan import print_chosen, print_plan, show_plan_at_once
from .print_push import print_push, print_push_plan
from .print_report import print_report
from .print_result import print_result
from .progress import layers_done
from .space import Dense, Examples, read_page, space_command
from .sweep import sweep_command
from .tables import console, print_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..masking.plan import Plan
    from ..publish.push_plan import PushPlan
    from ..structure.chosen import Chosen

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Prune Hugging Face models.")


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"hf-prune {version('hf-prune')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Prune Hugging Face models."""


@app.command("run")
def run_command(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a shipped recipe's name (see hf-prune recipes).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, such as pruning.sparsity=0.7.")] = None,
) -> None:
    """Fine-tune and prune a model as described in a recipe."""
    with errors_as_lines():
        path = find_recipe(recipe)
        _read_first(path)
        quiet(progress=is_first_process(), data=True)
        from ..recipe.loading import load_recipe
        from ..recipe.run import run

        result = run(load_recipe(path, overrides or []), say=print_line, show_layers=layers_done)
    if result is not None:
        print_result(result)


app.command("prune")(prune_command)
app.command("sensitivity")(sensitivity_command)
app.command("pack")(pack_command)
app.command("unpack")(unpack_command)
app.command("export")(export_command)
app.command("space")(space_command)
app.command("compare")(compare_command)
app.command("sweep")(sweep_command)
app.command("explain")(explain_command)


@app.command("plan")
def plan_command(
    source: Annotated[str, typer.Argument(help="A recipe, a folder with a saved model, or a model name on the Hub.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="KEY=VALUE: settings of the recipe, or for a model of pruning, such as sparsity=0.7."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of training to plan for, with a model only (default 1000).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what would be pruned and when, without training."""
    with errors_as_lines():
        if steps is not None and steps < 1:
            raise RecipeError("--steps", f"expected 1 or more, got {steps}")
        if source in shipped_recipes() and not Path(source).exists():
            source = str(find_recipe(source))
        if source.endswith((".yaml", ".yml")):
            if steps is not None:
                raise RecipeError("--steps", "must not be set with a recipe; override training.max_steps")
            _read_first(Path(source))
            quiet(data=True)
            from ..recipe.loading import load_recipe
            from ..recipe.prepare import prepare

            prepared = prepare(load_recipe(source, overrides or []))
            if prepared.recipe.calibration is not None:
                show_plan_at_once(prepared.plan_at_once(), as_json)
                return
            plan, chosen = prepared.plan()
        else:
            quiet()
            plan, chosen = _plan_model(source, overrides or [], 1000 if steps is None else steps)
    if as_json:
        print(json.dumps(plan.to_dict() | ({"chosen": chosen.to_dict()} if chosen is not None else {})))
        return
    print_plan(plan)
    if chosen is not None:
        print_chosen(chosen, of_data=source.endswith((".yaml", ".yml")))


@app.command("recipes")
def recipes_command() -> None:
    """List the recipes that come with hf-prune."""
    for name, path in shipped_recipes().items():
        console.print(f"{name}: {summary(path)}")
    console.print("\nRun one with hf-prune run NAME, or start your own with hf-prune init TASK.")


@app.command("init")
def init_command(
    task: Annotated[str, typer.Argument(help=f"One of {', '.join(TEMPLATES)}.")],
    path: Annotated[Path | None, typer.Argument(help="The file to write (default TASK.yaml).")] = None,
) -> None:
    """Write a commented recipe to start from.

    An existing file is not overwritten.
    """
    with errors_as_lines():
        text = template(task)
        target = path if path is not None else Path(f"{task}.yaml")
        try:
            with target.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise RecipeError(f"{target}: the file exists and is not overwritten; give another path") from error
        except OSError as error:
            raise RecipeError(f"{target}: cannot be written: {error.strerror}") from error
    console.print(str(target), soft_wrap=True)
    console.print("Edit it, preview the pruning with hf-prune plan, and run it with hf-prune run.")


@app.command("validate")
def validate_command(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="KEY=VALUE, as for hf-prune run.")] = None,
) -> None:
    """Check a recipe's keys and values.

    Each problem is printed on a line. The model and the data are not loaded.
    """
    with errors_as_lines():
        path = find_recipe(recipe)
        _read_first(path)
        quiet()
        from ..recipe.loading import load_recipe

        load_recipe(path, overrides or [])
    console.print(str(path), soft_wrap=True)
    console.print("No problems found in keys and values. hf-prune plan also checks the model and the data.")


@app.command("report")
def report_command(
    model: Annotated[str, typer.Argument(help="A folder with a saved model, package:NAME/PATH, or a name on the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the zeros in a saved model, tensor by tensor.

    Also says what was removed from it, and what a forward pass costs, if that was measured with these weights.
    """
    with errors_as_lines():
        quiet()
        from ..publish.sparsity_json import costs_of
        from ..saved.model import SavedModel
        from ..saved.report import make_report

        if Path(model).is_dir():
            SavedModel(model).check_whole(is_opened=False)
        report = make_report(model)
        costs = costs_of(report.model) if Path(report.model).is_dir() else []
    if as_json:
        print(json.dumps(report.to_dict() | {"costs": [cost.model_dump() for cost in costs]}))
    else:
        print_report(report, costs)


@app.command("card")
def card_command(
    model: Annotated[Path, typer.Argument(help="A folder with a saved model.")],
    base_model: Annotated[
        str | None, typer.Option(help="The model that was fine-tuned or pruned: a name on the Hub, or a folder.")
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="A JSON file of metric -> number, such as eval_results.json.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="The data set of the metrics: a name on the Hub, or any.")] = None,
    without_measurements: Annotated[
        bool,
        typer.Option(
            "--without-measurements",
            help="Drop what was recorded about training and evaluation: for weights that have changed since.",
        ),
    ] = False,
) -> None:
    """Write the model card (README.md) of a saved model.

    Also writes sparsity.json and assets/. Text that people added to the card is kept. What the options say is kept in
    run_record.json, for these weights.
    """
    with errors_as_lines():
        _check_folder(model)
        quiet()
        from ..publish.card import forget_measurements, read_card, write_card
        from ..publish.card_merge import is_stock
        from ..publish.given import add_to_record, read_metrics
        from ..publish.record import load_record
        from ..saved.model import SavedModel

        saved = SavedModel(model)
        saved.check_whole(is_opened=False)
        evaluations = read_metrics(metrics, saved.architecture) if metrics is not None else []
        if without_measurements:
            forget_measurements(saved)
        if base_model is not None or evaluations or dataset is not None:
            problem = add_to_record(saved, base_model, evaluations, dataset)
            if problem is not None:
                print_line(f"The license of the base model is unknown: {problem}")
        replaced = is_stock(read_card(saved))
        path = write_card(saved)
        record = load_record(saved)
    console.print(str(path), soft_wrap=True)
    if replaced:
        console.print("The text that the Trainer had generated was replaced; its metadata were kept.")
    if replaced and (record is None or not record.evaluations):
        console.print("To have its results in the card, pass them with --metrics.")


@app.command("push")
def push_command(
    model: Annotated[Path, typer.Argument(help="A folder with a saved model.")],
    repo: Annotated[str, typer.Argument(help="USER/REPO on the Hub; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; created if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    with_masks: Annotated[bool, typer.Option("--with-masks", help="Also upload masks, to resume training.")] = False,
    with_packed: Annotated[
        bool, typer.Option("--with-packed", help="Also upload the weights packed, in the folder packed.")
    ] = False,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Also upload these files of the folder, such as '*.csv'."),
    ] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload pruned model",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and stop.")] = False,
    space: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Also push a page that answers with the model: a Space.")
    ] = None,
    dense: Dense = None,
    example: Examples = None,
) -> None:
    """Push a saved model and its card to the Hub.

    All files are uploaded in one commit and verified. Uses the token of `hf auth login`, or of HF_TOKEN.
    """
    with errors_as_lines():
        _check_folder(model)
        quiet(progress=True)
        from ..publish.packing import packed_beside
        from ..saved.model import SavedModel

        SavedModel(model).check_whole(is_opened=False)
        page = read_page(model, repo, space, dense, example or [], revision, create_pr)
        if dry_run:
            with packed_beside(model, with_packed) as also:
                print_push_plan(_plan_of_dry_run(model, repo, private, revision, with_masks, also, include or []))
            if page is not None:
                page.print_plan(private)
            console.print("\nDry run: nothing was uploaded.")
            return
        if page is not None:
            page.check(private)
        from ..publish.push import push_model

        with packed_beside(model, with_packed) as also:
            result = push_model(
                model,
                repo,
                private=private or None,
                revision=revision,
                create_pr=create_pr,
                with_masks=with_masks,
                also=also,
                message=message,
                include=include or [],
                show=print_push_plan,
                say=console.print,
            )
        print_push(result)
        if page is not None:
            page.push(private)


def _plan_of_dry_run(
    model: Path,
    repo: str,
    private: bool,
    revision: str | None,
    with_masks: bool,
    also: dict[str, Path],
    include: list[str],
) -> "PushPlan":
    """The plan of a push; if the Hub cannot be read, that of a push to an empty repository, with a note."""
    from ..publish.push import plan_push
    from ..publish.push_plan import UNKNOWN, make_push_plan
    from ..saved.model import SavedModel

    saved = SavedModel(model)
    try:
        return plan_push(saved, repo, private, revision, with_masks, include=include, also=also)
    except PushError as error:
        if error.problems[0][0]:  # an argument is wrong, whatever the Hub has
            raise
        console.print(f"The state of the repository on the Hub is unknown. {error}", soft_wrap=True)
        return make_push_plan(saved, repo, UNKNOWN, with_masks, also, include=include)


def _read_first(recipe: Path) -> None:
    """Refuse a recipe that is not YAML at once, before torch and transformers are loaded."""
    from ..recipe.yaml12 import read_recipe

    read_recipe(recipe)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ReportError(f"{folder}: expected a folder with a saved model, found {found}")


def _plan_model(source: str, overrides: list[str], steps: int) -> "tuple[Plan, Chosen | None]":
    from ..masking.pruner import Pruner
    from ..recipe.loading import parse_configs
    from ..saved.files import find_model
    from ..saved.model import SavedModel
    from ..structure.proof import sample_inputs

    configs = parse_configs(overrides)
    saved = SavedModel(find_model(source))
    if saved.skeleton is None:
        raise ReportError(f"{source}: {saved.note}")
    try:
        model = _load_weights(saved.folder, saved.skeleton)
        pruner = Pruner(model, configs, example=partial(sample_inputs, model))
        return pruner.plan(steps).of_model(model), pruner.chosen
    except (PruningConfigError, StructureError, TargetError) as error:
        raise RecipeError(problems=error.problems, at="command line") from error


def _load_weights(folder: Path, skeleton: "PreTrainedModel") -> "PreTrainedModel":
    """The model with its weights; a folder with a config.json alone gives the skeleton, which counts as dense."""
    from ..model.opening import LOADING_ERRORS
    from ..saved.files import weight_files

    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        return skeleton
    weight_files(folder)
    try:
        return type(skeleton).from_pretrained(folder, dtype="auto")
    except LOADING_ERRORS as error:
        raise ReportError(f"{folder}: the weights cannot be loaded: {one_line(error)}") from error


def main() -> None:
    """The console script."""
    try:
        app()
    except BaseException as ending:
        if launched_processes() == 1:
            raise
        _end_process(ending)


def _end_process(ending: BaseException) -> NoReturn:
    """End this process as the interpreter would, but without taking the process group down.

    There, torch 2.13 joins gloo's thread with the interpreter's lock held, and that thread, about to free a tensor, may
    be waiting for the lock: one run in three then never ended.
    """
    if isinstance(ending, SystemExit):
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    else:
        sys.excepthook(type(ending), ending, ending.__traceback__)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
