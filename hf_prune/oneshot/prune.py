"""`prune`: a whole model pruned at once, layer by layer, from calibration data."""

import hashlib
import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.calibration import CalibrationConfig
from ..config.checks import as_path
from ..config.pruning import PruningConfig
from ..engines.choose import is_shared_model, weights_digest
from ..errors import ArgumentError, CalibrationError, PlacementError, PruningConfigError
from ..masking.plan import Group, make_groups
from ..masking.pruner import Pruner
from ..methods.criteria import CRITERIA
from ..methods.scopes import SCOPES, Seen
from ..methods.solvers import SOLVERS
from ..methods.table import reads_of
from ..model.anatomy import blocks_of
from ..model.layouts import Target
from ..model.names import named_parameters
from ..model.targets import find_targets
from ..quantise.forms import SharedValues
from ..saved.pruning_state import PruningState, save_pruning
from ..structure.batches import rows_of
from .counts import counts_of, split_count
from .grams import Moments, moments_of
from .layers import Layer, find_layers, matrix_of, put_matrix
from .lockstep import Lockstep, Stop
from .offload import CpuStore, DiskStore, Store
from .seen import check_labels, see_dense
from .solve import Matrix, by_magnitude, damping_of, more_to_drop, needs_products, no_moments, solve
from .windows import Batch, as_batches
from .work import Finished, Work

# An expert that got fewer tokens than this times its input features says too little of their products.
_FEW_TOKENS = 2


@dataclass(frozen=True)
class PrunedLayer:
    """What was done to a matrix: a layer's, an expert's or that of a group of a convolution (`part`).

    `error` is the relative squared error of its outputs on some of the inputs, see `solve.Solved`; None without inputs.
    """

    name: str
    part: int
    weights: int
    masked: int
    tokens: int
    error: float | None
    seconds: float


# Fields of the calibration that the result does not depend on, once the data are there.
_WITHOUT_EFFECT = ("samples", "length", "offload")

# Called after each matrix with how many are done, how many there are, and what was done to it.
Progress = Callable[[int, int, PrunedLayer], None]


@dataclass
class Pruned:
    """What `prune` has done.

    Attributes:
        config: the configuration.
        masks: parameter name -> bool tensor of the parameter's shape, on the CPU, True where a weight is kept.
        layers: what was done to each matrix, in order; none if the method reads no inputs.
        samples: how many samples the calibration data have.
        tokens: how many of their tokens counted.
        damping: the share of the diagonal that was added to it; None where no products were read.
        left_dense: names of target tensors whose layers the first batch did not call, and which were left as they are.
        notes: sentences about what was pruned otherwise, or not at all, for people.
    """

    config: PruningConfig
    masks: dict[str, torch.Tensor]
    layers: list[PrunedLayer] = field(default_factory=list)
    samples: int = 0
    tokens: int = 0
    damping: float | None = None
    left_dense: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _work: Work | None = field(default=None, repr=False)

    @property
    def sparsity(self) -> float:
        """The share of masked weights of the tensors that were pruned."""
        weights = sum(mask.numel() for mask in self.masks.values())
        return sum(mask.numel() - int(mask.sum()) for mask in self.masks.values()) / max(weights, 1)

    def save(self, directory: str | os.PathLike) -> None:
        """Write masks and configuration beside a model that `save_pretrained` has written there.

        Then remove the finished layers that were kept to resume from.
        """
        state = PruningState(completed_steps=0, finished={0})
        save_pruning(as_path(directory), [self.config], state, self.masks, notes={"sparsity": self.sparsity})
        if self._work is not None:
            self._work.remove()


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
        model: a model of transformers, on the device where it is computed.
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
    _check_weights(model)
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
) -> None:
    """Raise what `prune` raises before it changes anything: for arguments, data, targets, and what is never called."""
    check_arguments(model, config, calibration)
    _check_weights(model)
    if reads_inputs(config):
        _checked_run(model, config, calibration, data, tokenizer, leave_unreached)
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
    if calibration.offload == "cpu" and model.device.type == "cpu":
        raise CalibrationError(
            "offload", "expected a model on an accelerator for 'cpu', got one on the CPU; use 'disk', or none"
        )
    if is_shared_model(model):
        raise PlacementError("the model is sharded over processes; prune it at once in one process, before training")


def _check_weights(model: PreTrainedModel) -> None:
    """Raise PlacementError for a model without weights, as accelerate leaves one whose weights it has offloaded."""
    missing = [name for name, parameter in named_parameters(model) if parameter.is_meta]
    if missing:
        raise PlacementError(
            f"expected a model with its weights on one device, got {len(missing)} tensors without them, such as "
            f"{missing[0]}: accelerate has offloaded them to the CPU or to disk, or none were loaded; load the model "
            "without a device_map that has 'cpu' or 'disk'. offload='disk' (--offload disk) moves what forward passes "
            "hold, which often is more than the weights"
        )


def reads_inputs(config: PruningConfig) -> bool:
    """Whether calibration data are read, or the weights alone."""
    return needs_products(config) or bool(reads_of(config.method, config.scope))


