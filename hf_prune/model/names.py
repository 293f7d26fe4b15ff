"""Parameter names as in the saved plain model, whatever wraps it."""

from collections.abc import Collection, Iterator

import torch
from peft import PeftModel
from torch import nn

from ..foreign.peft import BaseTuner, BaseTunerLayer, ModulesToSaveWrapper

# Modules that torch puts around others, which do not appear in what is saved.
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})


def named_modules_of(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The module that owns each of these parameters, by the parameter's name."""
    added = added_paths(model)
    owners = {}
    for module_name, module in model.named_modules():
        for own_name, _ in module.named_parameters(prefix=module_name, recurse=False):
            name = plain_name(own_name, added)
            if name in names:
                owners[name] = module
    return owners


def tuner_layers(model: nn.Module, names: Collection[str]) -> dict[str, BaseTunerLayer]:
    """The PEFT layer over each of these parameters that has one, by the parameter's name."""
    added = added_paths(model)
    layers: dict[str, BaseTunerLayer] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for own_name, _ in module.get_base_layer().named_parameters(prefix=path, recurse=False):
                name = plain_name(own_name, added)
                if name in names:
                    layers.setdefault(name, module)
    return layers


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter, also if DeepSpeed's stage 3 has put a placeholder in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model, with the names that they have in the saved plain model.

    These are without what compiling, activation checkpointing and PEFT add: `base_model.model.q.base_layer.weight` is
    `q.weight`.
    """
    added = added_paths(model)
    for name, parameter in model.named_parameters():
        yield plain_name(name, added), parameter


def all_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The names of each parameter by its first one: a tied parameter has several."""
    added = added_paths(model)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name, added))
    return {of_one[0]: tuple(of_one) for of_one in names.values()}


def every_name(model: nn.Module) -> list[str]:
    """The names of all parameters; of a tied one, each of its names."""
    return [name for of_one in all_names(model).values() for name in of_one]


def added_paths(model: nn.Module) -> set[str]:
    """The paths of modules that only wrap others or that PEFT wraps; the last component of each is in no plain name."""
    added = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if path.rpartition(".")[2] in _WRAPPERS:
            added.add(path)
        if isinstance(module, PeftModel) and isinstance(module.base_model, BaseTuner):
            added.update((f"{prefix}base_model", f"{prefix}base_model.model"))
        if isinstance(module, BaseTunerLayer):
            added.add(f"{prefix}base_layer")
        if isinstance(module, ModulesToSaveWrapper):
            trained = f"{prefix}modules_to_save"
            added.update((trained, *(f"{trained}.{adapter}" for adapter in module.active_adapters)))
    return added


def plain_name(name: str, added: Collection[str]) -> str:
    """A parameter name without the components of modules that only wrap others; see `added_paths`."""
    parts = name.split(".")
    return ".".join(part for index, part in enumerate(parts) if ".".join(parts[: index + 1]) not in added)


def plain_model(model: nn.Module) -> nn.Module:
    """The model under PEFT adapters, or the model itself if it has none."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
