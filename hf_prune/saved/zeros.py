"""Counting the zeros in weight files, tensor by tensor, and which tensors are prunable."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel

from ..config.pruning import PruningConfig
from ..errors import PackedError, ReportError, StructureError, one_line
from ..methods.patterns import Pattern
from ..model.layouts import Target, as_matrices, group_indices
from ..model.targets import find_targets
from ..packed.files import PackedReader, is_packed
from ..packed.tensors import dense_tensor
from ..quantise.codebooks import MOST_VALUES, distinct_values
from ..quantise.forms import SharedValues
from ..quantise.groups import distinct_in_groups
from ..structure.coupled import find_families, select_groups
from .skeleton import owner_of, owners_of

# Rows read at a time, so that a large embedding is never in memory whole.
_VALUES_AT_A_TIME = 1 << 24

# The share of zeros from which on a tensor whose zeros are kept counts as pruned.
LEAST_ZEROS = 0.01

# What parameter names begin with in the list of modules of a sentence-transformers model, for the model in the first.
IN_FIRST_MODULE = "0.model."


@dataclass(frozen=True)
class TensorReport:
    """The zeros in one parameter; fused experts that are saved one by one count as one parameter.

    `prunable` is None if the model class is unknown. `saved_as` is the name in the file; of a parameter that is saved
    as several tensors, their names with `*` where they differ. `distinct_values` is the number of distinct values other
    than zero; None if there are more than 256. Where a configuration gives groups of weights values of their own,
    `group` says which, such as `row`, and `values_in_group` is the largest number of distinct values of one; `group` is
    `tensor` where it gives all of the tensor values to share.
    """

    name: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    prunable: bool | None
    saved_as: str = ""
    distinct_values: int | None = None
    values_in_group: int | None = None
    group: str | None = None

    @property
    def sparsity(self) -> float:
        """The share of zeros."""
        return self.zeros / max(self.weights, 1)

    @property
    def shares_values(self) -> bool:
        """Whether the weights that are not zero have at most half as many values as there are of them, and few.

        Those of a group of weights may be more than half as many: the group may be small.
        """
        if self.values_in_group is not None and self.values_in_group <= MOST_VALUES:
            return True
        return self.distinct_values is not None and 2 * self.distinct_values <= self.weights - self.zeros


def count_tensors(
    files: Sequence[Path], skeleton: PreTrainedModel | None, prunable: set[str]
) -> tuple[list[TensorReport], str | None]:
    """The parameters of a saved model, in the skeleton's order, with the zeros in its files.

    If the files do not have all of the prunable weights, as floating-point numbers, nothing is counted, and the reason
    is returned: they are packed, quantised, incomplete, or saved under other names.

    Reads some rows of a tensor at a time. Raises ReportError for a broken file.
    """
    owners = owners_of(skeleton) if skeleton is not None else {}
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()} if skeleton else {}
    counts: dict[str, list[Any]] = {}
    packed = set()
    for file in files:
        for key, shape, dtype, zeros, values in count_zeros(file):
            name = owner_of(key, owners, skeleton)
            entry = counts.setdefault(name, [shapes.get(name, shape), 0, 0, key, torch.zeros(0)])
            entry[1] += math.prod(shape)
            entry[2] += zeros
            entry[3] = _together(entry[3], key)
            entry[4] = _all_values(entry[4], values)
            if not dtype.startswith(("F", "BF")):
                packed.add(name)
    if skeleton is not None:
        usable = {name for name, (_, weights, *_) in counts.items() if weights == math.prod(shapes.get(name, ()))}
        lacking = sorted(prunable - (usable - packed))
        if lacking:
            known = {*shapes, *(name for name, _ in skeleton.named_buffers())}
            return [], _misfit(type(skeleton).__name__, lacking, len(prunable), sorted(counts.keys() - known))
    tensors = [
        TensorReport(
            name,
            tuple(shape),
            weights,
            zeros,
            prunable=name in prunable if skeleton is not None else None,
            saved_as=saved_as,
            distinct_values=len(values) if values is not None else None,
        )
        for name, (shape, weights, zeros, saved_as, values) in counts.items()
    ]
    order = {name: index for index, name in enumerate(shapes)}
    return sorted(tensors, key=lambda tensor: order.get(tensor.name, len(order))), None


def has_groups(files: Sequence[Path], skeleton: PreTrainedModel, targets: Sequence[Target], pattern: Pattern) -> bool:
    """Whether every group of m weights of these tensors has at most n that are not zero, in the files.

    Tensors that are saved in several parts are not looked at. Reads a tensor at a time.
    """
    return all(fits for _, fits in _groups_fit(files, skeleton, targets, pattern))


def tensors_with_groups(
    files: Sequence[Path], skeleton: PreTrainedModel, targets: Sequence[Target], pattern: Pattern
) -> set[str]:
    """The names of these tensors in which every group of m weights has at most n that are not zero, in the files.

    Tensors that are saved in several parts are not looked at. Reads a tensor at a time.
    """
    return {name for name, fits in _groups_fit(files, skeleton, targets, pattern) if fits}


def _groups_fit(
    files: Sequence[Path], skeleton: PreTrainedModel, targets: Sequence[Target], pattern: Pattern
) -> Iterator[tuple[str, bool]]:
    """The name of each of these tensors, and whether every group of m weights has at most n that are not zero."""
    owners, by_name = owners_of(skeleton), {target.name: target for target in targets}
    for file in files:
        for key, tensor in _whole_tensors(file):
            target = by_name.get(owner_of(key, owners, skeleton))
            if target is not None and tuple(tensor.shape) == target.shape:
                matrices = as_matrices(tensor, target.layout)
                groups = (matrices != 0).unflatten(2, (-1, pattern.columns)).sum(dim=3)
                yield target.name, not bool((groups > pattern.rows).any())


def values_in_groups(
    files: Sequence[Path], skeleton: PreTrainedModel, targets: Sequence[Target], form: SharedValues
) -> dict[str, int]:
    """For each of these tensors the largest number of distinct values other than zero in a group of weights.

    Tensors that are saved in several parts are not looked at. Reads a tensor at a time.
    """
    owners, by_name = owners_of(skeleton), {target.name: target for target in targets}
    most = {}
    for file in files:
        for key, tensor in _whole_tensors(file):
            target = by_name.get(owner_of(key, owners, skeleton))
            if target is not None and tuple(tensor.shape) == target.shape:
                indices = tensor.reshape(-1).nonzero().view(-1)
                groups = group_indices(indices, target, form.rows, form.columns)
                numbers = distinct_in_groups(tensor.reshape(-1)[indices], groups)
                most[target.name] = int(numbers.max()) if len(numbers) else 0
    return most


def _whole_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file by name, one at a time; packed ones are unpacked."""
    if is_packed(file):
        for entry, content in PackedReader(file).tensors():
            yield entry.name, dense_tensor(content, entry.dtype, entry.shape)
        return
    with safe_open(file, framework="pt") as tensors:
        for name in list(tensors.keys()):
            yield name, tensors.get_tensor(name)


