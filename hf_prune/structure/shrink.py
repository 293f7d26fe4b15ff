"""Cutting units out of a model: its tensors, its layers, its configuration, and the state of its optimizer."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import StructureError, first_line
from ..model.names import shape_of
from ..model.per_layer import FIELD, MAY_READ
from .fields import MISFITS, Path, overrides_in, saved_buffers, value_in, with_fields
from .units import CoupledUnits, Family, Part

# Types of attributes of modules that describe their shape.
_PLAIN = (bool, int, float, str, tuple, type(None), PreTrainedConfig)


@dataclass(frozen=True)
class Cut:
    """What is left of a model: for each family, and each of its groups by name, the units (int64, ascending) kept.

    Groups in a layer that is removed are not listed.
    """

    families: tuple[Family, ...]
    kept: Mapping[str, torch.Tensor]

    @property
    def layers(self) -> list[tuple[Family, list[int]]]:
        """The families of layers, and the indices of the layers that are kept in each."""
        return [
            (family, [index for index, group in enumerate(family.groups) if len(self.kept[group.name])])
            for family in self.families
            if family.structure == "layers"
        ]

    def name_of(self, name: str) -> str | None:
        """The name that a parameter, buffer or module of the whole model has in what is left; None if it is gone."""
        for family, kept in self.layers:
            prefix = f"{family.stack}."
            if name.startswith(prefix):
                index, dot, rest = name.removeprefix(prefix).partition(".")
                if int(index) not in kept:
                    return None
                name = f"{prefix}{kept.index(int(index))}{dot}{rest}"
        return name

    def values(self, config: PreTrainedConfig) -> dict[Path, Any]:
        """The fields of the configuration that change, and their values.

        Raises StructureError if groups of a family keep different numbers of units, and may not.
        """
        values: dict[Path, Any] = {}
        own = self._own_values(config)
        for family in self._smaller_families:
            counts = self._counts(family)
            if family.structure == "layers":
                kept = [index for index, group in enumerate(family.groups) if len(self.kept[group.name])]
                values.update(family.config(config, len(kept), kept))
                section = family.fields[0].path[:-1]
                if section in own:
                    own[section] = {new: own[section][old] for new, old in enumerate(kept) if old in own[section]}
            elif family.per_layer:
                values.update(family.fixed)
            elif len(counts) == 1:
                values.update(family.config(config, counts.pop()))
            else:
                raise StructureError(
                    "structure",
                    f"expected the same number of {family.structure} in every layer, for the configuration has one "
                    f"number for all, got {', '.join(map(str, sorted(counts)))}",
                )
        of_layers = {section: {index: one for index, one in layers.items() if one} for section, layers in own.items()}
        return values | {(*section, FIELD): layers or None for section, layers in of_layers.items()}

    def _own_values(self, config: PreTrainedConfig) -> dict[Path, dict[int, dict[str, Any]]]:
        """The values of single layers, by the part of the configuration, and by the index that the layers had."""
        sections = {field.path[:-1] for family in self._smaller_families for field in family.fields}
        own = {section: overrides for section in sections if (overrides := overrides_in(config, section))}
        for family in self._smaller_families:
            for field in family.fields if not family.per_layer else ():
                for of_layer in own.get(field.path[:-1], {}).values():
                    of_layer.pop(field.path[-1], None)
            for group in family.groups if family.per_layer else ():
                for field in family.fields if group.name in self.kept else ():
                    layers = own.setdefault(field.path[:-1], {})
                    value = field.value(len(self.kept[group.name]), value_in(config, field.path))
                    layers.setdefault(family.layer_of(group.path), {})[field.path[-1]] = value
        return own

    @property
    def _smaller_families(self) -> list[Family]:
        """The families of which units are removed: the configuration says no more of the others than before."""
        return [
            family
            for family in self.families
            if any(len(self.kept[group.name]) < group.units for group in family.groups if group.name in self.kept)
        ]

    def _counts(self, family: Family) -> set[int]:
        """The numbers of units that the groups of a family keep."""
        return {len(self.kept[group.name]) for group in family.groups if group.name in self.kept}

    def with_one_number(self) -> list["Cut"]:
        """The same cut, with one number for all layers in place of one for each; for each family that allows it."""
        found = []
        for family in self._smaller_families:
            if family.per_layer and not family.needs_per_layer and len(self._counts(family)) == 1:
                alike = replace(family, per_layer=False)
                found.append(replace(self, families=tuple(alike if one is family else one for one in self.families)))
        return found

    def config(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """The configuration of what is left."""
        values = self.values(config)
        try:
            return with_fields(config, values)
        except MISFITS:
            if not any(path[-1] == FIELD for path in values):
                raise
        # Some configurations, such as Llama's, read what differs from layer to layer when they check themselves.
        sections = {path[:-1] for path in values if path[-1] == FIELD}
        return with_fields(config, values | {(*section, MAY_READ): True for section in sections})

    def parts(self) -> dict[str, list[tuple[CoupledUnits, Part]]]:
        """Parameter name -> the parts of it that units are cut from."""
        found: dict[str, list[tuple[CoupledUnits, Part]]] = {}
        for family in self.families:
            for group in family.groups if family.structure != "layers" else ():
                for part in (*group.all_parts, *group.buffers) if group.name in self.kept else ():
                    found.setdefault(part.name, []).append((group, part))
        return found

    def tensors(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors of the shapes of parameters, by name, without the units that are not kept, under their new names."""
        parts = self.parts()
        found = {}
        for name, tensor in tensors.items():
            new_name = self.name_of(name)
            if new_name is not None:
                found[new_name] = self._without_units(tensor, parts.get(name, []))
        return found

    def _without_units(self, tensor: torch.Tensor, parts: Sequence[tuple[CoupledUnits, Part]]) -> torch.Tensor:
        experts = [
            (part.expert, _select(tensor[part.expert], part.dim - 1, part, self.kept[group.name]))
            for group, part in parts
            if part.expert is not None
        ]
        if experts:
            tensor = torch.stack([one for _, one in sorted(experts, key=lambda pair: pair[0])])
        for group, part in ((group, part) for group, part in parts if part.expert is None):
            tensor = _select(tensor, part.dim, part, self.kept[group.name])
        return tensor


