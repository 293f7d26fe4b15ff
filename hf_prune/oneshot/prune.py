"""`prune`: a whole model pruned at once, layer by layer, from calibration data."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.calibration import CalibrationConfig
from ..config.checks import as_path
from ..config.pruning import PruningConfig
from ..engines.choose import is_shared_model
from ..errors import ArgumentError, CalibrationError, PlacementError, PruningConfigError
from ..masking.groups import make_groups
from ..masking.pruner import Pruner
from ..methods.criteria import CRITERIA
from ..methods.scopes import SCOPES
from ..methods.solvers import SOLVERS
from ..methods.table import reads_of
from ..model.names import named_parameters
from ..model.targets import find_targets
from ..quantise.forms import SharedValues
from .masks import PackedMasks
from .onload import check_device, device_of
from .pruned import Progress, Pruned
from .run import Run
from .seen import check_labels
from .solve import needs_products
from .windows import as_batches
from .work import Work


def prune(
    model: PreTrainedModel,
    config: PruningConfig,
    data: Any = None,
    calibration: CalibrationConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    leave_unreached: bool = False,
    directory: str | os.PathLike | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Prune a trained model at once, in place, from calibration data; nothing is trained.

    Layers are pruned in the order of the forward pass, each from its inputs in the model that is pruned so far. With
    `dense_weight` above 0, the dense model is computed beside it. Padding and positions without a loss do not count.
    Zeros that the model has stay zero and are counted. The same data and seed give the same masks on the same machine.

    To go on training, use `PruningTrainer` with `PruningConfig(method="keep")`; `pruned.save(folder)` writes masks and
    configuration beside what `model.save_pretrained(folder)` has written.

    Args:
        model: a model of transformers, on the device where it is computed, or on the CPU with `calibration.device`.
        config: what is pruned: a method (`sparsegpt`, `alps`, `wanda`, `magnitude`, `random`), sparsity, pattern,
            scope, targets, overrides, `reconstruction="least_squares"` to solve what stays anew after any method, and
            `shared_values`: what stays has so many values, and later columns of a matrix make up for what rounding
            to them loses, where the products of inputs are read. Times, which are for training, are ignored.
        data: texts, for which a tokenizer is needed; token ids (samples, length); or batches of inputs, such as a
            DataLoader gives. Not needed for methods that read no inputs.
        calibration: settings; `samples`, `length` and `seed` are for texts alone.
        tokenizer: the model's tokenizer.
        leave_unreached: leave tensors dense whose layers the model never calls, such as those that are used without
            their module; else they are an error.
        directory: where finished layers are kept, in the folder `one_shot`, to resume from; `pruned.save` removes it.
        resume: continue a run that was stopped, in `directory`, with the same model, data and settings; it ends with
            the same weights, bit for bit.
        progress: called after each matrix.

    Raises:
        ArgumentError: an argument has the wrong type.
        PruningConfigError: the configuration cannot be used here, such as for a structure.
        CalibrationError: the data cannot be used, a layer is never called, or there is nothing to resume: nothing is
            changed then. Or a layer gets inputs that are not finite: those before it are pruned then.
        TargetError: an expression or a shape does not fit the model.
        PlacementError: the model is sharded over processes, or accelerate has offloaded its weights.
    """
    calibration = calibration if calibration is not None else CalibrationConfig()
    check_arguments(model, config, calibration)
    _check_places(model, calibration)
    if not reads_inputs(config):
        return _pruned_without_data(model, config)
    run = _checked_run(model, config, calibration, data, tokenizer, leave_unreached)
    if directory is None and resume:
        raise CalibrationError("directory", "expected the folder of the run to resume, got None")
    if directory is not None and resume:
        run.work = Work(as_path(directory), run.settings(), resume)
        run.counts = run.work.counts()
    if run.counts is None:
        run.counts = run.count()
    if directory is not None:
        run.work = run.work or Work(as_path(directory), run.settings(), resume)
        run.work.keep_counts(run.counts)
    return run.run(progress)


def check_prune(
    model: PreTrainedModel,
    config: PruningConfig,
    data: Any,
    calibration: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase | None = None,
    leave_unreached: bool = False,
    to_resume: Path | None = None,
) -> None:
    """Raise what `prune` raises before it changes anything: for arguments, data, targets, and what is never called.

    With the folder of a run that is to be resumed, also for another run, or none.
    """
    check_arguments(model, config, calibration)
    _check_places(model, calibration)
    if reads_inputs(config):
        run = _checked_run(model, config, calibration, data, tokenizer, leave_unreached)
        if to_resume is not None:
            Work(to_resume, run.settings(), resume=True)
    else:
        at_once(model, config)


