"""What pruning took from a model: zeros by matrix, rows and columns, neurons and heads, and rank."""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import StructureError, first_line
from ..model.anatomy import blocks_of, stacks
from ..model.layouts import Target, as_matrices
from ..model.names import named_parameters, plain_model
from ..model.targets import find_targets, targets_named
from ..publish.explanation import Matrix, UnitGroup
from ..saved.removed import LayersLeft
from ..structure.coupled import families_of
from ..structure.units import CoupledUnits

# Matrices whose smaller side is larger have no effective rank, as it takes minutes.
LARGEST_SIDE = 1024

# Groups of more units have quantiles.
MOST_UNITS = 128


def dense_name(name: str, removed: Sequence[LayersLeft]) -> str:
    """The name that a parameter of a model had before layers were removed from it."""
    for stack in removed:
        prefix = f"{stack.path}."
        if name.startswith(prefix):
            index, dot, rest = name.removeprefix(prefix).partition(".")
            return f"{prefix}{stack.kept[int(index)]}{dot}{rest}"
    return name


def layer_of(block: str, removed: Sequence[LayersLeft]) -> int | None:
    """The number that a layer, of this path now, had before layers were removed; None for what is no layer."""
    index = dense_name(block, removed).rpartition(".")[2]
    return int(index) if index.isdecimal() else None


def matrices_of(
    model: nn.Module,
    dense: nn.Module | None = None,
    names: Collection[str] | None = None,
    removed: Sequence[LayersLeft] = (),
) -> list[Matrix]:
    """The prunable tensors of a model with their zeros: those with these names, or those that are pruned by default.

    Beside each is the effective rank of the dense model's tensor. Layers have the numbers of the dense model; tensors
    the names that they have now.
    """
    targets = find_targets(model) if names is None else targets_named(model, names)
    targets = [target for target in targets if len(target.shape) > 1]  # without the biases of units
    parameters = dict(named_parameters(model))
    before = dict(named_parameters(dense)) if dense is not None else {}
    blocks = blocks_of(model, [target.name for target in targets])
    several = len({block.rpartition(".")[0] for block in blocks.values() if block}) > 1
    found = []
    for target in targets:
        weight, block = parameters[target.name].detach(), blocks[target.name]
        stack = block.rpartition(".")[0]
        kind = target.name.removeprefix(f"{block}.") if block else target.name
        matrices = as_matrices(weight, target.layout) != 0
        whole = before.get(dense_name(target.name, removed))
        found.append(
            Matrix(
                name=target.name,
                kind=f"{stack}.{kind}".removesuffix(".weight") if several and block else kind.removesuffix(".weight"),
                layer=layer_of(block, removed),
                shape=list(target.shape),
                weights=target.weights,
                zeros=target.weights - int(matrices.sum()),
                zero_rows=int((~matrices.any(dim=2)).sum()),
                zero_columns=int((~matrices.any(dim=1)).sum()),
                effective_rank=_rank_of(weight, target),
                dense_effective_rank=_rank_of(whole.detach(), target) if whole is not None else None,
            )
        )
    return found


def _rank_of(weight: torch.Tensor, target: Target) -> float | None:
    if target.layout not in ("matrix", "transposed") or weight.dim() != 2 or min(weight.shape) > LARGEST_SIDE:
        return None
    return effective_rank(weight)


def effective_rank(matrix: torch.Tensor) -> float:
    """exp of the entropy of the singular values, each divided by their sum (Roy and Vetterli, 2007); 0 without any.

    Computed in float64: 1 for a matrix of rank one, n for one with n singular values that are equal.
    """
    values = torch.linalg.svdvals(matrix.double().cpu())
    total = values.sum()
    if total == 0:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def units_of(model: nn.Module, removed: Sequence[LayersLeft] = ()) -> tuple[list[UnitGroup], list[str]]:
    """The neurons and heads of a model by layer, with the share of zeros in each one's weights; and why there are none.

    A unit's weights are those that compute it and those that read it, biases too. Layers have the numbers of the dense
    model.
    """
    plain = plain_model(model)
    if not isinstance(plain, PreTrainedModel):
        return [], [f"Neurons and heads are not known of {type(plain).__name__}, which is not part of transformers."]
    parameters = dict(named_parameters(plain))
    found, notes = [], []
    for structure in ("neurons", "heads"):
        try:
            families = families_of(plain, structure)
        except StructureError as error:
            notes.append(f"The {structure} are not known: {first_line(error).removeprefix('structure: ')}.")
            continue
        groups = [group for family in families for group in family.groups]
        blocks = blocks_of(plain, [group.names[0] for group in groups])
        if not groups:
            notes.append(f"The {structure} are not known: no field of {type(plain.config).__name__} counts them.")
        for group in groups:
            shares = zero_shares(group, parameters)
            is_long = len(shares) > MOST_UNITS
            listed = shares.quantile(torch.linspace(0, 1, 65, dtype=torch.float64)) if is_long else shares
            found.append(
                UnitGroup(
                    structure=structure,
                    path=group.path,
                    layer=layer_of(blocks[group.names[0]], removed),
                    units=len(shares),
                    dead=int((shares == 1).sum()),
                    zeros=listed.tolist(),
                    are_quantiles=is_long,
                )
            )
    return found, notes


def zero_shares(group: CoupledUnits, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
    """The share of zeros in the weights of each unit of a group (float64)."""
    zeros, weights = torch.zeros(group.units, dtype=torch.int64), torch.zeros(group.units, dtype=torch.int64)
    for part in group.all_parts:
        weight, dim = parameters[part.name].detach(), part.dim
        if part.expert is not None:
            weight, dim = weight[part.expert], dim - 1
        is_zero = (weight == 0).movedim(dim, 0).flatten(1) if weight.dim() > 1 else (weight == 0)[:, None]
        of_index = is_zero.sum(dim=1).cpu()
        for start, width in part.runs:
            zeros += of_index[start : start + group.units * width].view(group.units, width).sum(dim=1)
            weights += width * is_zero.shape[1]
    return zeros.double() / weights


def depth_of(model: nn.Module) -> dict[str, int]:
    """The number of layers of each stack that is not inside another one, by its path."""
    paths = sorted(stacks(model), key=len)
    outermost = [
        path for place, path in enumerate(paths) if not any(path.startswith(f"{one}.") for one in paths[:place])
    ]
    return {path: len(list(model.get_submodule(path).children())) for path in outermost}
