"""What `prune` would prune, known without computing anything."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..config.calibration import CalibrationConfig
from ..config.pruning import PruningConfig
from ..masking.plan import PlannedTensor, make_groups
from ..model.layouts import as_matrices
from ..model.names import named_parameters, shape_of
from ..model.targets import find_targets, left_out_of
from .counts import counts_of
from .prune import at_once, check_arguments, reads_inputs


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
        final_sparsity: the share of masked weights of the tensors.
    """

    tensors: list[PlannedTensor]
    weights: int
    all_weights: int
    final_sparsity: float
    left_out: dict[str, str] = field(default_factory=dict)
    calibration: CalibrationConfig | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def plan_prune(model: PreTrainedModel, config: PruningConfig, calibration: CalibrationConfig) -> OneShotPlan:
    """What `prune` would do with a model, which may be on the meta device.

    Raises ArgumentError, PruningConfigError, TargetError or PlacementError as `prune` does.
    """
    check_arguments(model, config, calibration)
    all_weights = sum(math.prod(shape_of(parameter)) for parameter in model.parameters())
    if not reads_inputs(config):
        plan = at_once(model, config).plan(1)
        return OneShotPlan(plan.tensors, plan.weights, all_weights, plan.final_sparsity, plan.left_out)
    targets = find_targets(model, config.targets, config.exclude, config.adapters)
    groups = make_groups(0, config, targets)
    parameters = dict(named_parameters(model))
    counts = counts_of(groups, {target.name: parameters[target.name].detach() for target in targets})
    tensors = []
    for group in groups:
        for target in group.members:
            matrices = as_matrices(parameters[target.name].detach(), target.layout)
            masked = 0 if matrices.is_meta else int((matrices == 0).sum())
            share = float(counts[target.name] * group.pattern.unit_sparsity / group.units_of(target))
            share = max(share, masked / target.weights)  # zeros that are there stay
            tensors.append(PlannedTensor(target.name, target.shape, target.weights, masked, share))
    order = {target.name: place for place, target in enumerate(targets)}
    tensors.sort(key=lambda tensor: order[tensor.name])
    weights = sum(tensor.weights for tensor in tensors)
    final = sum((tensor.final_sparsity or 0) * tensor.weights for tensor in tensors) / max(weights, 1)
    return OneShotPlan(tensors, weights, all_weights, final, _left_out(model, config), calibration)


def _left_out(model: nn.Module, config: PruningConfig) -> dict[str, str]:
    return left_out_of(model) if config.targets is None else {}