def _misfit(model_class: str, lacking: Sequence[str], expected: int, others: Sequence[str]) -> str:
    found = f"; {len(others)} tensors belong to no parameter of the class, such as {others[0]}" if others else ""
    return (
        f"{len(lacking)} of the {expected} prunable tensors of {model_class} are not in the files as floating-point "
        f"weights, such as {lacking[0]}{found}; the model may be packed, quantised, incomplete, or saved under other "
        "names, so zeros were not counted"
    )


def _together(name: str, other: str) -> str:
    """Two names of tensors as one, with `*` in place of the components that differ."""
    pairs = zip_longest(name.split("."), other.split("."))
    return ".".join(part if part == same else "*" for part, same in pairs)


def count_zeros(file: Path) -> Iterator[tuple[str, tuple[int, ...], str, int, torch.Tensor | None]]:
    """Name, shape, data type (as safetensors calls it) and number of zeros of each tensor in a safetensors file.

    The last are its distinct values other than zero; None if there are more than 256. Packed tensors are unpacked for
    it, one at a time.
    """
    try:
        if is_packed(file):
            for entry, content in PackedReader(file).tensors():
                tensor = dense_tensor(content, entry.dtype, entry.shape)
                yield entry.name, entry.shape, entry.dtype, _zeros_in(tensor), distinct_values([tensor])
            return
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            for name in names:
                part = tensors.get_slice(name)
                shape = tuple(part.get_shape())
                zeros = 0
                values: torch.Tensor | None = torch.zeros(0)
                for rows in _rows(part, shape):
                    zeros += _zeros_in(rows)
                    values = _all_values(values, distinct_values([rows])) if values is not None else None
                yield name, shape, str(part.get_dtype()), zeros, values
    except (OSError, RuntimeError, SafetensorError, PackedError) as error:
        why = one_line(error)
        raise ReportError(f"{file}: expected safetensors, got a file that cannot be read ({why})") from error


