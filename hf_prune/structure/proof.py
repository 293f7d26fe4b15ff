"""Whether a model without some units answers as the whole model does with those units at zero: tried on a small twin.

The twin is a model of the same class with random weights, few layers, neurons and words, in float64 if it can.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import StructureError, first_line
from ..foreign.transformers import names_not_saved
from .coupled import families_of
from .fields import MISFITS, Path, value_in, with_fields, without_overrides
from .norms import normalise_others
from .routing import avoid
from .rows import row_divisor
from .shrink import cut_of, misfit, shrink_model
from .skipping import skip
from .units import CoupledUnits, Family

# The twin has so many layers in each stack, so many neurons in each, and so many words.
_LAYERS, _NEURONS, _WORDS = 3, 64, 512

logger = logging.getLogger(__name__)

# Up to which difference, relative to the largest output, two models answer alike. Some classes compute in float32 only.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}

# The same in float64 where the units themselves change the outputs a hundred times as much: many classes compute norms,
# attention or rotations in float32 whatever the weights are, and how that rounds differs between processors.
_COMPUTED_IN_FLOAT32 = 1e-6

# So many widths are tried, to find one that a class can be built with.
_MOST_WIDTHS = 128

# A batch that a model runs with, or None.
Example = Callable[[], Mapping[str, Any] | None]


def proven(families: Sequence[Family], model: PreTrainedModel, example: Example = lambda: None) -> list[Family]:
    """The families with those units whose removal was tried, and changes nothing but the size.

    A layer that cannot be removed, such as the first where it computes what others use, is left out of its family's
    `removable` ones; a family of which nothing can be removed is left out with a warning. `example` gives a batch to
    try it with, for models for which none can be made from the configuration. Raises StructureError, naming the units,
    if that leaves none.
    """
    found: list[Family] = []
    problems: list[StructureError] = []
    for family in families:
        try:
            found.append(_proven(family, model, example))
        except StructureError as error:
            problems.append(error)
    if problems and not found:
        raise problems[0]
    for problem in problems:
        logger.warning("%s; they are not pruned.", first_line(problem).removeprefix("structure: "))
    return found


def _proven(family: Family, model: PreTrainedModel, example: Example) -> Family:
    """The family, with the parts of fused tensors in the order that the model has them in."""
    try:
        return _tried(family, model, example, interleaved=False)
    except StructureError:
        for other in families_of(model, family.structure, interleaved=True):
            other = replace(other, per_layer=family.per_layer, fixed_layers=family.fixed_layers)
            if other.fields == family.fields and other != family:
                return _tried(other, model, example, interleaved=True)
        raise


def _tried(family: Family, model: PreTrainedModel, example: Example, interleaved: bool) -> Family:
    model_class, config = type(model), model.config
    for dtype in TOLERANCES:
        twin_family, twin = _twin_of(family, model_class, config, dtype, interleaved)
        inputs = sample_inputs(twin, example)
        if inputs is not None:
            break
    if inputs is None:
        raise StructureError(
            "structure", f"no inputs were found to try {model_class.__name__} without some of its {family.structure}"
        )
    if family.structure != "layers":
        if max(group.units for group in family.with_tied[-1].groups) <= family.at_least:
            all_needed = (
                f"each token is sent to {family.at_least} of them" if family.at_least > 1 else "there is only one"
            )
            raise StructureError("structure", f"{family.groups[0].name} cannot be removed: {all_needed}")
        for dropped in _halves_of(twin_family, twin):
            problem = _difference(twin, twin_family, dropped, inputs)
            if problem is not None:
                raise StructureError("structure", f"{twin_family.groups[0].name} cannot be removed: {problem}")
        return family
    depth = len(twin_family.groups)
    kinds = {}
    for index in {0, 1, depth - 1} if depth > 1 else ():
        dropped = {group.name: torch.tensor([place == index]) for place, group in enumerate(twin_family.groups)}
        kinds[index] = _difference(twin, twin_family, dropped, inputs)
    if not kinds or all(why is not None for why in kinds.values()):
        why = next(iter(kinds.values()), "there is only one")
        raise StructureError("structure", f"layers of {family.stack} cannot be removed: {why}")
    last = len(family.groups) - 1
    fixed = [
        index
        for index in range(len(family.groups))
        if index in family.fixed_layers
        or kinds.get(0 if index == 0 else depth - 1 if index == last else min(1, depth - 1)) is not None
    ]
    if len(fixed) == len(family.groups):
        named = next(one.name for index, one in enumerate(family.groups) if index not in family.fixed_layers)
        raise StructureError("structure", f"{named} cannot be removed, nor others that are named: name others, or none")
    return replace(family, fixed_layers=tuple(fixed))


def _twin_of(
    family: Family, model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, interleaved: bool
) -> tuple[Family, PreTrainedModel]:
    """A small model of the class, and its family of the same fields."""
    for twin in small_twins(model_class, config, dtype):
        found = [
            one
            for one in families_of(twin, family.structure, interleaved)
            if [field.path for field in one.fields] == [field.path for field in family.fields]
        ]
        if found:
            return replace(found[0], per_layer=family.per_layer), twin
    raise StructureError("structure", f"{model_class.__name__} cannot be built to try it without {family.structure}")


def small_twins(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> Iterator[PreTrainedModel]:
    """Models of the class with random weights, the smallest first; the last has the given configuration."""
    for smaller in _smaller(config, model_class):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                twin = model_class(smaller).eval()
                nn.Module.to(twin, dtype)
            except MISFITS:
                continue
            computed = names_not_saved(twin)
            with torch.no_grad():
                for name, parameter in twin.named_parameters():
                    if name not in computed:
                        parameter.add_(0.02 * torch.randn_like(parameter))
        yield twin


def _smaller(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> Iterator[PreTrainedConfig]:
    """Configurations with fewer layers, neurons and words, the smallest first; the last is the given one."""
    config = without_overrides(config)
    layers: dict[Path, Any] = {}
    for family in families_of(_skeleton(model_class, config), "layers"):
        if len(family.groups) > _LAYERS:
            layers |= family.config(config, _LAYERS, range(_LAYERS))
    shallow = with_fields(config, layers)
    neurons: dict[Path, Any] = {}
    for family in families_of(_skeleton(model_class, shallow), "neurons"):
        if family.groups[0].units > _NEURONS:
            neurons |= family.config(config, _NEURONS)
    words: dict[Path, Any] = {}
    if (value_in(config, ("vocab_size",)) or 0) > _WORDS:
        words[("vocab_size",)] = _WORDS
    for values in ({**layers, **neurons, **words}, {**layers, **words}, layers, {}):
        try:
            yield with_fields(config, values)
        except MISFITS:
            continue


def _skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _halves_of(family: Family, twin: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Half of the units of each group, at random; of experts, which a router may choose by groups, the first too.

    Where layers may differ, in every second layer as few are left as can be. Of hidden states, as near to half as the
    class can be built with: many want a multiple of the number of heads.
    """
    generator = torch.Generator().manual_seed(0)
    fewest_left = row_divisor(family, twin)
    for in_order in (False, True) if family.structure == "experts" else (False,):
        dropped = {}
        share = _share_near_half(family, twin)
        for group in (group for one in family.with_tied for group in one.groups):
            order = torch.arange(group.units) if in_order else torch.randperm(group.units, generator=generator)
            dropped[group.name] = torch.zeros(group.units, dtype=torch.bool)
            few = family.per_layer and family.layer_of(group.path) % 2
            dropped[group.name][order[: group.units - fewest_left if few else int(share * group.units)]] = True
        yield dropped