def check_arguments(model: Any, config: Any, calibration: Any) -> None:
    """Raise ArgumentError, PruningConfigError or PlacementError for what cannot be pruned at once."""
    for name, value, expected in (
        ("model", model, PreTrainedModel),
        ("config", config, PruningConfig),
        ("calibration", calibration, CalibrationConfig),
    ):
        if not isinstance(value, expected):
            raise ArgumentError(name, f"expected a {expected.__name__}, got {type(value).__name__}")
    if config.structure is not None or config.has_target:
        raise PruningConfigError(
            "structure", "expected None, as units are removed while a model is trained: use PruningTrainer"
        )
    entry = CRITERIA.get(config.method)
    is_known = config.method in SOLVERS or (entry is not None and not entry.memory)
    if not is_known or "gradients" in reads_of(config.method, config.scope):
        usable = [
            *SOLVERS,
            *(name for name, one in CRITERIA.items() if one.reads in (None, "inputs") and not one.memory),
        ]
        raise PruningConfigError(
            "method", f"expected one of {', '.join(usable)} for pruning at once, got {config.method!r}"
        )
    if SCOPES[config.scope].ranks_together and reads_inputs(config):
        raise PruningConfigError(
            "scope",
            f"must not rank tensors together with the method {config.method!r}, which prunes one layer after another; "
            f"got {config.scope!r}, use 'layer', 'row', 'erk', 'sensitivity' or 'owl'",
        )
    if config.penalty is not None:
        raise PruningConfigError("penalty", f"expected None, as nothing is trained, got {config.penalty!r}")
    device = device_of(model, calibration) or model.device
    if calibration.offload == "cpu" and device.type == "cpu":
        raise CalibrationError(
            "offload", "expected a model that is computed on an accelerator for 'cpu', got the CPU; use 'disk', or none"
        )
    if device_of(model, calibration) is not None and SCOPES[config.scope].reads == "outputs":
        raise PruningConfigError(
            "scope",
            f"cannot be {config.scope!r} with weights that stay on the CPU, as gradients would need all of them on "
            f"{calibration.device} at once; use 'layer' or 'owl', or overrides that hf-prune sensitivity has measured",
        )
    if is_shared_model(model):
        raise PlacementError("the model is sharded over processes; prune it at once in one process, before training")


def _check_places(model: PreTrainedModel, calibration: CalibrationConfig) -> None:
    """Raise CalibrationError for a device that cannot be used, PlacementError for a model without weights.

    Accelerate leaves a model so whose weights it has offloaded.
    """
    missing = [name for name, parameter in named_parameters(model) if parameter.is_meta]
    if missing:
        raise PlacementError(
            f"expected a model with its weights on one device, got {len(missing)} tensors without them, such as "
            f"{missing[0]}: accelerate has offloaded them to the CPU or to disk, or none were loaded; load the model "
            "on the CPU, without a device_map, and compute it elsewhere with CalibrationConfig(device=...) "
            "(--device ... --offload-weights); with offload='disk' (--offload disk) weights need not fit into memory"
        )
    check_device(model, calibration)


def reads_inputs(config: PruningConfig) -> bool:
    """Whether calibration data are read, or the weights alone."""
    return needs_products(config) or bool(reads_of(config.method, config.scope))


def _pruned_without_data(model: PreTrainedModel, config: PruningConfig) -> Pruned:
    """Prune with a method that reads the weights alone, as at the first step of a training."""
    pruner = at_once(model, config)
    pruner.start(1)
    masks = PackedMasks()
    for name, mask in pruner.masks.items():
        masks.add(name, tuple(mask.shape))
        masks.set_part(name, 0, 1, mask)
    return Pruned(config, masks)


def at_once(model: PreTrainedModel, config: PruningConfig) -> Pruner:
    """A pruner, not started, that prunes at its start."""
    return Pruner(model, replace(config, schedule="one_shot", begin=0, end=None, initial_sparsity=None))


def _checked_run(
    model: PreTrainedModel,
    config: PruningConfig,
    calibration: CalibrationConfig,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    leave_unreached: bool,
) -> Run:
    if data is None:
        raise CalibrationError("data", f"expected calibration data for the method {config.method!r}, got None")
    batches = as_batches(data, model, tokenizer, calibration)
    targets = find_targets(model, config.targets, config.exclude, config.adapters)
    groups = make_groups(0, config, targets)
    run = Run(model, config, calibration, batches, targets, groups)
    run.check_reached(leave_unreached)
    fused = [layer.target.name for layer in run.layers.values() if layer.parts > 1]
    if config.sharing is not None and config.sharing != SharedValues(config.sharing.number):
        raise PruningConfigError(
            "shared_values",
            f"expected a number of values for each tensor at once, got {config.sharing.told}; train on with "
            "PruningConfig(method='keep', shared_values=...) for others",
        )
    if config.shared_values is not None and fused:
        raise PruningConfigError(
            "shared_values",
            f"cannot be used at once for a tensor whose matrices are pruned one by one, such as {fused[0]}; "
            "train on with PruningConfig(method='keep', shared_values=...), where they share values",
        )
    if "outputs" in (SCOPES[group.scope].reads for group in groups):
        check_labels(model, batches)
    return run
