"""Pruning a saved model at once from calibration data: opened, pruned, measured, and saved with its card."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config.calibration import CalibrationConfig, check_quality
from ..config.pruning import PruningConfig
from ..config.safe_json import read_json
from ..errors import RecipeError
from ..foreign.transformers import commit_of
from ..model.limits import few_modules, too_large
from ..model.opening import LOADING_ERRORS, why_not_opened
from ..model.targets import find_targets
from ..oneshot.offload import CpuStore, DiskStore, Store
from ..oneshot.onload import device_of
from ..oneshot.perplexity import mean_loss, perplexity, streamed_perplexity
from ..oneshot.planning import OneShotPlan, plan_prune
from ..oneshot.prune import check_prune, prune
from ..oneshot.pruned import Progress, Pruned
from ..oneshot.quality import prune_to_quality
from ..oneshot.sensitivity import Measured, Sensitivity, as_overrides, check_rates, measure_sensitivity
from ..oneshot.windows import WindowReader, is_causal
from ..publish.card import write_card
from ..publish.measure import hardware, versions
from ..publish.plots import plot_curves, plot_layers
from ..publish.record import Calibration, Evaluation, RunRecord, Source, describe_methods, save_record
from ..publish.sources import describe_base
from ..saved.model import SavedModel
from ..saved.report import Report, make_report
from ..trainer.claims import claimed
from .data import load_texts, source_of
from .models import check_finite, unquantised
from .names import resolve_name
from .schema import DatasetSection

Say = Callable[[str], None]

# How many windows perplexity is computed on.
EVALUATION_WINDOWS = 64


@dataclass(frozen=True)
class OneShotResult:
    """What came of `prune_saved`: what was pruned, and for causal language models the perplexity before and after."""

    pruned: Pruned
    report: Report
    metrics: dict[str, float]
    dense_metrics: dict[str, float]
    record: RunRecord
    folder: Path


def prune_saved(
    model_name: str,
    output: Path,
    config: PruningConfig,
    dataset: DatasetSection,
    calibration: CalibrationConfig,
    *,
    gguf_file: str | None = None,
    base_model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    leave_unreached: bool = False,
    resume: bool = False,
    target_quality: float | None = None,
    say: Say = print,
    progress: Progress | None = None,
) -> OneShotResult:
    """Prune a model of a folder or of the Hub, and save it with its masks, record and card in `output`.

    The calibration texts are those of one split of the data set, in an order drawn with the seed. For causal language
    models the next texts in that order are used to compute perplexity, before and after.

    With a `target_quality`, the highest sparsity up to that of `config` is searched at which the dense model's
    perplexity over the pruned one's is at least that, see `oneshot.quality.prune_to_quality`.

    Raises RecipeError, CalibrationError, TargetError or PruningConfigError, before anything is written, if model, data
    and settings do not fit together.
    """
    if target_quality is not None:
        check_quality(target_quality)
    path = resolve_name("model", model_name)
    rows = load_texts(dataset)
    texts = list(rows[dataset.text_column])
    tokenizer = _tokenizer(path, gguf_file)
    model = _model(path, gguf_file, dtype, device)
    held_out: torch.Tensor | None = None
    data: Any = texts
    if is_causal(model):
        reader = WindowReader(texts, tokenizer, calibration.length, calibration.seed)
        data = reader.take(calibration.samples)
        held_out = reader.take(min(EVALUATION_WINDOWS, calibration.samples))
    if target_quality is not None and held_out is None:
        raise RecipeError("target_quality", "expected a causal language model, whose perplexity can be measured")
    if target_quality is not None and resume:
        raise RecipeError("target_quality", "must not be set with --resume: a search starts anew")
    check_prune(model, config, data, calibration, tokenizer, leave_unreached, output if resume else None)
    _check_free(output, resume)
    with claimed(output, writes=True):
        dense_metrics = _measure(model, held_out, calibration, output)
        if dense_metrics:
            say(f"Perplexity of the dense model: {dense_metrics['perplexity']:.3f}")
        if target_quality is None:
            pruned = prune(
                model,
                config,
                data,
                calibration,
                tokenizer=tokenizer,
                leave_unreached=leave_unreached,
                directory=output,
                resume=resume,
                progress=progress,
            )
        else:
            pruned, _ = prune_to_quality(
                model,
                config,
                data,
                lambda one: _measure(one, held_out, calibration, output)["perplexity"],
                target_quality,
                calibration,
                dense_value=dense_metrics["perplexity"],
                tokenizer=tokenizer,
                leave_unreached=leave_unreached,
                progress=progress,
                tried=lambda trial: say(
                    f"Sparsity {trial.sparsity:.4g}: perplexity {trial.value:.3f}, quality {trial.quality:.3f}"
                ),
            )
            config = pruned.config
        metrics = _measure(model, held_out, calibration, output)
        if metrics:
            say(f"Perplexity of the pruned model: {metrics['perplexity']:.3f}")
        model.save_pretrained(output)
        tokenizer.save_pretrained(output)
        pruned.save(output)
        saved = SavedModel(output)
        source = source_of(dataset, rows, "train")
        base, problem = describe_base(path, base_model, commit_of(model.config))
        if problem is not None:
            say(f"The model card will state no license: {problem}")
        record = RunRecord(
            name=output.resolve().name,
            base_model=base,
            pruning=[config.to_dict()],
            methods=describe_methods([config]),
            target_sparsity=pruned.sparsity,
            calibration=describe_calibration(pruned, calibration, source, is_causal(model)),
            evaluations=_evaluations(metrics, dense_metrics, held_out, source),
            hardware=hardware(device_of(model, calibration) or model.device),
            versions=versions(),
            weights=saved.hashes,
        )
        save_record(saved, record)
        write_card(saved)
    return OneShotResult(pruned, make_report(saved), metrics, dense_metrics, record, output)


def plan_saved(
    model_name: str,
    config: PruningConfig,
    calibration: CalibrationConfig,
    gguf_file: str | None = None,
    dtype: str = "auto",
    target_quality: float | None = None,
) -> OneShotPlan:
    """What `prune_saved` would prune, and the memory that it takes, from the configuration of a model alone.

    Raises RecipeError for a model that cannot be built, and PruningConfigError or TargetError as `prune` does.
    """
    path = resolve_name("model", model_name)
    options = {"gguf_file": gguf_file} if gguf_file is not None else {}
    saved = Path(path, "config.json")
    try:
        problem = too_large(read_json(saved, finite=False)) if saved.is_file() else None
        if problem is not None:
            raise RecipeError("model", problem)
        of_model = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
        of_file = AutoModelForCausalLM.from_config if gguf_file is not None else _class_of(path)
        with torch.device("meta"), few_modules():
            model = of_file(of_model)
    except RecipeError:
        raise
    except LOADING_ERRORS as error:
        raise RecipeError("model", why_not_opened(error)) from error
    saved_as = torch.float32 if gguf_file is not None else getattr(of_model, "dtype", None)
    wanted = saved_as if dtype == "auto" else getattr(torch, dtype, None)
    if isinstance(wanted, torch.dtype):
        model = model.to(wanted)
    plan = plan_prune(model.eval(), config, calibration, has_directory=target_quality is None)
    return replace(plan, target_quality=target_quality)


# What `measure_saved` writes.
MEASURED_NAME, CURVES_NAME, CURVES_PLOT, ALLOCATION_NAME, ALLOCATION_PLOT = (
    "measured.jsonl",
    "sensitivity.json",
    "sensitivity.png",
    "allocation.json",
    "allocation.png",
)


@dataclass(frozen=True)
class SensitivityResult:
    """What came of `measure_saved`: the curves; and of a total sparsity the tensors', with the predicted loss."""

    found: Sensitivity
    sparsity: float
    shares: dict[str, float]
    predicted: float
    folder: Path


