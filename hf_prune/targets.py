"""Which tensors of a model may be pruned, found by what they are and never by a model's name."""

import difflib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)

# Modules that torch puts around others, which do not appear in what is saved.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})

# Parameters of bitsandbytes: codes, which may be stored as floats.
_PACKED = ("Params4bit", "Int8Params")

# What is pruned of a model with adapters of PEFT.
ADAPTER_WAYS = ("sparse_base", "sparse_merge", "sparse_adapters")

LAYOUTS = ("matrix", "transposed", "convolution", "experts", "experts_transposed", "flat")


class TargetError(ValueError):
    """Expressions or tensors that a configuration names and the model cannot serve."""


@dataclass(frozen=True)
class Target:
    """A tensor to prune: its parameter name, its shape, and how its dimensions are to be read.

    `layout` is `matrix` (out, in), `transposed` (in, out: Conv1D of GPT-2), `convolution` (out, in, kernel...),
    `experts` (expert, out, in), `experts_transposed` (expert, in, out), or `flat` (no input dimension is known).
    """

    name: str
    shape: tuple[int, ...]
    layout: str

    @property
    def weights(self) -> int:
        """How many weights the tensor has."""
        return math.prod(self.shape)

    @property
    def sides(self) -> tuple[int, ...]:
        """The sides of one matrix or convolution: experts are separate matrices."""
        return self.shape[1:] if self.layout.startswith("experts") else self.shape

    @property
    def matrices(self) -> tuple[int, int, int]:
        """The shape (batch, out, in) of `as_matrices`."""
        batch, rows, columns = as_matrices(torch.empty(self.shape, device="meta"), self.layout).shape
        return batch, rows, columns


