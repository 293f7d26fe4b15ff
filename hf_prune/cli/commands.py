"""The commands of `hf-prune`, one function each.

A command imports what it needs when it runs: `--help`, `recipes` and `init` load neither torch nor transformers.
"""

import atexit
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from ..engines.launched import is_first_process, launched_processes
from ..errors import (
    HfPruneError,
    PruningConfigError,
    PushError,
    RecipeError,
    ReportError,
    StructureError,
    TargetError,
    one_line,
)
from ..recipe.shipped import TEMPLATES, find_recipe, shipped_recipes, summary, template
from .progress import layers_done, tensors_done
from .tables import (
    console,
    print_chosen,
    print_line,
    print_plan,
    print_plan_at_once,
    print_pruned,
    print_push,
    print_push_plan,
    print_report,
    print_result,
    print_sensitivity,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..masking.plan import Plan
    from ..oneshot.planning import OneShotPlan
    from ..publish.push_plan import PushPlan
    from ..structure.chosen import Chosen

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, help="Prune Hugging Face models.")

_SECONDS_FOR_THE_FIRST_PROCESS = 30.0


@contextlib.contextmanager
def _errors_as_lines() -> Iterator[None]:
    """Print an error as one line per problem on standard error, and exit: with code 1 for a failed push, else with 2.

    This includes files that cannot be read or written. Anything else is a bug and ends in a traceback.
    """
    try:
        yield
    except (HfPruneError, OSError) as error:
        name = "hf-prune"
        if not is_first_process():
            # Usually the first process fails with the same error, and the launcher ends this one while it waits here.
            time.sleep(_SECONDS_FOR_THE_FIRST_PROCESS)
            name = f"hf-prune, process {os.environ['RANK']}"
        for line in str(error).splitlines():
            print(f"{name}: {line}", file=sys.stderr)
        raise typer.Exit(1 if isinstance(error, PushError) else 2) from error


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
    with _errors_as_lines():
        path = find_recipe(recipe)
        _read_first(path)
        _quiet(progress=is_first_process(), data=True)
        from ..recipe.loading import load_recipe
        from ..recipe.run import run

        result = run(load_recipe(path, overrides or []), say=print_line, show_layers=layers_done)
    if result is not None:
        print_result(result)


@app.command("prune")
def prune_command(
    model: Annotated[str, typer.Argument(help="A folder with a saved model, package:NAME/PATH, or a name on the Hub.")],
    output: Annotated[Path, typer.Argument(help="The folder to write the pruned model into; new or empty.")],
    data: Annotated[
        str, typer.Option(help="Calibration texts: a data set on the Hub, a folder or file, or package:NAME/PATH.")
    ],
    method: Annotated[str, typer.Option(help="sparsegpt, alps, wanda, magnitude or random.")] = "sparsegpt",
    sparsity: Annotated[float | None, typer.Option(help="Share of masked weights; given by n:m patterns.")] = None,
    target_quality: Annotated[
        float | None,
        typer.Option(
            help="Instead: the share of quality (dense perplexity / perplexity) to keep, such as 0.95; the highest "
            "sparsity that keeps it is searched, up to --sparsity (default 0.95)."
        ),
    ] = None,
    pattern: Annotated[str, typer.Option(help="unstructured, n:m such as 2:4, or block:RxC.")] = "unstructured",
    scope: Annotated[
        str | None,
        typer.Option(
            help="How sparsity is divided: layer, row, erk, sensitivity or owl (default: row for wanda, else layer)."
        ),
    ] = None,
    reconstruction: Annotated[
        str | None, typer.Option(help="least_squares: solve the weights that are kept anew, after any method.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="More fields of PruningConfig, such as exclude=['.*head.*']."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of text to calibrate with.")] = 128,
    length: Annotated[int, typer.Option(help="Length of a window in tokens.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Windows that pass through the model together.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the choice of texts.")] = 0,
    damping: Annotated[
        float | None, typer.Option(help="Damping of the second moments (default: the method's).")
    ] = None,
    dense_weight: Annotated[
        float, typer.Option(help="How far layers approximate the dense model's outputs, 0 to 1 (0: their own).")
    ] = 0.75,
    residual_weight: Annotated[
        float, typer.Option(help="How far they make up for what the residual stream lacks, 0 to 1.")
    ] = 0.5,
    autocast: Annotated[
        str | None, typer.Option(help="bfloat16 or float16: the forward passes of a float32 model compute in it.")
    ] = None,
    data_config: Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only the rows with this value.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file of the model to read.")] = None,
    base_model: Annotated[str | None, typer.Option(help="The model's name on the Hub, for the card.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda (default: the CPU).")] = None,
    leave_unreached: Annotated[
        bool, typer.Option("--leave-unreached", help="Leave layers dense that the model does not call.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be pruned, and the memory that it takes, and stop.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in a dry run.")] = False,
) -> None:
    """Prune a model at once, from calibration data.

    The pruned model is saved with its masks and its card.

    Layers are pruned one after another, each from its inputs in the model that is pruned so far. For language models,
    perplexity on texts that were not used for calibration is measured before and after. A dry run reads no weights and
    no data: a folder with a config.json is enough.
    """
    with _errors_as_lines():
        _quiet(data=True)
        from ..config.calibration import CalibrationConfig
        from ..recipe.loading import parse_pruning, parse_rows
        from ..recipe.one_shot import plan_saved, prune_saved
        from ..recipe.schema import DatasetSection

        if scope is None and (method, pattern) == ("wanda", "unstructured"):
            scope = "row"  # as it was published
        if target_quality is not None and sparsity is None:
            sparsity = 0.95  # the highest that is tried
        given = {"method": method, "pattern": pattern, "sparsity": sparsity, "scope": scope}
        given["reconstruction"] = reconstruction
        overrides = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
        config = parse_pruning([*overrides, *(settings or [])])
        calibration = CalibrationConfig(
            samples=samples,
            length=length,
            batch_size=batch_size,
            seed=seed,
            damping=damping,
            dense_weight=dense_weight,
            residual_weight=residual_weight,
            autocast=autocast,
        )
        if dry_run:
            _show_plan_at_once(plan_saved(model, config, calibration, gguf_file, dtype), as_json)
            return
        section = DatasetSection(
            name=data, config=data_config, train_split=split, text_column=text_column, where=parse_rows(where or [])
        )
        with layers_done() as progress:
            result = prune_saved(
                model,
                output,
                config,
                section,
                calibration,
                gguf_file=gguf_file,
                base_model=base_model,
                dtype=dtype,
                device=device,
                leave_unreached=leave_unreached,
                resume=resume,
                target_quality=target_quality,
                say=print_line,
                progress=progress,
            )
    print_pruned(result)


