"""The highest sparsity at which a model keeps a stated share of its quality, found by trying."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.calibration import CalibrationConfig, check_quality, highest_sparsity
from ..config.pruning import PruningConfig
from ..errors import CalibrationError, PruningConfigError
from ..model.names import named_parameters
from ..model.targets import find_targets
from .onload import check_device
from .prune import Progress, Pruned, check_arguments, prune

# Sparsities that are tried are multiples of this.
STEP = 0.01


@dataclass(frozen=True)
class Trial:
    """A sparsity that was tried, what the evaluation gave, and the share of the dense model's quality that it is."""

    sparsity: float
    value: float
    quality: float


def prune_to_quality(
    model: PreTrainedModel,
    config: PruningConfig,
    data: Any,
    evaluate: Callable[[PreTrainedModel], float],
    target_quality: float = 0.95,
    calibration: CalibrationConfig | None = None,
    *,
    greater_is_better: bool = False,
    dense_value: float | None = None,
    step: float = STEP,
    tokenizer: PreTrainedTokenizerBase | None = None,
    leave_unreached: bool = False,
    progress: Progress | None = None,
    tried: Callable[[Trial], None] | None = None,
) -> tuple[Pruned, list[Trial]]:
    """Prune a model, in place, to the highest sparsity at which it keeps a share of its quality.

    The quality is `dense value / value` where lower is better, as for perplexity, and `value / dense value` where
    higher is better, as for accuracy. Sparsities are tried by bisection, which takes quality to fall with sparsity;
    each trial prunes the dense model anew, so that seven of them take seven times as long as one run. Two copies of the
    pruned tensors are held on the CPU. The trials are among the notes of what is returned.

    Args:
        model: a model of transformers.
        config: what is pruned; its sparsity is the highest that is tried.
        data: calibration data, see `prune`.
        evaluate: returns the value of a model, above 0; such as its perplexity on text that is not used for
            calibration.
        target_quality: the share of the dense model's quality that is to be kept, between 0 and 1.
        calibration: settings, see `prune`; with `device`, `evaluate` says itself where it computes.
        greater_is_better: whether higher values are better.
        dense_value: the value of the dense model, if it is known.
        step: sparsities that are tried are multiples of this, and the highest.
        tokenizer: the model's tokenizer, if the data are texts.
        leave_unreached: see `prune`.
        progress: called after each matrix of each trial.
        tried: called after each trial.

    Returns what `prune` returns for the sparsity that was found, and all trials.

    Raises:
        PruningConfigError: an n:m pattern, which has one sparsity, or a target that is none.
        CalibrationError: even the lowest sparsity does not keep the quality. The model is then the dense one.
    """
    calibration = calibration if calibration is not None else CalibrationConfig()
    check_arguments(model, config, calibration)
    check_quality(target_quality)
    if not 0 < step < 1:
        raise PruningConfigError("step", f"expected 0 < step < 1, got {step!r}")
    highest = highest_sparsity(config)
    check_device(model, calibration)
    dense = evaluate(model) if dense_value is None else dense_value
    targets = find_targets(model, config.targets, config.exclude, config.adapters)
    before = _weights(model, [target.name for target in targets])
    trials: list[Trial] = []
    best: tuple[Pruned, dict[str, torch.Tensor]] | None = None

    def holds(sparsity: float) -> bool:
        nonlocal best
        _restore(model, before)
        at_sparsity = replace(config, sparsity=sparsity)
        pruned = prune(
            model,
            at_sparsity,
            data,
            calibration,
            tokenizer=tokenizer,
            leave_unreached=leave_unreached,
            progress=progress,
        )
        value = evaluate(model)
        quality = value / dense if greater_is_better else dense / value
        trials.append(Trial(sparsity, value, quality))
        if tried is not None:
            tried(trials[-1])
        kept = quality >= target_quality  # not so where it is no number
        if kept:
            best = pruned, _weights(model, pruned.masks)
        return kept

    try:
        _bisect(highest, step, holds)
    finally:
        _restore(model, before)
    if best is None:
        lowest = min(trials, key=lambda trial: trial.sparsity)
        raise CalibrationError(
            "target_quality",
            f"expected a sparsity at which the model keeps {target_quality} of its quality, found none: at "
            f"{lowest.sparsity} it keeps {lowest.quality:.4f}; ask for less",
        )
    pruned, weights = best
    _restore(model, weights)
    pruned.notes.append(describe_trials(trials, target_quality))
    return pruned, trials


def describe_trials(trials: list[Trial], target_quality: float) -> str:
    """What was tried, in a sentence."""
    found = ", ".join(f"{trial.sparsity:.4g} ({trial.quality:.3f})" for trial in trials)
    return (
        f"The sparsity is the highest of those tried at which {target_quality} of the dense model's quality is kept; "
        f"tried, with the share that is kept: {found}."
    )


def _bisect(highest: float, step: float, holds: Callable[[float], bool]) -> None:
    """Try the highest sparsity, then halve the interval of multiples of a step between what holds and what does not."""
    if holds(highest):
        return
    low, high = 0, round(highest / step)
    if high * step < highest - step / 1e6:
        high += 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(round(middle * step, 10)) else (low, middle)


def _weights(model: PreTrainedModel, names: Collection[str]) -> dict[str, torch.Tensor]:
    """The weights of the parameters of these names, as they are now, on the CPU."""
    parameters = dict(named_parameters(model))
    return {name: parameters[name].detach().to("cpu", copy=True) for name in names}


@torch.no_grad()
def _restore(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    for name, parameter in named_parameters(model):
        if name in weights:
            parameter.copy_(weights[name])
