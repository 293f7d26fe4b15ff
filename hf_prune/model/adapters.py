"""Adapters of PEFT over sparse base weights: what they add is masked, so that merging keeps every zero.

The base weights under adapters are frozen, so a masked weight is one that is zero, and stays so. A layer that adds to
the weight, `W0 + BA`, is trained as `(W0 + BA) * M` with the mask `M` of the weights that are not zero: what is trained
is what is merged. Layers that scale the weight keep its zeros by themselves.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import nn
from torch.func import functional_call

from ..errors import MergeError, TargetError
from ..foreign.peft import (
    BaseTunerLayer,
    DoraLinearLayer,
    DoraLinearVariant,
    HiraLayer,
    IA3Layer,
    LNTuningLayer,
    LoHaLinear,
    LoKrLinear,
    LoraLinear,
    VeraLinear,
    check_layers,
)
from .names import named_parameters, tuner_layers

if TYPE_CHECKING:
    _Layer = Any  # a layer of PEFT
else:
    _Layer = object


class MaskedDelta(_Layer):
    """A tuner layer that adds to the weight, with the base weight's mask on what it adds.

    PEFT's own `merge`, `unmerge` and `disable_adapter` work on it, and keep the zeros.
    """

    def get_delta_weight(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What an adapter adds to the weight, as PEFT computes it, where the base weight is not zero."""
        delta = super().get_delta_weight(*args, **kwargs)
        return delta * (self.get_base_layer().weight != 0)

    def effective_weight(self) -> torch.Tensor:
        """The weight that merging the active adapters comes to, in the base weight's dtype; differentiable."""
        weight = self.get_base_layer().weight
        merged = weight
        for adapter in self._used_adapters():
            delta = self.get_delta_weight(adapter)
            merged = merged + delta
            if adapter in getattr(self, "lora_variant", ()):  # DoRA, the only variant that is let in
                merged = merged * self._dora_factor(adapter, weight, delta)
        return merged.to(weight.dtype)

    def _used_adapters(self) -> list[str]:
        """The active adapters that this layer has."""
        here: Collection[str] = getattr(self, self.adapter_layer_names[0]).keys()
        return [adapter for adapter in self.active_adapters if adapter in here]

    def _dora_factor(self, adapter: str, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """DoRA's magnitude over the norm of each output's weights, which gradients do not pass (arXiv 2402.09353)."""
        dora = self.lora_magnitude_vector[adapter]
        norm = dora.get_weight_norm(weight, delta.T if self.fan_in_fan_out else delta, scaling=1).detach()
        factor = (dora.weight / norm).unsqueeze(1)
        return factor.T if self.fan_in_fan_out else factor


class _MaskedDora(DoraLinearLayer):
    """DoRA's magnitudes, where an output whose weights are all masked has a norm of 1: it stays zero, and no NaN."""

    def get_weight_norm(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The norm of each output's weights."""
        norm = super().get_weight_norm(*args, **kwargs)
        return torch.where(norm == 0, torch.ones_like(norm), norm)


class _MaskedForward(MaskedDelta):
    """The same, for layers whose own forward pass never makes the weight that is added."""

    dropouts: str  # the attribute with each adapter's dropout

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer with the merged weight; with dropout, what is added sees the input with dropout, as in PEFT.

        Raises TargetError where each sample of a batch has an adapter of its own (`adapter_names`).
        """
        if kwargs.get("adapter_names") is not None:
            raise TargetError("adapter_names", "expected none with 'sparse_merge'; set one adapter for the whole batch")
        if self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        base = self.get_base_layer()
        merged = self.effective_weight()
        dropout = self._dropout()
        if dropout is None:
            return functional_call(base, {"weight": merged}, (x, *args), kwargs)
        added = {"weight": merged - base.weight}
        if getattr(base, "bias", None) is not None:
            added["bias"] = torch.zeros_like(base.bias)
        return base(x, *args, **kwargs) + functional_call(base, added, (dropout(x), *args), kwargs)

    def _dropout(self) -> nn.Module | None:
        """The adapter's dropout, where it does anything now."""
        of_adapters = [getattr(self, self.dropouts)[adapter] for adapter in self._used_adapters()]
        return next((one for one in of_adapters if self.training and getattr(one, "p", 0.0) > 0), None)


class MaskedLoraLinear(_MaskedForward, LoraLinear):
    """LoRA and DoRA over linear layers."""

    dropouts = "lora_dropout"


class MaskedVeraLinear(_MaskedForward, VeraLinear):
    """VeRA over linear layers."""

    dropouts = "vera_dropout"


class MaskedLoHaLinear(MaskedDelta, LoHaLinear):
    """LoHa over linear layers."""


class MaskedLoKrLinear(MaskedDelta, LoKrLinear):
    """LoKr over linear layers."""


# What adds to the weight -> the same with a mask.
_MASKED: dict[type, type] = {
    LoraLinear: MaskedLoraLinear,
    VeraLinear: MaskedVeraLinear,
    LoHaLinear: MaskedLoHaLinear,
    LoKrLinear: MaskedLoKrLinear,
}

# What scales the weight, or does not touch it.
_KEEPS_ZEROS = (IA3Layer, HiraLayer, LNTuningLayer)


def mask_additions(model: nn.Module, names: Collection[str]) -> None:
    """Have the adapters over these weights add nothing where the weight is zero. The state dict stays as it is.

    Raises TargetError, before anything is changed, for adapters of which that cannot be had, with what to use instead.
    """
    layers = tuner_layers(model, names)
    check_layers(layers.values())
    for name, layer in layers.items():
        why = _why_not_masked(layer)
        if why is not None:
            raise TargetError(
                "adapters",
                f"'sparse_merge' cannot be had of {name}, {why}; use LoRA, DoRA, LoHa, LoKr or VeRA over "
                "linear layers, or IA3 or HiRA, which only scale the weight, or prune with 'sparse_base' and keep the "
                "adapters apart",
            )
    for layer in layers.values():
        if type(layer) in _MASKED:
            layer.__class__ = _MASKED[type(layer)]
        for magnitudes in getattr(layer, "lora_magnitude_vector", {}).values():
            if isinstance(layer, MaskedDelta):
                magnitudes.__class__ = _MaskedDora


def _why_not_masked(layer: BaseTunerLayer) -> str | None:
    """Why what an adapter adds cannot be masked, or None if it can, or need not."""
    if isinstance(layer, (MaskedDelta, *_KEEPS_ZEROS)):
        return None
    if type(layer) not in _MASKED:
        kind = type(layer).__module__.split(".")[2] if type(layer).__module__.startswith("peft.tuners.") else "custom"
        return f"for {type(layer).__name__} of {kind} changes the weight in another way than adding to it or scaling it"
    if any(getattr(layer, "lora_bias", {}).values()):
        return "for it has lora_bias"
    variants = list(getattr(layer, "lora_variant", {}).values())
    if any(not isinstance(variant, DoraLinearVariant) for variant in variants):
        return f"for {type(variants[0]).__name__} is not LoRA or DoRA"
    if variants and len(layer.active_adapters) > 1:
        return "for several adapters are active, one of them DoRA"
    return None


def _check_mergeable(model: nn.Module, layers: Mapping[str, Any], zeros: Mapping[str, torch.Tensor]) -> None:
    """Raise MergeError for weights that several modules share, and where there is no zero to keep."""
    owners = Counter(id(one) for module in model.modules() for one in module.parameters(recurse=False))
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and owners[id(getattr(module.get_base_layer(), "weight", None))] > 1:
            raise MergeError(
                f"{name}: expected a weight of its own under the adapter, got one that another module has, too (a head "
                "tied to the embeddings), which merging would change; put no adapter on it"
            )
    adding = [name for name, layer in layers.items() if not isinstance(layer, _KEEPS_ZEROS)]
    if adding and not any(zeros[name].any() for name in adding):
        raise MergeError(
            "expected sparse weights under the adapters, found no zero; make them sparse again with "
            "hf_prune.load_masks(model, DIRECTORY) first, or merge dense ones with model.merge_and_unload()"
        )


def merge(model: nn.Module) -> nn.Module:
    """Merge the active adapters of PEFT into the weights under them, and make sure that every zero is still there.

    The model is changed and given back as a plain one, without PEFT: `save_pretrained` writes what `from_pretrained`
    opens. Adapters must have been trained with `adapters="sparse_merge"` (or see `load_masks`), or scale weights only.

    Raises MergeError, before anything is changed, if the model has no adapters over weights or no zeros under them, if
    merging would fill zeros, or if what is merged into one layer would be merged into another that shares its weight.
    """
    if not isinstance(model, PeftModel) or not hasattr(model, "merge_and_unload"):
        raise MergeError(
            f"expected a model with adapters of PEFT that change weights, such as LoRA, got {type(model).__name__}; "
            "adapters of other kinds cannot be merged"
        )
    zeros = {name: parameter == 0 for name, parameter in named_parameters(model)}
    layers = tuner_layers(model, zeros)
    _check_mergeable(model, layers, zeros)
    for name, layer in layers.items():
        filled = int(zeros[name].sum())
        if filled and not isinstance(layer, (MaskedDelta, *_KEEPS_ZEROS)):
            raise MergeError(
                f"{name}: merging would fill {filled:,} zeros with what the adapter adds; train with "
                "adapters='sparse_merge' (LoRA, DoRA, LoHa, LoKr or VeRA over linear layers), or keep the adapter "
                "apart from its sparse base (model.unload())"
            )
    merged = model.merge_and_unload(safe_merge=True)
    for name, parameter in named_parameters(merged):
        if name in layers:
            lost = int((parameter.detach()[zeros[name]] != 0).sum())
            if lost:
                raise MergeError(f"{name}: expected {int(zeros[name].sum()):,} zeros after merging, {lost:,} are lost")
            parameter.data.masked_fill_(zeros[name], 0)  # none is a negative zero
    return merged