def as_matrices(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The tensor as a stack of matrices (batch, out, in), a view wherever possible.

    A convolution gives one (out, in) matrix for each kernel position. A `flat` tensor is one row.
    """
    if layout == "matrix":
        return tensor.unsqueeze(0)
    if layout == "transposed":
        return tensor.t().unsqueeze(0)
    if layout == "convolution":
        return tensor.flatten(2).permute(2, 0, 1)
    if layout == "experts":
        return tensor
    if layout == "experts_transposed":
        return tensor.transpose(1, 2)
    return tensor.reshape(1, 1, -1)


def from_matrices(matrices: torch.Tensor, layout: str, shape: Sequence[int]) -> torch.Tensor:
    """The inverse of `as_matrices`: a contiguous tensor of the given shape."""
    if layout == "transposed":
        matrices = matrices.transpose(1, 2)
    elif layout == "convolution":
        matrices = matrices.permute(1, 2, 0)
    elif layout == "experts_transposed":
        matrices = matrices.transpose(1, 2)
    return matrices.reshape(tuple(shape)).contiguous()


def named_modules_of(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The module that owns each of these parameters, by the parameter's name."""
    added = _added_paths(model)
    owners = {}
    for module_name, module in model.named_modules():
        for own_name, _ in module.named_parameters(prefix=module_name, recurse=False):
            name = _plain_name(own_name, added)
            if name in names:
                owners[name] = module
    return owners


def tuner_layers(model: nn.Module, names: Collection[str]) -> dict[str, BaseTunerLayer]:
    """The layer of PEFT over each of these parameters that lies under one, by the parameter's name."""
    added = _added_paths(model)
    layers: dict[str, BaseTunerLayer] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for own_name, _ in module.get_base_layer().named_parameters(prefix=path, recurse=False):
                name = _plain_name(own_name, added)
                if name in names:
                    layers.setdefault(name, module)
    return layers


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter, also where DeepSpeed's stage 3 has left no more than a placeholder."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by the names they have in what is saved of the plain model.

    That is without what compiling, activation checkpointing and PEFT add: `base_model.model.q.base_layer.weight` is
    `q.weight`.
    """
    added = _added_paths(model)
    for name, parameter in model.named_parameters():
        yield _plain_name(name, added), parameter


def _added_paths(model: nn.Module) -> set[str]:
    """The paths of modules that only lie around others, or under PEFT's: the last part of each does not count."""
    added = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if path.rpartition(".")[2] in _WRAPPERS:
            added.add(path)
        if isinstance(module, PeftModel) and isinstance(module.base_model, BaseTuner):
            added.update((f"{prefix}base_model", f"{prefix}base_model.model"))
        if isinstance(module, BaseTunerLayer):
            added.add(f"{prefix}base_layer")
    return added


def _plain_name(name: str, added: Collection[str]) -> str:
    parts = name.split(".")
    return ".".join(part for index, part in enumerate(parts) if ".".join(parts[: index + 1]) not in added)


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
    if adapters is not None and not _adapter_modules(model):
        raise TargetError(f"adapters: expected a model with adapters of PEFT for {adapters!r}, got one without")
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
    if not chosen and _is_quantized(model):
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
            raise TargetError(f"{field}: {expression!r} is not a regular expression: {error}") from error
        if not any(matcher.fullmatch(name) for name in names):
            near = _nearest_name(expression.replace("\\", "").replace(".*", ""), names)
            hint = f"; the nearest is {near!r}" if near else ""
            raise TargetError(
                f"{field}: {expression!r} matches no whole parameter name of the model{hint} "
                "(expressions are matched with re.fullmatch)"
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
    """The layout of every parameter whose input dimension is known, by the module that owns it."""
    added = _added_paths(model)
    layouts = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            dims = len(shape_of(parameter))
            if isinstance(module, Conv1D) and dims == 2:
                layout = "transposed"
            elif isinstance(module, _CONVOLUTIONS) and dims in (3, 4):
                layout = "convolution"
            elif _is_experts(module) and dims == 3:
                layout = "experts_transposed" if getattr(module, "is_transposed", False) else "experts"
            elif dims == 2:
                layout = "matrix"
            else:
                layout = "flat"
            layouts[_plain_name(parameter_name, added)] = layout
    return layouts


def _default_names(model: nn.Module) -> set[str]:
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    left_alone = _routers(model) | _adapter_modules(model) | _head_modules(model)
    candidates = _stacked_modules(model) - left_alone
    added = _added_paths(model)
    names = set()
    for module_name, module in model.named_modules():
        if id(module) not in candidates:
            continue
        for parameter_name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            own_name = parameter_name.rsplit(".", 1)[-1]
            is_weight = own_name == "weight" and _is_layer(module)
            is_expert_weight = _is_experts(module) and len(shape_of(parameter)) == 3
            is_plain = parameter.is_floating_point() and type(parameter).__name__ not in _PACKED
            if (is_weight or is_expert_weight) and is_plain and id(parameter) not in embeddings:
                names.add(_plain_name(parameter_name, added))
    return names


def _adapter_names(model: nn.Module) -> set[str]:
    """The trained matrices of PEFT's adapters."""
    added = _added_paths(model)
    inside = _adapter_modules(model)
    return {
        _plain_name(name, added)
        for path, module in model.named_modules()
        if id(module) in inside
        for name, parameter in module.named_parameters(prefix=path, recurse=False)
        if parameter.requires_grad and len(shape_of(parameter)) >= 2
    }


def _is_quantized(model: nn.Module) -> bool:
    return any(getattr(module, "is_quantized", False) for module in model.modules())


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or convolution, by its class or by what its weight looks like."""
    if isinstance(module, (nn.Linear, Conv1D, *_CONVOLUTIONS)):
        return True
    return _has_weight_of(module, "out_features", "in_features")


def _is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts: transformers marks most such classes; or by what its weight looks like."""
    if isinstance(getattr(module, "is_transposed", None), bool) and hasattr(module, "has_gate"):
        return True
    return _has_weight_of(module, "num_experts", "output_size", "input_size")


def _has_weight_of(module: nn.Module, *sides: str) -> bool:
    """Whether a module's weight has the sides that its attributes of these names say."""
    weight = module._parameters.get("weight")
    return weight is not None and tuple(shape_of(weight)) == tuple(getattr(module, side, None) for side in sides)


def _is_stack(module: nn.Module) -> bool:
    """A ModuleList of modules with parts of their own, or a Sequential of two or more of one class."""
    children = list(module.children())
    if not children or not all(any(True for _ in child.children()) for child in children):
        return False
    if isinstance(module, nn.ModuleList):
        return True
    return isinstance(module, nn.Sequential) and len(children) > 1 and len({type(child) for child in children}) == 1


def layer_classes(model: nn.Module) -> list[str]:
    """The names of the classes of a model's repeated layers: the outermost, where stacks lie in one another."""
    return sorted({type(layer).__name__ for layer in _outermost_layers(model)})


def _outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_stack(module) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_layers(child)


def _stacked_modules(model: nn.Module) -> set[int]:
    """The ids of all modules inside a repeated stack of layers."""
    inside: set[int] = set()
    for module in model.modules():
        if _is_stack(module):
            inside.update(id(part) for child in module.children() for part in child.modules())
    return inside


def _routers(model: nn.Module) -> set[int]:
    """Linear modules beside experts with one output an expert, or a single one: they choose, they do not compute."""
    routers = set()
    for parent in model.modules():
        experts = {id(child): number for child in parent.children() if (number := _number_of_experts(child))}
        for child in parent.children():
            if id(child) in experts:
                continue
            linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
            if experts and len(linears) == 1 and linears[0].out_features in (*experts.values(), 1):
                routers.add(id(linears[0]))
    return routers


def _number_of_experts(module: nn.Module) -> int:
    """How many experts a module holds, fused into 3-D weights or as alike modules; 0 if it holds none."""
    own = [] if isinstance(module, _CONVOLUTIONS) else list(module.parameters(recurse=False))
    fused = [shape_of(parameter)[0] for parameter in own if len(shape_of(parameter)) == 3]
    if fused:
        return fused[0]
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    alike = len({type(child) for child in children}) == 1
    return len(children) if alike and len(children) > 1 else 0


def _head_modules(model: nn.Module) -> set[int]:
    """The ids of modules outside the base model of a transformers model with a task head."""
    whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is None or whole.base_model is whole:
        return set()
    base = {id(module) for module in whole.base_model.modules()}
    return {id(module) for module in whole.modules()} - base


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT has put adapters on a model, so that it is saved without the weights under them."""
    return any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in model.modules())


def _adapter_modules(model: nn.Module) -> set[int]:
    """The ids of modules that PEFT has put around base layers: all parts of a tuner layer but its base layer."""

    def parts(layer: nn.Module) -> Iterator[nn.Module]:
        for name, child in layer.named_children():
            if name != "base_layer":
                yield from child.modules()

    return {id(part) for layer in model.modules() if isinstance(layer, BaseTunerLayer) for part in parts(layer)}
