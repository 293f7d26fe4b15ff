"""What configurations prune in a model: the tensors, and the groups in which their weights or units are ranked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..config.arguments import PruningArguments
from ..config.pruning import PruningConfig
from ..errors import ArgumentError, PruningConfigError
from ..methods.scopes import SCOPES
from ..methods.solvers import SOLVERS
from ..model.adapters import mask_additions
from ..model.anatomy import has_adapters
from ..model.layouts import Target
from ..model.targets import find_targets, left_out_of
from .plan import Group, make_groups
from .structures import Structures


@dataclass
class Found:
    """What configurations prune in a model.

    Attributes:
        groups: in the order of the configurations.
        targets: the tensors by name.
        adapters: names of PEFT's own matrices, which are initialised with zeros.
        kept: names of tensors whose zeros a configuration keeps.
        of_units: names of tensors that only units are removed from, no single weights.
        left_out: parameter name -> why it is not pruned, for weights of layers that are not targets by default.
        shared_values: parameter name -> how many values the weights share that are kept, where they do.
    """

    groups: list[Group] = field(default_factory=list)
    targets: dict[str, Target] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    of_units: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)
    shared_values: dict[str, int] = field(default_factory=dict)


def find_groups(model: nn.Module, configs: Sequence[PruningConfig], structures: Structures) -> Found:
    """What these configurations prune in a model. What is removed for a target is not chosen here, and left out.

    Raises TargetError or StructureError if a configuration does not fit the model.
    """
    found = Found()
    by_weight: set[str] = set()  # names of tensors whose single weights are pruned
    for index, config in enumerate(configs):
        if config.has_target:
            continue
        check_in_training(config)
        if config.structure is not None:
            targets, groups = structures.find(index, config, model)
            found.of_units.update(target.name for target in targets)
        else:
            targets = find_targets(model, config.targets, config.exclude, config.adapters)
            groups = make_groups(index, config, targets)
            by_weight.update(target.name for target in targets)
        found.groups += groups
        found.targets |= {target.name: target for target in targets}
        if config.adapters == "sparse_adapters":
            found.adapters.update(target.name for target in targets)
        if config.method == "keep":
            found.kept.update(target.name for target in targets)
        if config.shared_values is not None:
            _check_sharing(model, config)
            most = config.shared_values
            found.shared_values |= {one.name: min(found.shared_values.get(one.name, most), most) for one in targets}
        if config.adapters == "sparse_merge":
            mask_additions(model, {target.name for target in targets})
    found.of_units -= by_weight
    reasons = left_out_of(model) if any(map(_is_by_default, configs)) else {}
    found.left_out = {name: reason for name, reason in reasons.items() if name not in found.targets}
    return found


def check_in_training(config: PruningConfig) -> None:
    """Raise PruningConfigError for what only `hf_prune.prune` does, from calibration data."""
    if config.reconstruction is not None and config.structure is None and not config.has_target:
        raise PruningConfigError(
            "reconstruction",
            "expected None for single weights in training, where the optimizer changes what stays, got "
            f"{config.reconstruction!r}; hf_prune.prune solves them anew from calibration data",
        )
    if SCOPES[config.scope].within_rows and config.method not in SOLVERS:
        raise PruningConfigError(
            "scope",
            f"expected another scope, such as 'layer', for the method {config.method!r} in training, got "
            f"{config.scope!r}; hf_prune.prune can rank the weights of each row by themselves",
        )


def _check_sharing(model: nn.Module, config: PruningConfig) -> None:
    """Raise PruningConfigError for shared values of weights that are saved elsewhere, under adapters of PEFT."""
    if has_adapters(model) and config.adapters != "sparse_adapters":
        raise PruningConfigError(
            "shared_values",
            "cannot be used for the weights under adapters, which are saved without them, got "
            f"{config.shared_values!r}; merge the adapters first, or use adapters='sparse_adapters'",
        )


def _is_by_default(config: PruningConfig) -> bool:
    """Whether a configuration prunes the weights that are targets by default."""
    of_weights = config.structure is None and not config.has_target
    return of_weights and config.targets is None and config.adapters != "sparse_adapters"


def identities(
    groups: Sequence[Group], name_of: Callable[[str], str | None] = lambda name: name
) -> list[tuple[Any, ...]]:
    """For each group what tells it from the others, also in a model that layers were cut out of (`name_of`)."""
    units = [0] * (1 + max((group.config_index for group in groups), default=0))
    found = []
    for group in groups:
        names = [name for target in group.members if (name := name_of(target.name)) is not None]
        if group.config.structure is not None:
            names = [str(units[group.config_index])]
            units[group.config_index] += 1
        found.append((group.config_index, *names))
    return found


def as_configs(config: Any) -> list[PruningConfig]:
    """One configuration, or several, as a list. Raises ArgumentError for anything else."""
    configs = [config] if isinstance(config, PruningConfig) else config
    if not isinstance(configs, Sequence) or not configs or not all(isinstance(one, PruningConfig) for one in configs):
        raise ArgumentError("config", f"expected a PruningConfig or a list of them, got {config!r}")
    if any(isinstance(one, PruningArguments) for one in configs):
        raise ArgumentError("config", "expected a PruningConfig, got PruningArguments; pass its attribute config")
    return list(configs)


def check_model(model: Any) -> None:
    """Raise ArgumentError for what is no model."""
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", f"expected a model (torch.nn.Module), got {type(model).__name__}")