def measure_saved(
    model_name: str,
    output: Path,
    config: PruningConfig,
    dataset: DatasetSection,
    calibration: CalibrationConfig,
    rates: Sequence[float],
    *,
    windows: int,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    say: Say = print,
    progress: Measured | None = None,
) -> SensitivityResult:
    """Measure what pruning each tensor of a causal language model alone adds to the loss, and allocate a sparsity.

    Writes curves and allocation into `output` as JSON and PNG. What was measured there before, with the same model,
    data and settings, is not measured again. The loss is that of the next `windows` windows after those of the
    calibration.

    Raises RecipeError, CalibrationError, TargetError or PruningConfigError, before anything is written, if model, data
    and settings do not fit together.
    """
    assert config.sparsity is not None
    rates = check_rates(rates)
    if config.sparsity > rates[-1]:
        raise RecipeError(
            "sparsity", f"expected at most the highest of the rates, {rates[-1]}, got {config.sparsity}; add a rate"
        )
    path = resolve_name("model", model_name)
    rows = load_texts(dataset)
    tokenizer = _tokenizer(path, gguf_file)
    model = _model(path, gguf_file, dtype, device)
    if not is_causal(model):
        raise RecipeError("model", f"expected a causal language model, got {type(model).__name__}")
    reader = WindowReader(list(rows[dataset.text_column]), tokenizer, calibration.length, calibration.seed)
    data, held_out = reader.take(calibration.samples), reader.take(windows)
    tensors = len(find_targets(model, config.targets, config.exclude, config.adapters))
    passes = (1 + tensors * len(rates)) * windows
    say(
        f"{tensors} tensors at {len(rates)} sparsities: {passes:,} forward passes of {calibration.length} tokens each, "
        f"and {calibration.samples} for calibration"
    )
    output.mkdir(parents=True, exist_ok=True)
    with claimed(output, writes=True):
        found = measure_sensitivity(
            model,
            config,
            data,
            lambda one: mean_loss(one, held_out, calibration.batch_size),
            rates,
            calibration,
            tokenizer=tokenizer,
            kept_in=output / MEASURED_NAME,
            progress=progress,
        )
        shares, predicted = found.allocate(config.sparsity)
        losses = {name: curve.losses for name, curve in found.curves.items()}
        content = {**found.to_dict(), "allocation": {"sparsity": config.sparsity, "predicted_loss": predicted}}
        (output / CURVES_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (output / ALLOCATION_NAME).write_text(json.dumps(as_overrides(shares), indent=1) + "\n", encoding="utf-8")
        plot_curves(losses, found.dense, output / CURVES_PLOT, f"Loss with one tensor pruned by {config.method}")
        plot_layers(shares, output / ALLOCATION_PLOT, f"{config.sparsity:.0%} of all weights, allocated by loss")
    return SensitivityResult(found, config.sparsity, shares, predicted, output)


def describe_calibration(
    pruned: Pruned, calibration: CalibrationConfig, dataset: Source | None, is_of_windows: bool
) -> Calibration:
    """What a card says of the calibration."""
    solved = pruned.damping is not None  # else the weights that are kept are those of the dense model
    return Calibration(
        dataset=dataset,
        samples=pruned.samples,
        length=calibration.length if is_of_windows else None,
        tokens=pruned.tokens,
        seed=calibration.seed,
        damping=pruned.damping,
        dense_weight=calibration.dense_weight if solved else 0.0,
        residual_weight=calibration.residual_weight if solved else 0.0,
        notes=pruned.notes,
    )


def _check_free(output: Path, resume: bool) -> None:
    """Raise RecipeError for a folder that has files, unless a run is resumed there."""
    if output.exists() and not output.is_dir():
        raise RecipeError("output", f"expected a folder, found a file at {output}")
    if not resume and output.is_dir() and any(output.iterdir()):
        raise RecipeError(
            "output", f"expected an empty folder or a new one, found files in {output}; --resume continues a run there"
        )


def _tokenizer(path: str, gguf_file: str | None) -> PreTrainedTokenizerBase:
    options = {"gguf_file": gguf_file} if gguf_file is not None else {}
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, **options)
    except LOADING_ERRORS as error:
        raise RecipeError("model", f"the tokenizer cannot be loaded: {why_not_opened(error)}") from error