def _pruned_without_data(model: PreTrainedModel, config: PruningConfig) -> Pruned:
    """Prune with a method that reads the weights alone, as at the first step of a training."""
    pruner = at_once(model, config)
    pruner.start(1)
    return Pruned(config, {name: mask.cpu() for name, mask in pruner.masks.items()})


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
) -> "_Run":
    if data is None:
        raise CalibrationError("data", f"expected calibration data for the method {config.method!r}, got None")
    batches = as_batches(data, model, tokenizer, calibration)
    targets = find_targets(model, config.targets, config.exclude, config.adapters)
    groups = make_groups(0, config, targets)
    run = _Run(model, config, calibration, batches, targets, groups)
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


class _Run:
    """One run of `prune`."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: PruningConfig,
        calibration: CalibrationConfig,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        groups: Sequence[Group],
    ):
        self.model, self.config, self.calibration, self.batches = model, config, calibration, batches
        self.parameters = dict(named_parameters(model))
        self.groups = groups
        self.counts: dict[str, int] | None = None
        self.layers = {layer.target.name: layer for layer in find_layers(model, targets, self.parameters)}
        self.products = needs_products(config)
        twins = self.products and calibration.dense_weight > 0
        autocast = getattr(torch, calibration.autocast) if calibration.autocast is not None else None
        store = self.make_store if calibration.offload is not None else None
        self.stream = Lockstep(model, batches, targets, dense_twin=twins, autocast=autocast, store=store)
        self.work: Work | None = None
        self.left_dense: list[str] = []
        self.masks = {target.name: self.parameters[target.name].detach().ne(0).cpu() for target in targets}
        self.few_tokens: list[str] = []

    def make_store(self) -> Store:
        """Where the tensors of paused passes wait."""
        if self.calibration.offload == "cpu":
            return CpuStore()
        return DiskStore(self.work.folder if self.work is not None else None)

    def check_reached(self, leave_unreached: bool) -> None:
        """Raise CalibrationError for layers that are not called, unless they are to be left dense.

        Of experts that are modules, others may be called later: a token reaches only some of them.
        """
        called = {layer.target.name: layer for layer, _ in self.stream.discovery.order}
        experts = {_numberless(name) for name, layer in called.items() if layer.routed and layer.kind != "experts"}
        missing = [name for name in self.layers if name not in called and _numberless(name) not in experts]
        if missing and not leave_unreached:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise CalibrationError(
                f"{missing[0]}{others}: expected a call of its layer in the forward pass of the first batch, saw none: "
                "its module uses the weight without calling the layer, or not at all; exclude it, or leave such layers "
                "dense (leave_unreached=True, --leave-unreached)"
            )
        self.left_dense = missing

    def count(self) -> dict[str, int]:
        """How many units are dropped of each tensor, with what the scope sees of the dense model."""
        groups = [
            replace(group, members=tuple(one for one in group.members if one.name not in self.left_dense))
            for group in self.groups
        ]
        names = [target.name for group in groups for target in group.members]
        reads = {SCOPES[group.scope].reads for group in groups}
        seen: dict[str, list[Seen]] = {}
        if reads != {None}:
            layers = [self.layers[name] for name in names if self.layers[name].kind != "unknown"]
            positions = {layer.target.name: at for layer, at in self.stream.discovery.positions.items()}
            seen = see_dense(self.model, layers, self.batches, positions, gradients="outputs" in reads)
        weights = {name: self.parameters[name].detach() for name in names}
        return counts_of(groups, weights, seen, blocks_of(self.model, names))

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "model": weights_digest(self.model),
            "data": digest_of(self.batches),
            "pruning": self.config.to_dict(),
            "calibration": {
                name: value for name, value in self.calibration.to_dict().items() if name not in _WITHOUT_EFFECT
            },
            "torch": torch.__version__,
            "device": str(self.model.device),
            "threads": torch.get_num_threads(),
        }

    def run(self, progress: Progress | None) -> Pruned:
        done: list[PrunedLayer] = []
        moments: Moments | None = None
        total = sum(layer.parts for name, layer in self.layers.items() if name not in self.left_dense)
        for place, stop in enumerate(self.stream):
            if stop.target.name in self.left_dense:  # the first batch did not call it, another one does
                continue
            start = time.perf_counter()
            finished = self.work.find(place, _name(stop)) if self.work is not None else None
            if finished is None:
                if moments is None or not stop.shares_inputs or stop.writes_into_residual:
                    moments = moments_of(stop.inputs(), stop.shape[1], self.products)
                elif moments.lack is not None:  # of the layer before, whose inputs are the same
                    moments = replace(moments, lack=None)
                finished = self.finish(stop, moments, start)
                if self.work is not None:
                    self.work.keep(place, finished)
            else:
                moments = None
            stop.set(finished.weight.to(self.parameters[stop.target.name]))
            self.note_mask(self.layers[stop.target.name], stop.part, finished.kept)
            notes = {name: value for name, value in finished.notes.items() if name != "few"}
            if finished.notes.get("few"):
                self.few_tokens.append(_name(stop))
            done.append(PrunedLayer(**{**notes, "name": stop.target.name, "part": stop.part}))
            if progress is not None:
                progress(len(done), total, done[-1])
        if not done:
            raise CalibrationError("no layer that is to be pruned was called in the forward pass")
        return self.result(done)

    def finish(self, stop: Stop, moments: Moments, start: float) -> Finished:
        """Prune one matrix."""
        if not bool(moments.squares.isfinite().all()):
            raise CalibrationError(
                f"{_name(stop)}: expected inputs of its layer whose squares are finite in float32, got others; check "
                "what the model, pruned up to there, computes from the calibration data"
            )
        dtype = self.parameters[stop.target.name].dtype
        matrix = self.matrix(self.layers[stop.target.name], stop.part, stop.weight)
        few = self.products and self.layers[stop.target.name].routed
        few = few and moments.tokens < _FEW_TOKENS * matrix.weight.shape[1]
        if few:  # ranked by the inputs' norms alone, and not changed
            moments = replace(moments, gram=None, cross=None, lack=None)
        solved = solve(matrix, moments, self.config, self.calibration)
        notes = {
            "name": _name(stop),
            "weights": solved.kept.numel(),
            "masked": int((~solved.kept).sum()),
            "tokens": moments.tokens,
            "error": solved.error,
            "seconds": time.perf_counter() - start,
            "few": few,
        }
        return Finished(solved.weight.to(dtype), solved.kept, notes)

    def matrix(self, layer: Layer, part: int, weight: torch.Tensor) -> Matrix:
        """The problem of one matrix."""
        assert self.counts is not None
        kept = weight != 0
        count = split_count(self.counts[layer.target.name], layer.parts)[part]
        indices = None
        if self.config.method == "random":
            flat = torch.arange(layer.parameter.numel(), device=weight.device).view(layer.target.shape)
            indices = matrix_of(replace(layer, parameter=nn.Parameter(flat, requires_grad=False)), part)
        return Matrix(layer.target.name, weight.float(), kept, more_to_drop(kept, self.config, count), indices)

    def note_mask(self, layer: Layer, part: int, kept: torch.Tensor) -> None:
        """Enter the mask of a matrix into that of its tensor."""
        mask = nn.Parameter(self.masks[layer.target.name], requires_grad=False)
        put_matrix(replace(layer, parameter=mask), part, kept.cpu())

    def result(self, done: list[PrunedLayer]) -> Pruned:
        """What was done, after the last layer."""
        notes = []
        for name, parts in self.stream.experts_never_reached.items():
            for part in parts:
                self.prune_unseen(self.layers[name], part)
            numbers = ", ".join(map(str, parts))
            notes.append(f"{name}: no token reached the experts {numbers}; they were pruned by magnitude.")
        missed = [name for name in self.stream.never_reached if name not in self.left_dense]
        for name in missed:
            for part in range(self.layers[name].parts):
                self.prune_unseen(self.layers[name], part)
            notes.append(f"{name}: no token reached this expert; it was pruned by magnitude.")
        if self.few_tokens:
            notes.append(
                f"{len(self.few_tokens)} matrices of experts got fewer tokens than {_FEW_TOKENS} for each of their "
                f"input features; they were pruned by the norms of their inputs, and not changed: "
                f"{', '.join(self.few_tokens[:5])}{' and others' if len(self.few_tokens) > 5 else ''}."
            )
        for name in self.left_dense:
            notes.append(f"{name}: its layer was not called in the first batch; it was left dense.")
            self.masks.pop(name)
        for name, missing in self.stream.missed.items():
            notes.append(f"{name}: {missing} micro-batches came to it after it was pruned; it was pruned without them.")
        for name, times in self.stream.uses.items():
            notes.append(
                f"{name}: its layer is called {times + 1} times in a forward pass; it was pruned at the first."
            )
        return Pruned(
            config=self.config,
            masks=self.masks,
            layers=done,
            samples=sum(map(rows_of, self.batches)),
            tokens=max(layer.tokens for layer in done),
            damping=damping_of(self.config, self.calibration).share if self.products else None,
            left_dense=self.left_dense,
            notes=notes,
            _work=self.work,
        )

    def prune_unseen(self, layer: Layer, part: int) -> None:
        """Prune an expert that got no token by magnitude."""
        weight = matrix_of(layer, part).clone()
        matrix = self.matrix(layer, part, weight)
        solved = solve(matrix, no_moments(weight), by_magnitude(self.config), self.calibration)
        put_matrix(layer, part, solved.weight.to(weight.dtype))
        self.note_mask(layer, part, solved.kept)


def _numberless(name: str) -> str:
    """A name without its numbers, which the layers of all experts share."""
    return re.sub(r"\d+", "#", name)


def _name(stop: Stop) -> str:
    return f"{stop.target.name}[{stop.part}]" if stop.target.layout.startswith("experts") else stop.target.name


def digest_of(batches: Sequence[Batch]) -> str:
    """A digest of the tensors in batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            if torch.is_tensor(value):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
