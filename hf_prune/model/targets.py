"""Which tensors of a model are pruned, found from the modules and never from a model's name."""

import difflib
import re
from collections.abc import Collection, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TargetError, shown
from .anatomy import (
    adapter_modules,
    head_modules,
    how_to_undo,
    is_experts,
    is_layer,
    is_quantized,
    router_modules,
    stacked_modules,
)
from .layouts import Target, layout_of
from .names import added_paths, all_names, named_parameters, plain_name, shape_of

# Parameters of bitsandbytes: quantised codes, which may be stored as floats.
_PACKED = ("Params4bit", "Int8Params")


def find_targets(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    adapters: str | None = None,
) -> list[Target]:
    """The tensors to prune, in the model's order; tied ones once.

    By default: weights of Linear, Conv1D, Conv1d and Conv2d, and of other modules with a weight of `(out_features,
    in_features)`, inside a repeated stack of layers, and the 3-D weights of experts and of attention (XLNet) there;
    what is left out, and why, is in `left_out_of`. With `adapters="sparse_adapters"`, the matrices of PEFT's adapters
    instead.
    `targets` replaces this choice with regular expressions that must match a whole parameter name; a 1-D parameter is
    selected only by an expression that is its name. `exclude` removes what such expressions match. A tied parameter is
    matched by each of its names.

    Raises TargetError if an expression is no regular expression or matches no parameter of the model, if `adapters` is
    given and the model has none, or if all candidates are quantised.
    """
    if adapters is not None and not adapter_modules(model):
        raise TargetError("adapters", f"{adapters!r} requires a model with PEFT adapters, got one without")
    layouts = _layouts(model)
    parameters = dict(named_parameters(model))
    names = all_names(model)
    known = [name for of_one in names.values() for name in of_one]
    check_expressions("targets", targets or (), known)
    check_expressions("exclude", exclude, known)
    if targets is not None:
        chosen = {
            name
            for name, parameter in parameters.items()
            if parameter.is_floating_point() and _is_selected(targets, names[name], shape_of(parameter))
        }
    elif adapters == "sparse_adapters":
        chosen = _adapter_names(model)
    else:
        chosen = {name for name, reason in _candidates(model).items() if reason is None}
    if not chosen and is_quantized(model):
        raise TargetError(
            f"{type(model).__name__}: expected floating-point weights, got quantised ones, whose codes cannot be "
            "ranked and set to zero; load the model without quantization_config, or prune the adapters alone "
            "(adapters='sparse_adapters')"
        )
    found = [
        Target(name, shape_of(parameter), layouts.get(name, "flat"), names[name][1:])
        for name, parameter in parameters.items()
        if name in chosen
    ]
    return [target for target in found if not any(map(target.matches, exclude))]


def targets_named(model: nn.Module, names: Collection[str]) -> list[Target]:
    """The tensors with these names, in the model's order."""
    layouts, aliases = _layouts(model), all_names(model)
    return [
        Target(name, shape_of(parameter), layouts.get(name, "flat"), aliases[name][1:])
        for name, parameter in named_parameters(model)
        if name in names
    ]


def check_expressions(field: str, expressions: Sequence[str], names: Sequence[str] | dict) -> None:
    """Raise TargetError for an expression that does not compile or matches none of the names."""
    for expression in expressions:
        try:
            matcher = re.compile(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise TargetError(field, f"{shown(expression)} is not a regular expression: {error}") from error
        if not any(matcher.fullmatch(name) for name in names):
            near = _nearest_name(expression.replace("\\", "").replace(".*", ""), names)
            hint = f"; the nearest is {near!r}" if near else ""
            raise TargetError(
                field,
                f"{shown(expression)} matches no parameter name of the model{hint} "
                "(expressions must match the whole name, as with re.fullmatch)",
            )


def _nearest_name(plain: str, names: Sequence[str] | dict) -> str | None:
    """The first name that contains the text; else the one with the longest common start; else the most similar."""
    containing = next((name for name in names if plain and plain in name), None)
    if containing is not None:
        return containing
    alike = [name for name in names if name.startswith(plain[:3])] if len(plain) >= 3 else []
    if alike:
        return max(alike, key=lambda name: _letters_in_common(plain, name))
    return next(iter(difflib.get_close_matches(plain, list(names), n=1, cutoff=0.0)), None)


def _letters_in_common(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(second)))