@app.command("sensitivity")
def sensitivity_command(
    model: Annotated[str, typer.Argument(help="A folder with a saved model, package:NAME/PATH, or a name on the Hub.")],
    data: Annotated[str, typer.Option(help="Texts: a data set on the Hub, a folder or file, or package:NAME/PATH.")],
    output: Annotated[Path, typer.Option(help="The folder to write curves and allocation into.")] = Path("sensitivity"),
    method: Annotated[str, typer.Option(help="sparsegpt, alps, wanda, magnitude or random.")] = "sparsegpt",
    sparsity: Annotated[float, typer.Option(help="Share of all weights together that is allocated.")] = 0.6,
    rates: Annotated[str, typer.Option(help="Sparsities at which each tensor is pruned alone.")] = "0.3,0.5,0.7",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="More fields of PruningConfig, such as exclude=['.*head.*']."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Windows of text to calibrate with.")] = 32,
    length: Annotated[int, typer.Option(help="Length of a window in tokens.")] = 512,
    windows: Annotated[int, typer.Option(help="Other windows, on which the loss is measured.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Windows that pass through the model together.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the choice of texts.")] = 0,
    data_config: Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only the rows with this value.")
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file of the model to read.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda (default: the CPU).")] = None,
) -> None:
    """Measure what pruning each tensor alone costs.

    What it adds to a language model's loss; and how a sparsity is best divided among the tensors.

    Writes curves (JSON, PNG), and the sparsity of each tensor at the least predicted loss (allocation.json), which
    hf-prune prune --set overrides=@FILE and recipes (pruning.overrides=@FILE) take. What is in the folder already, with
    the same settings, is not measured again.
    """
    with _errors_as_lines():
        try:
            parsed = [float(rate) for rate in rates.split(",")]
        except ValueError as error:
            raise RecipeError("--rates", f"expected numbers with commas such as 0.3,0.5,0.7, got {rates!r}") from error
        _quiet(data=True)
        from ..config.calibration import CalibrationConfig
        from ..recipe.loading import parse_pruning, parse_rows
        from ..recipe.one_shot import measure_saved
        from ..recipe.schema import DatasetSection

        if windows < 1:
            raise RecipeError("--windows", f"expected 1 or more, got {windows}")
        given = {"method": method, "sparsity": sparsity, **({"scope": "row"} if method == "wanda" else {})}
        config = parse_pruning([*(f"{name}={json.dumps(value)}" for name, value in given.items()), *(settings or [])])
        section = DatasetSection(
            name=data, config=data_config, train_split=split, text_column=text_column, where=parse_rows(where or [])
        )
        with tensors_done() as progress:
            result = measure_saved(
                model,
                output,
                config,
                section,
                CalibrationConfig(samples=samples, length=length, batch_size=batch_size, seed=seed),
                parsed,
                windows=windows,
                gguf_file=gguf_file,
                dtype=dtype,
                device=device,
                say=print_line,
                progress=progress,
            )
    print_sensitivity(result)


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
    with _errors_as_lines():
        if steps is not None and steps < 1:
            raise RecipeError("--steps", f"expected 1 or more, got {steps}")
        if source in shipped_recipes() and not Path(source).exists():
            source = str(find_recipe(source))
        if source.endswith((".yaml", ".yml")):
            if steps is not None:
                raise RecipeError("--steps", "must not be set with a recipe; override training.max_steps")
            _read_first(Path(source))
            _quiet(data=True)
            from ..recipe.loading import load_recipe
            from ..recipe.prepare import prepare

            prepared = prepare(load_recipe(source, overrides or []))
            if prepared.recipe.calibration is not None:
                _show_plan_at_once(prepared.plan_at_once(), as_json)
                return
            plan, chosen = prepared.plan()
        else:
            _quiet()
            plan, chosen = _plan_model(source, overrides or [], 1000 if steps is None else steps)
    if as_json:
        print(json.dumps(plan.to_dict() | ({"chosen": chosen.to_dict()} if chosen is not None else {})))
        return
    print_plan(plan)
    if chosen is not None:
        print_chosen(chosen, of_data=source.endswith((".yaml", ".yml")))


