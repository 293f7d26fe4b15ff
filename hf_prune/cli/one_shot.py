"""The commands that prune a model at once: `hf-prune prune` and `hf-prune sensitivity`."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RecipeError
from .messages import errors_as_lines, quiet
from .print_plan import show_plan_at_once
from .print_result import print_pruned, print_sensitivity
from .progress import layers_done, tensors_done
from .tables import print_line

if TYPE_CHECKING:
    from ..recipe.schema import DatasetSection

# What both commands are told.
Model = Annotated[str, typer.Argument(help="A folder with a saved model, package:NAME/PATH, or a name on the Hub.")]
Fields = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="More fields of PruningConfig, such as exclude=['.*head.*']."),
]
BatchSize = Annotated[int, typer.Option(help="Windows that pass through the model together.")]
Seed = Annotated[int, typer.Option(help="Seed of the choice of texts.")]
DataConfig = Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")]
Split = Annotated[str, typer.Option(help="Split of the data set.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
Where = Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only the rows with this value.")]
GgufFile = Annotated[str | None, typer.Option(help="A GGUF file of the model to read.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Where to compute, such as cuda (default: the CPU).")]
OffloadWeights = Annotated[
    bool,
    typer.Option(
        "--offload-weights",
        help="Weights stay on the CPU, and each layer's are copied to --device to compute it: for large models.",
    ),
]


def prune_command(
    model: Model,
    output: Annotated[Path, typer.Argument(help="The folder to write the pruned model into; new or empty.")],
    data: Annotated[
        str, typer.Option(help="Calibration texts: a data set on the Hub, a folder or file, or package:NAME/PATH.")
    ],
    method: Annotated[str, typer.Option(help="sparsegpt, alps, wanda, magnitude or random.")] = "sparsegpt",
    sparsity: Annotated[float | None, typer.Option(help="Share of masked weights; given by n:m patterns.")] = None,
    target_quality: Annotated[
        float | None,
        typer.Option(
            help="In place of --sparsity: the share of quality (dense perplexity / perplexity) to keep, such as 0.95; "
            "the highest sparsity that keeps it is searched, up to --sparsity (default 0.95)."
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
    shared_values: Annotated[
        int | None, typer.Option(help="Round the kept weights of each tensor to at most so many values, 2 to 256.")
    ] = None,
    settings: Fields = None,
    samples: Annotated[int, typer.Option(help="Windows of text to calibrate with.")] = 128,
    length: Annotated[int, typer.Option(help="Length of a window in tokens.")] = 2048,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    damping: Annotated[
        float | None,
        typer.Option(
            help="Damping of the second moments (default: 0.1 for sparsegpt, 0.01 without dense weight, 0.3 for alps)."
        ),
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
    offload: Annotated[
        str | None,
        typer.Option(help="disk, or cpu with --device cuda: where paused forward passes keep their tensors."),
    ] = None,
    data_config: DataConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    where: Where = None,
    gguf_file: GgufFile = None,
    base_model: Annotated[str | None, typer.Option(help="The model's name on the Hub, for the card.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    offload_weights: OffloadWeights = False,
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
    with errors_as_lines():
        quiet(data=True)
        from ..config.calibration import CalibrationConfig, check_quality, highest_sparsity
        from ..recipe.loading import parse_pruning
        from ..recipe.models import check_computing
        from ..recipe.one_shot import plan_saved, prune_saved

        if scope is None and (method, pattern) == ("wanda", "unstructured"):
            scope = "row"  # as it was published
        if target_quality is not None and resume:
            raise RecipeError("--target-quality", "must not be set with --resume: a search starts anew")
        has_one_sparsity = re.fullmatch(r"\d+:\d+", pattern) is not None  # n:m
        if target_quality is not None and sparsity is None and not has_one_sparsity:
            sparsity = 0.95  # the highest that is tried
        if offload == "cpu" and (device is None or device.split(":")[0] == "cpu"):
            raise RecipeError("--offload", "expected --device with an accelerator for cpu, got none; use disk, or none")
        check_computing(dtype, device, computes=not dry_run)
        computed_on = _computed_on(offload_weights, device)
        is_given = sparsity is not None or any(one.startswith("sparsity=") for one in settings or [])
        if not is_given and not has_one_sparsity:
            raise RecipeError("--sparsity", "expected the share of weights to mask, such as --sparsity 0.5, got none")
        given = {"method": method, "pattern": pattern, "sparsity": sparsity, "scope": scope}
        given |= {"reconstruction": reconstruction, "shared_values": shared_values}
        overrides = [f"{name}={json.dumps(value)}" for name, value in given.items() if value is not None]
        config = parse_pruning([*overrides, *(settings or [])])
        if target_quality is not None:
            check_quality(target_quality)
            highest_sparsity(config)
        calibration = CalibrationConfig(
            samples=samples,
            length=length,
            batch_size=batch_size,
            seed=seed,
            damping=damping,
            dense_weight=dense_weight,
            residual_weight=residual_weight,
            autocast=autocast,
            offload=offload,
            device=computed_on,
        )
        if dry_run:
            show_plan_at_once(plan_saved(model, config, calibration, gguf_file, dtype, target_quality), as_json)
            return
        section = _section(data, data_config, split, text_column, where)
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
                device=device if computed_on is None else None,
                leave_unreached=leave_unreached,
                resume=resume,
                target_quality=target_quality,
                say=print_line,
                progress=progress,
            )
    print_pruned(result)


def sensitivity_command(
    model: Model,
    data: Annotated[str, typer.Option(help="Texts: a data set on the Hub, a folder or file, or package:NAME/PATH.")],
    output: Annotated[Path, typer.Option(help="The folder to write curves and allocation into.")] = Path("sensitivity"),
    method: Annotated[str, typer.Option(help="sparsegpt, alps, wanda, magnitude or random.")] = "sparsegpt",
    sparsity: Annotated[float, typer.Option(help="Share of all weights together that is allocated.")] = 0.6,
    rates: Annotated[str, typer.Option(help="Sparsities at which each tensor is pruned alone.")] = "0.3,0.5,0.7",
    settings: Fields = None,
    samples: Annotated[int, typer.Option(help="Windows of text to calibrate with.")] = 32,
    length: Annotated[int, typer.Option(help="Length of a window in tokens.")] = 512,
    windows: Annotated[int, typer.Option(help="Other windows, on which the loss is measured.")] = 8,
    batch_size: BatchSize = 1,
    seed: Seed = 0,
    data_config: DataConfig = None,
    split: Split = "train",
    text_column: TextColumn = "text",
    where: Where = None,
    gguf_file: GgufFile = None,
    dtype: Dtype = "auto",
    device: Device = None,
    offload_weights: OffloadWeights = False,
) -> None:
    """Measure what pruning each tensor alone costs.

    What it adds to a language model's loss; and how a sparsity is best divided among the tensors.

    Writes curves (JSON, PNG), and the sparsity of each tensor at the least predicted loss (allocation.json), which
    hf-prune prune --set overrides=@FILE and recipes (pruning.overrides=@FILE) take. What is in the folder already, with
    the same settings, is not measured again.
    """
    with errors_as_lines():
        try:
            parsed = [float(rate) for rate in rates.split(",")]
        except ValueError as error:
            raise RecipeError("--rates", f"expected numbers with commas such as 0.3,0.5,0.7, got {rates!r}") from error
        quiet(data=True)
        from ..config.calibration import CalibrationConfig
        from ..recipe.loading import parse_pruning
        from ..recipe.models import check_computing
        from ..recipe.one_shot import measure_saved

        check_computing(dtype, device)
        computed_on = _computed_on(offload_weights, device)
        if windows < 1:
            raise RecipeError("--windows", f"expected 1 or more, got {windows}")
        given = {"method": method, "sparsity": sparsity, **({"scope": "row"} if method == "wanda" else {})}
        config = parse_pruning([*(f"{name}={json.dumps(value)}" for name, value in given.items()), *(settings or [])])
        section = _section(data, data_config, split, text_column, where)
        with tensors_done() as progress:
            result = measure_saved(
                model,
                output,
                config,
                section,
                CalibrationConfig(samples=samples, length=length, batch_size=batch_size, seed=seed, device=computed_on),
                parsed,
                windows=windows,
                gguf_file=gguf_file,
                dtype=dtype,
                device=device if computed_on is None else None,
                say=print_line,
                progress=progress,
            )
    print_sensitivity(result)


def _computed_on(offload_weights: bool, device: str | None) -> str | None:
    """The device that weights are copied to, layer by layer; None where they are moved there as a whole, or stay."""
    if not offload_weights:
        return None
    if device is None or device.split(":")[0] == "cpu":
        raise RecipeError("--offload-weights", "expected an accelerator to compute on, such as --device cuda, got none")
    return device


def _section(data: str, config: str | None, split: str, text_column: str, where: list[str] | None) -> "DatasetSection":
    """The texts that the options name."""
    from ..recipe.loading import parse_rows
    from ..recipe.schema import DatasetSection

    rows = parse_rows(where or [])
    return DatasetSection(name=data, config=config, train_split=split, text_column=text_column, where=rows)