def _is_selected(expressions: Sequence[str], names: Sequence[str], shape: tuple[int, ...]) -> bool:
    if len(shape) < 2:
        return any(expression.replace("\\", "") in names for expression in expressions)
    return any(re.fullmatch(expression, name) for expression in expressions for name in names)


def _layouts(model: nn.Module) -> dict[str, str]:
    """The layout of every parameter, by the module that owns it."""
    added = added_paths(model)
    layouts = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            layouts[plain_name(parameter_name, added)] = layout_of(module, len(shape_of(parameter)))
    return layouts


FROZEN = "frozen"


def left_out_of(model: nn.Module) -> dict[str, str]:
    """The weights of layers that are not pruned by default -> the reason."""
    return {name: reason for name, reason in _candidates(model).items() if reason is not None}


def _candidates(model: nn.Module) -> dict[str, str | None]:
    """The weights of layers that could be pruned -> why they are left out by default, or None.

    A frozen weight is left out if others are trained; not in a model with PEFT adapters, whose base PEFT has frozen.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    of_adapters = adapter_modules(model)
    places = ((head_modules(model), "task head"), (router_modules(model), "router"))
    stacked = stacked_modules(model)
    some_are_trained = not of_adapters and any(parameter.requires_grad for parameter in model.parameters())
    added = added_paths(model)
    found: dict[str, str | None] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if id(module) in of_adapters or not _is_weight(module, parameter_name, shape_of(parameter)):
                continue
            reason = next((words for modules, words in places if id(module) in modules), None)
            if reason is None and id(module) not in stacked:
                reason = "outside the repeated layers"
            elif reason is None and id(parameter) in embeddings:
                reason = "shared with an embedding"
            elif reason is None and (not parameter.is_floating_point() or type(parameter).__name__ in _PACKED):
                reason = "quantised"
            elif reason is None and some_are_trained and not parameter.requires_grad:
                reason = FROZEN
            found[plain_name(parameter_name, added)] = reason
    return found


def _is_weight(module: nn.Module, name: str, shape: tuple[int, ...]) -> bool:
    """Whether a module's own parameter is the weight of a layer, of experts, or of attention with heads (XLNet)."""
    if name.rpartition(".")[2] == "weight" and is_layer(module):
        return True
    if len(shape) != 3:
        return False
    return is_experts(module) or shape == tuple(getattr(module, side, None) for side in ("d_model", "n_head", "d_head"))


def refuse_reparametrised(model: nn.Module) -> None:
    """Raise TargetError for a module with a tensor that is computed from others, such as a layer with weight norm.

    It would be left out, and the model would be saved under names that `from_pretrained` does not know. Modules that
    the model's own class makes so are accepted, and left out. Of models that `from_pretrained` does not open, only
    modules in the repeated stack are refused. The same for a part of a model that is wrapped by `torch.compile`.
    """
    stacked = stacked_modules(model)
    found: dict[str, tuple[str, str]] = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] == "_orig_mod" and "." in path:
            raise TargetError(
                f"{path.removesuffix('._orig_mod')}: is wrapped by torch.compile, which changes the names of the saved "
                "tensors; call module.compile() on it instead, or train with torch_compile=True"
            )
        how = how_to_undo(module) if id(module) in stacked or isinstance(model, PreTrainedModel) else None
        if how is not None:
            found[path] = how
    of_the_class = _made_by_the_class(model) if found else set()
    for path, (tensor, call) in found.items():
        if path not in of_the_class:
            raise TargetError(
                f"{path}.{tensor}: expected a weight of its own, got one that is computed from other tensors, under "
                f"whose names it would be saved; call {call} first"
            )


def _made_by_the_class(model: nn.Module) -> set[str]:
    """The modules with tensors that are computed from others, in a new model of the same class and configuration."""
    if not isinstance(model, PreTrainedModel):
        return set()
    try:
        with torch.device("meta"):
            modules = dict(type(model)(model.config).named_modules())
    except (AttributeError, RuntimeError, TypeError, ValueError):  # a class that needs more than a configuration
        modules = dict(model.named_modules())
    return {path for path, module in modules.items() if how_to_undo(module) is not None}


def _adapter_names(model: nn.Module) -> set[str]:
    """The names of the trainable matrices of PEFT adapters."""
    added = added_paths(model)
    inside = adapter_modules(model)
    return {
        plain_name(name, added)
        for path, module in model.named_modules()
        if id(module) in inside
        for name, parameter in module.named_parameters(prefix=path, recurse=False)
        if parameter.requires_grad and len(shape_of(parameter)) >= 2
    }