def _share_near_half(family: Family, twin: PreTrainedModel) -> Fraction:
    """The share of units to drop: half, or so many that enough are left; of hidden states, one that fits the class."""
    units = family.with_tied[-1].groups[0].units
    half = min(units // 2, units - family.at_least)
    if family.structure == "hidden":
        groups = [group for one in family.with_tied for group in one.groups]
        for number in sorted(range(1, units), key=lambda number: abs(number - half))[:_MOST_WIDTHS]:
            flags = {one.name: torch.arange(one.units) < number * one.units // units for one in groups}
            if misfit(twin, cut_of(family.with_tied, flags)) is None:
                return Fraction(number, units)
    return Fraction(half, units)


def _difference(
    twin: PreTrainedModel, family: Family, dropped: Mapping[str, torch.Tensor], inputs: Mapping[str, Any]
) -> str | None:
    """Why the twin without these units is not the twin with them at zero (layers: skipped); None if it is."""
    masked, small = copy.deepcopy(twin), copy.deepcopy(twin)
    if family.structure == "layers":
        for group in family.groups:
            if bool(dropped[group.name].all()):
                skip(masked.get_submodule(group.path))
    else:
        zero_units(masked, [group for one in family.with_tied for group in one.groups], dropped)
    for group in family.groups:
        if family.structure == "experts":
            avoid(masked, group, dropped[group.name])
        elif family.structure == "hidden":
            normalise_others(masked, group, dropped[group.name])
    cut = cut_of(family.with_tied, dropped)
    try:
        shrink_model(small, cut)
        whole, expected, found = (answers(model, inputs) for model in (twin, masked, opened(small)))
    except StructureError as error:
        return first_line(error).removeprefix("structure: ")
    except MISFITS as error:
        return f"the smaller model does not run ({first_line(error)})"
    if family.structure == "hidden":  # some outputs are hidden states
        kept = cut.kept[family.groups[0].name]
        whole, expected = ([_hidden_in(one, family, kept) for one in some] for some in (whole, expected))
    if not [one.shape for one in whole] == [one.shape for one in expected] == [one.shape for one in found]:
        return "the smaller model has outputs of other shapes"
    scale = max((float(one.abs().max()) for one in expected if one.numel()), default=0.0)
    difference, change = largest_difference(expected, found), largest_difference(whole, expected)
    rounding = TOLERANCES[twin.dtype] * max(scale, 1e-30)
    if not difference <= max(rounding, min(_COMPUTED_IN_FLOAT32 * scale, change / 100)):
        return f"the smaller model's outputs differ by {difference / max(scale, 1e-30):.1e} of the largest"
    if change <= rounding:
        return "they do not change the outputs, so nothing can be compared"
    return None


def _hidden_in(output: torch.Tensor, family: Family, kept: torch.Tensor) -> torch.Tensor:
    """An output; of hidden states, the dimensions that are kept."""
    return output[..., kept] if output.shape[-1:] == (family.groups[0].units,) else output


def opened(model: PreTrainedModel) -> PreTrainedModel:
    """The model as its class builds it anew from its configuration, with the weights that are saved."""
    again = type(model)(copy.deepcopy(model.config)).eval()
    nn.Module.to(again, model.dtype)
    weights, new = model.state_dict(), again.state_dict()
    again.load_state_dict(weights | {name: new[name] for name in names_not_saved(model) & new.keys()})
    return again


def zero_units(model: nn.Module, groups: Sequence[CoupledUnits], dropped: Mapping[str, torch.Tensor]) -> None:
    """Set all weights of units to zero."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for group in groups:
            units = dropped[group.name].nonzero().squeeze(1)
            for part in group.all_parts:
                tensor: torch.Tensor = parameters[part.name]
                dim = part.dim
                if part.expert is not None:
                    tensor, dim = tensor[part.expert], dim - 1
                tensor.index_fill_(dim, part.indices(units).to(tensor.device), 0)


def largest_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """The largest difference of two models' outputs."""
    pairs = zip(one, other, strict=True)
    return max((float((first - second).abs().max()) for first, second in pairs if first.numel()), default=0.0)


def answers(model: nn.Module, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The floating-point outputs of a model, without those of single layers (caches, attentions, hidden states)."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = model(**inputs)
    found = outputs.values() if isinstance(outputs, Mapping) else [outputs]
    return [value for value in found if isinstance(value, torch.Tensor) and value.is_floating_point()]


def sample_inputs(model: PreTrainedModel, example: Example = lambda: None) -> dict[str, Any] | None:
    """Inputs that a model runs with, made from the name of its main input and the sizes in its configuration.

    Where these do not run, those of the example; None if neither does.
    """
    for inputs in _possible_inputs(model, example):
        try:
            if answers(model, inputs):
                return inputs
        except MISFITS:
            continue
    return None


def _possible_inputs(model: PreTrainedModel, example: Example) -> Iterator[dict[str, Any]]:
    config, dtype = model.config, model.dtype
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def words(length: int = 12) -> torch.Tensor:
        most = min(_first(config, "vocab_size") or 64, 64)
        ids = torch.randint(3, max(most - 2, 4), (2, length), generator=generator)
        end = _first(config, "eos_token_id")
        if type(end) is int and end < (_first(config, "vocab_size") or 64):
            ids[:, -1] = end
        return ids

    main = model.main_input_name
    decoder = {"decoder_input_ids": words()} if getattr(config, "is_encoder_decoder", False) else {}
    if main == "pixel_values":
        size = _first(config, "image_size") or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = _first(config, "num_channels") or 3
        yield {"pixel_values": numbers(2, channels, height, width), **decoder}
    elif main == "input_features":
        bins = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
        frames = 2 * (_first(config, "max_source_positions") or 50)
        yield {"input_features": numbers(2, bins, frames), **decoder}
        yield {"input_features": numbers(2, frames, bins), **decoder}
    elif main == "input_values":
        yield {"input_values": numbers(2, 8000), **decoder}
    yield {"input_ids": words(), "attention_mask": torch.ones(2, 12, dtype=torch.long), **decoder}
    yield {"input_ids": words(), **decoder}
    yield dict(model.dummy_inputs)
    given = example() or {}
    yield {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def _first(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these fields that the configuration or one of its parts has."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    return next((value for part in parts for name in names if (value := getattr(part, name, None))), None)
