"""Which modules of a model are layers, stacks of layers, experts, routers, heads and adapters."""

from collections.abc import Iterator, Sequence

from peft import PeftModel
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..foreign.peft import BaseTunerLayer
from .names import added_paths, plain_name, shape_of

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model was loaded with quantised weights."""
    return any(getattr(module, "is_quantized", False) for module in model.modules())


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a convolution, by its class or the shape of its weight."""
    if isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS)):
        return True
    return _has_weight_of(module, "out_features", "in_features")


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts, by the attributes of transformers' classes or the shape of its weight."""
    if isinstance(getattr(module, "is_transposed", None), bool) and hasattr(module, "has_gate"):
        return True
    return _has_weight_of(module, "num_experts", "output_size", "input_size")


def _has_weight_of(module: nn.Module, *sides: str) -> bool:
    """Whether the shape of a module's weight is given by its attributes of these names."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and tuple(shape_of(weight)) == tuple(getattr(module, side, None) for side in sides)


def _is_stack(module: nn.Module) -> bool:
    """A ModuleList of modules that have children, or a Sequential of two or more such modules of one class."""
    children = list(module.children())
    if not children or not all(any(True for _ in child.children()) for child in children):
        return False
    if isinstance(module, nn.ModuleList):
        return True
    return isinstance(module, nn.Sequential) and len(children) > 1 and len({type(child) for child in children}) == 1


def layer_classes(model: nn.Module) -> list[str]:
    """The names of the classes of a model's repeated layers; of nested stacks, the outermost."""
    return sorted({type(layer).__name__ for layer in _outermost_layers(model)})


def _outermost_layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if _is_stack(module) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_layers(child)


def stacks(model: nn.Module) -> list[str]:
    """The paths of the repeated stacks of layers, nested ones too."""
    return [path for path, module in model.named_modules() if _is_stack(module)]


def blocks_of(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Name -> the path of the layer of the outermost repeated stack that it is in; empty outside of one."""
    added = added_paths(model)
    starts = sorted((f"{plain_name(path, added)}." for path in stacks(model)), key=len)
    blocks = {}
    for name in names:
        start = next((start for start in starts if name.startswith(start)), None)
        blocks[name] = "" if start is None else start + name.removeprefix(start).partition(".")[0]
    return blocks


def stacked_modules(model: nn.Module) -> set[int]:
    """The ids of all modules inside a repeated stack of layers."""
    inside: set[int] = set()
    for module in model.modules():
        if _is_stack(module):
            inside.update(id(part) for child in module.children() for part in child.modules())
    return inside


def how_to_undo(module: nn.Module) -> tuple[str, str] | None:
    """A tensor of a module that is computed from others, and the call that makes it a parameter again; or None."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    for name in sorted(names, reverse=True):  # a weight before a bias
        tensor, _, part = name.rpartition("_")
        if part == "orig" and tensor not in names and hasattr(module, tensor):
            pruned = hasattr(module, f"{tensor}_mask")
            return tensor, f"torch.nn.utils.{'prune.remove' if pruned else 'remove_spectral_norm'}(module, {tensor!r})"
        if part == "g" and f"{tensor}_v" in names and tensor not in names and hasattr(module, tensor):
            return tensor, f"torch.nn.utils.remove_weight_norm(module, {tensor!r})"
    if is_parametrized(module):
        tensor = max(getattr(module, "parametrizations", {}))
        return tensor, f"torch.nn.utils.parametrize.remove_parametrizations(module, {tensor!r})"
    return None


def router_modules(model: nn.Module) -> set[int]:
    """The ids of linear modules beside experts with one output per expert, or a single output: routers and gates."""
    return {id(router) for parent in model.modules() for router in _experts_and_routers(parent)[1]}


def expert_modules(model: nn.Module) -> set[int]:
    """The ids of the modules inside experts that have a router: a step may call only some of them."""
    routed = [experts for experts, routers in map(_experts_and_routers, model.modules()) if routers]
    return {id(part) for experts in routed for expert in experts for part in expert.modules()}


def _experts_and_routers(parent: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The children of a module that hold experts, and the linear modules beside them that are routers or gates."""
    numbers = {child: number for child in parent.children() if (number := _number_of_experts(child))}
    routers: list[nn.Module] = []
    for child in parent.children() if numbers else ():
        linears = [module for module in child.modules() if isinstance(module, nn.Linear)]
        if child not in numbers and len(linears) == 1 and linears[0].out_features in (*numbers.values(), 1):
            routers.append(linears[0])
    return list(numbers), routers


def _number_of_experts(module: nn.Module) -> int:
    """How many experts a module holds, fused into 3-D weights or as modules of one class; 0 if it holds none."""
    own = [] if isinstance(module, CONVOLUTIONS) else list(module.parameters(recurse=False))
    fused = [shape_of(parameter)[0] for parameter in own if len(shape_of(parameter)) == 3]
    if fused:
        return fused[0]
    children = [child for child in module.children() if any(True for _ in child.parameters())]
    alike = len({type(child) for child in children}) == 1
    return len(children) if alike and len(children) > 1 else 0


def head_modules(model: nn.Module) -> set[int]:
    """The ids of modules outside the base model of a transformers model with a task head."""
    whole = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if whole is None or whole.base_model is whole:
        return set()
    base = {id(module) for module in whole.base_model.modules()}
    return {id(module) for module in whole.modules()} - base


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has PEFT adapters; it is then saved without the weights under them."""
    return any(isinstance(module, (PeftModel, BaseTunerLayer)) for module in model.modules())


def adapter_modules(model: nn.Module) -> set[int]:
    """The ids of the modules that PEFT has added to base layers: all of a tuner layer except the base layer."""

    def parts(layer: nn.Module) -> Iterator[nn.Module]:
        for name, child in layer.named_children():
            if name != "base_layer":
                yield from child.modules()

    return {id(part) for layer in model.modules() if isinstance(layer, BaseTunerLayer) for part in parts(layer)}