def _select(tensor: torch.Tensor, dim: int, part: Part, kept: torch.Tensor) -> torch.Tensor:
    inside = part.indices(kept)
    if tensor.is_meta:
        return tensor.narrow(dim, 0, len(inside))
    return tensor.index_select(dim, inside.to(tensor.device))


def cut_of(families: Iterable[Family], dropped: Mapping[str, torch.Tensor]) -> Cut:
    """What is left without the `dropped` units (bool, by the name of their group).

    As the configuration has one number for all layers, each keeps as many units as the one with the most; where it has
    fewer, some that are dropped, which are zero, stay. Where layers may differ, that holds for the groups of one layer.
    """
    families = tuple(families)
    gone = [
        group.path
        for family in families
        if family.structure == "layers"
        for group in family.groups
        if group.name in dropped and bool(dropped[group.name].all())
    ]
    kept = {}
    for family in families:
        if family.structure == "layers":
            for group in family.groups:
                gone_here = dropped.get(group.name, torch.zeros(1, dtype=torch.bool))
                kept[group.name] = (~gone_here).nonzero().squeeze(1)
            continue
        there = [group for group in family.groups if not any(f"{group.path}.".startswith(f"{path}.") for path in gone)]
        together: dict[int, list[CoupledUnits]] = {}
        for group in there:
            together.setdefault(family.layer_of(group.path) if family.per_layer else 0, []).append(group)
        for groups in together.values():
            most = max(int((~dropped[group.name]).sum()) for group in groups)
            for group in groups:
                order = dropped[group.name].to(torch.int8).argsort(stable=True)  # those that are kept first
                kept[group.name] = order[: max(most, family.at_least)].sort().values
    return Cut(families, kept)