def _show_plan_at_once(plan: "OneShotPlan", as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.to_dict()))
    else:
        print_plan_at_once(plan)


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
    with _errors_as_lines():
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
    with _errors_as_lines():
        path = find_recipe(recipe)
        _read_first(path)
        _quiet()
        from ..recipe.loading import load_recipe

        load_recipe(path, overrides or [])
    console.print(str(path), soft_wrap=True)
    console.print("No problems found in keys and values. hf-prune plan also checks the model and the data.")


@app.command("report")
def report_command(
    model: Annotated[str, typer.Argument(help="A folder with a saved model, or a model name on the Hub.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count the zeros in a saved model, tensor by tensor.

    Also says what was removed from it, and what a forward pass costs, if that was measured with these weights.
    """
    with _errors_as_lines():
        _quiet()
        from ..publish.sparsity_json import costs_of
        from ..saved.report import make_report

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
    with _errors_as_lines():
        _check_folder(model)
        _quiet()
        from ..publish.card import forget_measurements, read_card, write_card
        from ..publish.card_merge import is_stock
        from ..publish.given import add_to_record, read_metrics
        from ..publish.record import load_record
        from ..saved.model import SavedModel

        saved = SavedModel(model)
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
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Also upload these files of the folder, such as '*.csv'."),
    ] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload pruned model",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and stop.")] = False,
) -> None:
    """Push a saved model and its card to the Hub.

    All files are uploaded in one commit and verified. Uses the token of `hf auth login`, or of HF_TOKEN.
    """
    with _errors_as_lines():
        _check_folder(model)
        _quiet(progress=True)
        if dry_run:
            print_push_plan(_plan_of_dry_run(model, repo, private, revision, with_masks, include or []))
            console.print("\nDry run: nothing was uploaded.")
            return
        from ..publish.push import push_model

        result = push_model(
            model,
            repo,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            with_masks=with_masks,
            message=message,
            include=include or [],
            show=print_push_plan,
            say=console.print,
        )
    print_push(result)


def _plan_of_dry_run(
    model: Path, repo: str, private: bool, revision: str | None, with_masks: bool, include: list[str]
) -> "PushPlan":
    """The plan of a push; if the Hub cannot be read, that of a push to an empty repository, with a note."""
    from ..publish.push import plan_push
    from ..publish.push_plan import UNKNOWN, make_push_plan
    from ..saved.model import SavedModel

    saved = SavedModel(model)
    try:
        return plan_push(saved, repo, private, revision, with_masks, include=include)
    except PushError as error:
        if error.problems[0][0]:  # an argument is wrong, whatever the Hub has
            raise
        console.print(f"The state of the repository on the Hub is unknown. {error}", soft_wrap=True)
        return make_push_plan(saved, repo, UNKNOWN, with_masks, include=include)


def _read_first(recipe: Path) -> None:
    """Refuse a recipe that is not YAML at once, before torch and transformers are loaded."""
    from ..recipe.yaml12 import read_recipe

    read_recipe(recipe)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise ReportError(f"{folder}: expected a folder with a saved model, found {found}")


def _quiet(progress: bool = False, data: bool = False) -> None:
    """Show only errors of transformers, as its notices would hide ours; with `data`, no messages of datasets."""
    import transformers

    transformers.logging.set_verbosity_error()
    if not progress:
        transformers.logging.disable_progress_bar()
    if data:
        import datasets

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors are reported once, by us
        if not progress:
            datasets.disable_progress_bars()


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
