"""Which tensors of a model may be pruned, found by what they are and never by a model's name."""

import difflib
import re
from collections.abc import Sequence

from torch import nn

from ..errors import TargetError
from .anatomy import (
    adapter_modules,
    head_modules,
    is_experts,
    is_layer,
    is_quantized,
    router_modules,
    stacked_modules,
)
from .layouts import Target, layout_of
from .names import added_paths, named_parameters, plain_name, shape_of

# Parameters of bitsandbytes: codes, which may be stored as floats.
_PACKED = ("Params4bit", "Int8Params")


def find_targets(
    model: nn.Module,
    targets: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    adapters: str | None = None,
) -> list[Target]:
    """The tensors to prune, in the model's order, a tied one once.

    By default: weights of Linear, Conv1D, Conv1d and Conv2d, and of other modules with a weight of `(out_features,
    in_features)`, inside a repeated stack of layers, and the 3-D weights of expert modules there; not task heads,
    routers or adapters, nor weights that are shared with an embedding, parametrised or quantised. With
    `adapters="sparse_adapters"`, the matrices of PEFT's adapters instead.
    `targets` replaces that by regular expressions that must match a whole parameter name; a 1-D parameter is taken only
    by an expression that is its name. `exclude` subtracts by the same kind of expressions.

    Raises TargetError for an expression that is no regular expression or matches no parameter of the model, for a way
    to treat adapters where the model has none, and where all that could be pruned is quantised.
    """
    if adapters is not None and not adapter_modules(model):
        raise TargetError("adapters", f"expected a model with adapters of PEFT for {adapters!r}, got one without")
    layouts = _layouts(model)
    parameters = dict(named_parameters(model))
    shapes = {name: shape_of(parameter) for name, parameter in parameters.items()}
    check_expressions("targets", targets or (), shapes)
    check_expressions("exclude", exclude, shapes)
    if targets is None:
        chosen = _adapter_names(model) if adapters == "sparse_adapters" else _default_names(model)
    else:
        floating = {name for name, parameter in parameters.items() if parameter.is_floating_point()}
        chosen = {
            name
            for name, shape in shapes.items()
            if name in floating and any(_selects(expression, name, shape) for expression in targets)
        }
    if not chosen and is_quantized(model):
        raise TargetError(
            f"{type(model).__name__}: expected floating-point weights, got quantised ones, whose codes cannot be "
            "ranked and set to zero; load the model without quantization_config, or prune the adapters alone "
            "(adapters='sparse_adapters')"
        )
    return [
        Target(name, shape, layouts.get(name, "flat"))
        for name, shape in shapes.items()
        if name in chosen and not any(re.fullmatch(expression, name) for expression in exclude)
    ]


def check_expressions(field: str, expressions: Sequence[str], names: Sequence[str] | dict) -> None:
    """Raise TargetError for an expression that does not compile or matches none of the names."""
    for expression in expressions:
        try:
            matcher = re.compile(expression)
        except re.error as error:
            raise TargetError(field, f"{expression!r} is not a regular expression: {error}") from error
        if not any(matcher.fullmatch(name) for name in names):
            near = _nearest_name(expression.replace("\\", "").replace(".*", ""), names)
            hint = f"; the nearest is {near!r}" if near else ""
            raise TargetError(
                field,
                f"{expression!r} matches no whole parameter name of the model{hint} "
                "(expressions are matched with re.fullmatch)",
            )


def _nearest_name(plain: str, names: Sequence[str] | dict) -> str | None:
    """The first name that contains the text, or else that begins most like it, or else that is most like it at all."""
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


def _selects(expression: str, name: str, shape: tuple[int, ...]) -> bool:
    if len(shape) < 2 and expression.replace("\\", "") != name:
        return False
    return re.fullmatch(expression, name) is not None


def _layouts(model: nn.Module) -> dict[str, str]:
    """The layout of every parameter, by the module that owns it."""
    added = added_paths(model)
    layouts = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            layouts[plain_name(parameter_name, added)] = layout_of(module, len(shape_of(parameter)))
    return layouts


def _default_names(model: nn.Module) -> set[str]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    left_alone = router_modules(model) | adapter_modules(model) | head_modules(model)
    candidates = stacked_modules(model) - left_alone
    added = added_paths(model)
    names = set()
    for module_name, module in model.named_modules():
        if id(module) not in candidates:
            continue
        for parameter_name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            own_name = parameter_name.rsplit(".", 1)[-1]
            is_weight = own_name == "weight" and is_layer(module)
            is_expert_weight = is_experts(module) and len(shape_of(parameter)) == 3
            is_plain = parameter.is_floating_point() and type(parameter).__name__ not in _PACKED
            if (is_weight or is_expert_weight) and is_plain and id(parameter) not in embeddings:
                names.add(plain_name(parameter_name, added))
    return names


def _adapter_names(model: nn.Module) -> set[str]:
    """The trained matrices of PEFT's adapters."""
    added = added_paths(model)
    inside = adapter_modules(model)
    return {
        plain_name(name, added)
        for path, module in model.named_modules()
        if id(module) in inside
        for name, parameter in module.named_parameters(prefix=path, recurse=False)
        if parameter.requires_grad and len(shape_of(parameter)) >= 2
    }
