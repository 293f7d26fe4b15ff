"""Parameters by the names they have in what is saved of the plain model."""

from collections.abc import Collection, Iterator

import torch
from peft import PeftModel
from torch import nn

from ..foreign.peft import BaseTuner, BaseTunerLayer

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
    """The layer of PEFT over each of these parameters that lies under one, by the parameter's name."""
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
    """The shape of a whole parameter, also where DeepSpeed's stage 3 has left no more than a placeholder."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a model by the names they have in what is saved of the plain model.

    That is without what compiling, activation checkpointing and PEFT add: `base_model.model.q.base_layer.weight` is
    `q.weight`.
    """
    added = added_paths(model)
    for name, parameter in model.named_parameters():
        yield plain_name(name, added), parameter


def added_paths(model: nn.Module) -> set[str]:
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


def plain_name(name: str, added: Collection[str]) -> str:
    """A parameter name without the parts that only wrap other modules; see `added_paths`."""
    parts = name.split(".")
    return ".".join(part for index, part in enumerate(parts) if ".".join(parts[: index + 1]) not in added)


def plain_model(model: nn.Module) -> nn.Module:
    """The model that adapters were put on, or the model."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