def _model(path: str, gguf_file: str | None, dtype: str, device: str | None) -> PreTrainedModel:
    """The model, of the class that its configuration names, on the device."""
    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file is not None else {}
    try:
        found: Any = AutoModelForCausalLM if gguf_file is not None else _class_of(path)
        model, loading = found.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
        )
    except RecipeError:
        raise
    except LOADING_ERRORS as error:
        raise RecipeError("model", why_not_opened(error)) from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise RecipeError("model", f"the file lacks weights, such as {missing[0]}; prune a model that is trained")
    model = unquantised(model) if gguf_file is not None else model
    check_finite(model)
    return model if device is None else cast(Any, model).to(torch.device(device))


def _class_of(path: str) -> Any:
    """The class that the configuration of a model names."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    names = getattr(config, "architectures", None) or []
    found = next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)
    if found is None:
        raise RecipeError(
            "model", f"expected a class of transformers among the architectures of its config, got {names}"
        )
    return found


def _measure(
    model: PreTrainedModel, held_out: torch.Tensor | None, calibration: CalibrationConfig, output: Path
) -> dict[str, float]:
    if held_out is None:
        return {}
    device = device_of(model, calibration)
    if device is None:
        return {"perplexity": perplexity(model, held_out, calibration.batch_size)}
    stores: dict[str | None, Callable[[], Store]] = {"cpu": CpuStore, "disk": lambda: DiskStore(output)}
    store = stores.get(calibration.offload)
    return {"perplexity": streamed_perplexity(model, held_out, calibration.batch_size, device, store)}


def _evaluations(
    metrics: dict[str, float], dense_metrics: dict[str, float], held_out: torch.Tensor | None, source: Source
) -> list[Evaluation]:
    if held_out is None:
        return []
    rows = f"{source.rows}, " if source.rows else ""
    windows = f"{len(held_out)} windows of {held_out.shape[1]} tokens of texts that were not used for calibration"
    finite = {name: value for name, value in metrics.items() if value != float("inf")}
    return [
        Evaluation(
            metrics=finite,
            main_metric=next(iter(finite), None),
            part="test",
            not_finite=[name for name in metrics if name not in finite],
            dense_metrics=dense_metrics,
            samples=len(held_out),
            dataset=source.model_copy(update={"rows": f"{rows}{windows}"}),
        )
    ]
