"""What `prune` would prune, known without computing anything."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.calibration import CalibrationConfig
from ..config.pruning import PruningConfig
from ..errors import PruningStateError, one_line
from ..masking.groups import make_groups
from ..masking.plan import PlannedTensor
from ..methods.scopes import SCOPES
from ..methods.solvers import SOLVERS
from ..model.layouts import as_matrices
from ..model.names import named_parameters, shape_of
from ..model.targets import find_targets, left_out_of
from ..quantise.feeding import numbers as sharing_numbers
from ..saved.masks import packed_shape
from .counts import counts_of
from .grams import SAMPLE
from .layers import can_map
from .memory import stream_memory
from .onload import device_of
from .prune import at_once, check_arguments, reads_inputs
from .solve import needs_products
from .windows import check_length, is_causal


@dataclass(frozen=True)
class PlannedMemory:
    """The bytes that pruning needs at its peak.

    Attributes:
        model: the model's parameters and buffers, which are not part of the following.
        peak: all that is needed beside them at once.
        passes: what the forward passes, of the dense model too, hold then; with `offload`, at most the one that runs.
        solver: what second moments and solver of the matrix hold then.
        masks: one bit for each weight that is pruned, on the CPU, but for those that are mapped from files.
        at: the tensor that is pruned then.
        offloaded: what waits on the CPU or on disk at its peak, with `offload`.
        onloaded: the most weights that are on the device at once, with `device`; the others stay on the CPU.
    """

    model: int
    peak: int
    passes: int
    solver: int
    masks: int
    at: str
    offloaded: int = 0
    onloaded: int = 0


@dataclass(frozen=True)
class OneShotPlan:
    """What would be pruned at once.

    Attributes:
        tensors: the tensors, with how many of their weights are zero now, and the share that will be; of a model
            without weights (on the meta device) none are zero.
        weights: those of the tensors together.
        all_weights: those of the model.
        left_out: names of weights of layers that are not pruned by default -> the reason.
        calibration: how many samples are read and how; None for a method that reads the weights alone.
        final_sparsity: the share of masked weights of the tensors; the highest that is tried with a `target_quality`.
        target_quality: the share of the dense model's quality that is to be kept, if the sparsity is searched.
        memory: what is needed beside the weights; None where it is not known.
        memory_note: why it is not known.
    """

    tensors: list[PlannedTensor]
    weights: int
    all_weights: int
    final_sparsity: float
    left_out: dict[str, str] = field(default_factory=dict)
    calibration: CalibrationConfig | None = None
    memory: PlannedMemory | None = None
    memory_note: str | None = None
    target_quality: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def plan_prune(
    model: PreTrainedModel,
    config: PruningConfig,
    calibration: CalibrationConfig,
    length: int | None = None,
    has_directory: bool = False,
) -> OneShotPlan:
    """What `prune` would do with a model, which may be on the meta device.

    `length` is that of the samples in tokens, if it is not `calibration.length`; `has_directory` says whether `prune`
    will be given one. Raises ArgumentError, PruningConfigError, TargetError, PlacementError or CalibrationError as
    `prune` does.
    """
    check_arguments(model, config, calibration)
    all_weights = sum(math.prod(shape_of(parameter)) for parameter in model.parameters())
    if not reads_inputs(config):
        plan = at_once(model, config).plan(1)
        return OneShotPlan(plan.tensors, plan.weights, all_weights, plan.final_sparsity, plan.left_out)
    length = length if length is not None else calibration.length
    if is_causal(model):
        check_length(model, length)
    targets = find_targets(model, config.targets, config.exclude, config.adapters)
    groups = make_groups(0, config, targets)
    parameters = dict(named_parameters(model))
    counts = counts_of(groups, {target.name: parameters[target.name].detach() for target in targets})
    tensors, final = [], 0.0
    for group in groups:
        for target in group.members:
            matrices = as_matrices(parameters[target.name].detach(), target.layout)
            masked = 0 if matrices.is_meta else int((matrices == 0).sum())
            share = float(counts[target.name] * group.pattern.unit_sparsity / group.units_of(target))
            share = max(share, masked / target.weights)  # zeros that are there stay
            final += share * target.weights
            known = None if SCOPES[group.scope].sees_matrices else share  # what the dense model shows decides
            tensors.append(PlannedTensor(target.name, target.shape, target.weights, masked, known))
    order = {target.name: place for place, target in enumerate(targets)}
    tensors.sort(key=lambda tensor: order[tensor.name])
    weights = sum(tensor.weights for tensor in tensors)
    final /= max(weights, 1)
    memory, note = None, None
    try:
        memory = plan_memory(model, config, calibration, length, has_directory)
    except PruningStateError as error:
        note = one_line(error)
    return OneShotPlan(tensors, weights, all_weights, final, _left_out(model, config), calibration, memory, note)


def plan_memory(
    model: PreTrainedModel,
    config: PruningConfig,
    calibration: CalibrationConfig,
    length: int,
    has_directory: bool = False,
) -> PlannedMemory:
    """The peak memory of `prune` with texts of `length` tokens, from one forward pass over such a micro-batch.

    A model on the meta device needs no weights for it. The peak is the largest, over all layers, of what all passes
    hold when they are paused before the layer and what its moments and the solver need (`matrix_bytes`); or what the
    passes hold between two layers and the moments, which stay until those of the next layer are summed. With `device`,
    the weights that are used between two layers are there, too; those of fused experts also while these are pruned.
    With `offload`, paused passes hold nothing, but their inputs are copied; and with "disk" and a directory, masks are
    mapped from it.

    Raises PruningStateError where the model has no weights, and its forward reads values, see `stream_memory`.
    """
    targets = find_targets(model, config.targets, config.exclude, config.adapters)
    with_products = needs_products(config)
    twins = with_products and calibration.dense_weight > 0
    micro_batches = math.ceil(calibration.samples / calibration.batch_size)
    parameters = dict(named_parameters(model))
    device = next(iter(parameters.values())).device
    batch = {
        "input_ids": torch.zeros(calibration.batch_size, length, dtype=torch.int64, device=device),
        **_decoder_inputs(model, calibration.batch_size, length, device),
    }
    onloads = device_of(model, calibration) is not None
    stream = stream_memory(model, batch, targets, micro_batches, twins, onloads)
    passes = micro_batches * (2 if twins else 1)
    tokens = calibration.batch_size * length
    offloads = calibration.offload is not None
    running = stream.running if offloads else stream.peak + stream.freed
    peaks = []
    for target in targets:
        if target.name not in stream.held:
            continue
        lacks = twins and calibration.residual_weight > 0 and target.name in stream.into_residual
        _, rows, columns = target.matrices
        held, most = matrix_bytes(rows, columns, tokens, config, twins, lacks, parameters[target.name].dtype, offloads)
        paused = 0 if offloads else passes * stream.held[target.name]
        if target.layout.startswith("experts"):
            most += stream.onloaded
        going = running + stream.onloaded
        peaks += [(paused + most, paused, most, target.name), (going + held, running, held, target.name)]
    peak, paused, solver, at = max(peaks)
    maps = has_directory and calibration.offload == "disk"
    masks = sum(math.prod(packed_shape(one.shape)) for one in targets if not (maps and can_map(one)))
    tensors = {id(one): one.nbytes for one in (*model.parameters(), *model.buffers())}
    offloaded = passes * stream.paused if offloads else 0
    return PlannedMemory(sum(tensors.values()), peak + masks, paused, solver, masks, at, offloaded, stream.onloaded)


def matrix_bytes(
    rows: int,
    columns: int,
    tokens: int,
    config: PruningConfig,
    twins: bool,
    lacks: bool,
    dtype: torch.dtype,
    offloads: bool = False,
) -> tuple[int, int]:
    """The bytes that the moments of a matrix hold, and the most that are needed while it is pruned, moments included.

    Moments are gram and cross products (in, in), and those of what the stream lacks (out, in), and a product before it
    is added to them; of a micro-batch of `tokens`, inputs as float32 where the model is not; and some inputs are kept.
    For the new target, a Cholesky factor (in, in) and some matrices (out, in) are needed, and two factors and two
    matrices by a solver that begins; then what it says itself (`Solver.numbers`).
    """
    square, matrix, is_float32 = 4 * columns * columns, 4 * rows * columns, dtype == torch.float32
    copied = dtype.itemsize * tokens * (columns * (2 if twins else 1) + 2 * rows * lacks) * offloads
    if not needs_products(config):
        return 4 * columns, max(copied + 4 * tokens * columns * (not is_float32), 3 * matrix)
    moments = square * (2 if twins else 1) + matrix * lacks + 4 * SAMPLE * columns
    inputs = 0 if is_float32 else 4 * tokens * columns * (2 if twins else 1)
    inputs += 4 * tokens * rows * lacks
    summing = moments + max(square, matrix * lacks) + inputs + copied
    copies = matrix  # of the weights, in float32
    target = max(square + 2 * matrix, 3 * matrix) if twins else 0
    solving = 2 * square + 2 * matrix
    solver = SOLVERS.get(config.method)
    if solver is not None and solver.numbers is not None:  # the gram matrix and the weights are among them
        solving = max(solving, 4 * solver.numbers(rows, columns) - square - matrix)
    elif config.reconstruction is not None:
        solving = 6 * matrix
    if config.shared_values is not None:
        solving = max(solving, 4 * sharing_numbers(rows, columns) - square - matrix)
    return moments, max(summing, moments + copies + max(target, solving + matrix * twins))


def _decoder_inputs(model: PreTrainedModel, samples: int, length: int, device: torch.device) -> dict[str, torch.Tensor]:
    if not getattr(model.config, "is_encoder_decoder", False):
        return {}
    return {"decoder_input_ids": torch.zeros(samples, length, dtype=torch.int64, device=device)}


def _left_out(model: nn.Module, config: PruningConfig) -> dict[str, str]:
    return left_out_of(model) if config.targets is None else {}
