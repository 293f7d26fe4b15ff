"""What configurations prune in a model: the tensors, and the groups in which their weights or units are ranked."""

from collections.abc import Callable, Mapping, Sequence
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
from ..quantise.forms import SharedValues
from ..saved.zeros import LEAST_ZEROS
from .groups import Group, make_groups
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
        uncounted: names of tensors that the sparsity that is told does not count: none of their weights is asked to be
            zero. Those are biases and norms of which units are removed, where single weights of other tensors are
            masked, and, where others are pruned, tensors whose zeros are kept; of these not those that have some.
        shared_values: parameter name -> which values the weights share that are kept, where they do.
    """

    groups: list[Group] = field(default_factory=list)
    targets: dict[str, Target] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    kept: set[str] = field(default_factory=set)
    of_units: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)
    uncounted: set[str] = field(default_factory=set)
    shared_values: dict[str, SharedValues] = field(default_factory=dict)


def find_groups(model: nn.Module, configs: Sequence[PruningConfig], structures: Structures) -> Found:
    """What these configurations prune in a model. What is removed for a target is not chosen here, and left out.

    Raises TargetError or StructureError if a configuration does not fit the model.
    """
    found = Found()
    by_weight: set[str] = set()  # names of tensors whose single weights are pruned, or kept as they are
    pruned: set[str] = set()  # names of tensors that lose weights or units
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
        else:
            pruned.update(target.name for target in targets)
        if config.shared_values is not None:
            _check_sharing(model, config)
            for target in targets:
                found.shared_values[target.name] = _fewer(found.shared_values.get(target.name), config, target)
        if config.adapters == "sparse_merge":
            mask_additions(model, {target.name for target in targets})
    found.of_units -= by_weight
    found.uncounted = {name for name in found.of_units if by_weight and len(found.targets[name].shape) == 1}
    found.uncounted |= found.kept - pruned if pruned else set()
    reasons = left_out_of(model) if any(map(_is_by_default, configs)) else {}
    found.left_out = {name: reason for name, reason in reasons.items() if name not in found.targets}
    return found


def counted_targets(found: Found, masked: Mapping[str, int]) -> list[Target]:
    """The tensors that sparsities count, given their numbers of masked weights.

    A tensor whose zeros are kept counts if so many are zero that it was pruned: an unused row of an embedding does not.
    """
    pruned_before = {name for name in found.kept if masked[name] >= found.targets[name].weights * LEAST_ZEROS}
    return [one for name, one in found.targets.items() if name not in found.uncounted or name in pruned_before]


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


def _fewer(form: SharedValues | None, config: PruningConfig, target: Target) -> SharedValues:
    """The values of a configuration for a tensor, or, if fewer, those of the configurations before it."""
    other = config.sharing
    assert other is not None
    if form is None:
        return other
    if (form.levels, form.rows, form.columns) != (other.levels, other.rows, other.columns):
        raise PruningConfigError(
            "shared_values",
            f"expected the same kind of values from all configurations of a tensor, got two for {target.name}: those "
            f"of each {form.words} and of each {other.words}, or whole numbers and others; exclude it from one",
        )
    return min(form, other, key=lambda one: one.number)


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