def shrink_model(model: PreTrainedModel, cut: Cut, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Cut units out of a model in place, and out of the moments in its optimizer's state.

    The model keeps its class, its modules and their hooks, and the parameters that nothing is cut from; the optimizer
    gets the new ones in place of the others. The configuration becomes one with which `from_pretrained` opens it.

    Raises StructureError, before anything is changed, if the class does not build the model that is left from the new
    configuration, or if the optimizer keeps state of other shapes than its parameters'.
    """
    config = cut.config(model.config)
    try:
        with torch.device("meta"):
            skeleton, whole = type(model)(config), type(model)(copy.deepcopy(model.config))
    except MISFITS as error:
        raise StructureError(
            "structure", f"{type(model).__name__} cannot be built without the removed units: {error}"
        ) from error
    parameters = dict(model.named_parameters())
    buffers = saved_buffers(model)
    smaller = cut.tensors({name: tensor.detach() for name, tensor in (*parameters.items(), *buffers.items())})
    _check_shapes(smaller, {**dict(skeleton.named_parameters()), **saved_buffers(skeleton)})
    states = _smaller_states(parameters, cut, optimizer)
    new = {
        parameter: nn.Parameter(smaller[new_name], requires_grad=parameter.requires_grad)
        if smaller[new_name].shape != parameter.shape
        else parameter
        for name, parameter in parameters.items()
        if (new_name := cut.name_of(name)) is not None
    }
    _remove_layers(model, cut)
    _remove_layers(whole, cut)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[parameter])
    for name in buffers.keys() & cut.parts().keys():
        new_name = cut.name_of(name)
        if new_name is not None:
            owner, _, own_name = new_name.rpartition(".")
            model.get_submodule(owner).register_buffer(own_name, smaller[new_name])
    if optimizer is not None:
        _replace(optimizer, {**dict.fromkeys(parameters.values()), **new}, states)
    _copy_sizes(skeleton, whole, model)


def in_fewest_values(cut: Cut, model: PreTrainedModel, model_class: type[PreTrainedModel] | None = None) -> Cut:
    """The same cut, with one number for all layers where they keep as many, and the model's class builds that.

    Then `from_pretrained` opens what is left as it opens other models. `model_class` is that of a model which is
    sharded.
    """
    for other in cut.with_one_number():
        if misfit(model, other, model_class) is None:
            return in_fewest_values(other, model, model_class)
    return cut


def misfit(model: PreTrainedModel, cut: Cut, model_class: type[PreTrainedModel] | None = None) -> str | None:
    """Why `from_pretrained` could not open what is left of a model; None if it can."""
    tensors = {**dict(model.named_parameters()), **saved_buffers(model)}
    try:
        with torch.device("meta"):
            skeleton = (model_class or type(model))(cut.config(model.config))
        left = cut.tensors({name: torch.empty(shape_of(tensor), device="meta") for name, tensor in tensors.items()})
        _check_shapes(left, {**dict(skeleton.named_parameters()), **saved_buffers(skeleton)})
    except StructureError as error:
        return first_line(error).removeprefix("structure: ")
    except MISFITS as error:
        return first_line(error)
    return None


def _check_shapes(tensors: Mapping[str, torch.Tensor], of_class: Mapping[str, torch.Tensor]) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in of_class.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if different:
        raise StructureError(
            "structure",
            f"{different[0]}: expected the shape {found.get(different[0])} in the smaller model, but its configuration "
            f"gives {expected.get(different[0])}",
        )


def _smaller_states(
    parameters: Mapping[str, nn.Parameter], cut: Cut, optimizer: torch.optim.Optimizer | None
) -> list[tuple[nn.Parameter, dict[str, Any]]]:
    """The state of an optimizer for what is left of each parameter."""
    found = []
    for name, parameter in parameters.items() if optimizer is not None else ():
        assert optimizer is not None
        state = optimizer.state.get(parameter)
        new_name = cut.name_of(name)
        if not state or new_name is None:
            continue
        new = dict(state)
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                new[key] = cut.tensors({name: value})[new_name]
            elif isinstance(value, torch.Tensor) and value.numel() > 1:
                raise StructureError(
                    "structure", f"{type(optimizer).__name__} keeps {key!r} of another shape than its parameter {name}"
                )
        found.append((parameter, new))
    return found


def _replace(
    optimizer: torch.optim.Optimizer,
    new: Mapping[nn.Parameter, nn.Parameter | None],
    states: Sequence[tuple[nn.Parameter, dict[str, Any]]],
) -> None:
    """Give an optimizer the new parameters in place of the old ones, with their states; those without are removed."""
    for group in optimizer.param_groups:
        replaced = [new.get(parameter, parameter) for parameter in group["params"]]
        group["params"] = [parameter for parameter in replaced if parameter is not None]
    for parameter in new:
        optimizer.state.pop(parameter, None)
    for parameter, state in states:
        replacement = new[parameter]
        assert replacement is not None
        optimizer.state[replacement] = state


def _remove_layers(model: nn.Module, cut: Cut) -> None:
    for family, kept in cut.layers:
        stack = model.get_submodule(family.stack)
        layers = [stack.get_submodule(str(index)) for index in kept]
        for name in list(stack._modules):
            delattr(stack, name)
        for index, layer in enumerate(layers):
            stack.add_module(str(index), layer)


def _copy_sizes(skeleton: nn.Module, whole: nn.Module, model: nn.Module) -> None:
    """Give every module the sizes, indices and configuration that the same module of a newly built model has.

    What a newly built whole model has alike stays, such as the rate of a dropout that was changed.
    """
    modules, before = dict(model.named_modules()), dict(whole.named_modules())
    for path, module in skeleton.named_modules():
        own, old = modules[path], vars(before[path])
        for name, value in vars(module).items():
            if name.startswith("_") or name == "training" or not _is_plain(value):
                continue
            if isinstance(value, PreTrainedConfig) or name not in old or value != old[name]:
                setattr(own, name, value)


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, list) and all(map(_is_plain, value)))