def _zeros_in(tensor: torch.Tensor) -> int:
    return tensor.numel() - int((tensor if tensor.dtype.itemsize > 1 else tensor.float()).count_nonzero())


def _all_values(values: torch.Tensor | None, others: torch.Tensor | None) -> torch.Tensor | None:
    """The distinct values of two parts of a tensor together; None if there are more than can be told."""
    return None if values is None or others is None else distinct_values([values, others])


def _rows(part: Any, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    if not shape:
        yield part[...]
        return
    if 0 in shape:
        return
    step = max(_VALUES_AT_A_TIME // max(math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        yield part[start : start + step]


def prunable_names(
    skeleton: PreTrainedModel, configs: Sequence[PruningConfig], in_first_module: bool, frozen: Sequence[str] = ()
) -> set[str]:
    """The names of the tensors that the pruning configurations select, or without any, of the default targets.

    Where single weights are masked, biases and norms of units that were removed are not among them.

    `in_first_module`: whether the skeleton is the first module of a sentence-transformers model; `frozen`: the names of
    weights that were left out of the default targets.

    Raises TargetError for expressions that match no name of this model, and StructureError for those that select the
    units of some layers only.
    """
    if not configs:
        return {target.name for target in find_targets(skeleton)}
    found: set[str] = set()
    of_weights = any(config.structure is None and not config.has_target for config in configs)
    for config in configs:
        if config.structure is not None:
            names = _with_units(skeleton, config.structure, config)
            if of_weights:  # biases and norms lose no single weights
                names = {name for name in names if skeleton.get_parameter(name).ndim > 1}
        elif in_first_module:
            names = _prunable_of_first_module(skeleton, config)
        else:
            names = {target.name for target in find_targets(skeleton, config.targets, config.exclude)}
        found |= names.difference(frozen if config.targets is None else ())
    return found


def _with_units(skeleton: PreTrainedModel, structure: str, config: PruningConfig) -> set[str]:
    """The names of the tensors that the units of a structure are part of.

    A model with a single layer that is left has no units that could be told from the rest of it: then those of the
    default targets. Of layers, expressions named those that could go: what is left has others of these names.
    """
    try:
        families = find_families(skeleton, structure)
    except StructureError:
        return {target.name for target in find_targets(skeleton)}
    if structure != "layers":
        families = select_groups(families, config.targets, config.exclude)
    return {name for family in families for name in family.names}


def _prunable_of_first_module(skeleton: nn.Module, config: PruningConfig) -> set[str]:
    """The same for a sentence-transformers model, trained as a list of modules with the skeleton in the first.

    Expressions that match no name are taken to belong to later modules.
    """
    first = nn.Module()
    first.model = skeleton
    whole = nn.Sequential(first)
    names = [name for name, _ in whole.named_parameters()]
    exclude = [expression for expression in config.exclude if _fits_any(expression, names)]
    if config.targets is None:
        found = find_targets(whole, exclude=exclude)
    else:
        targets = [expression for expression in config.targets if _fits_any(expression, names)]
        found = find_targets(whole, targets, exclude) if targets else []
    return {target.name.removeprefix(IN_FIRST_MODULE) for target in found}


def _fits_any(expression: str, names: Sequence[str]) -> bool:
    return any(re.fullmatch(expression, name) for name in names)
