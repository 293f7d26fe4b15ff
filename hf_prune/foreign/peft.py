"""Undocumented names of PEFT: classes of its layers, and the methods and attributes that are overridden or read."""

from collections.abc import Iterable
from typing import Any

from .entry import Foreign, attribute, check_method, find, find_in

_UNTIL = "when PEFT can mask the update of an adapter"
_PUBLIC = "when PEFT documents how to get a layer's base layer"


def _layer(path: str, why: str, until: str = _UNTIL) -> Foreign:
    return Foreign(f"peft.tuners.{path}", why, until)


NAMES: dict[str, Foreign] = {
    "BaseTuner": _layer("tuners_utils:BaseTuner", "recognise a model with adapters", _PUBLIC),
    "BaseTunerLayer": _layer("tuners_utils:BaseTunerLayer", "recognise a layer with adapters", _PUBLIC),
    "ModulesToSaveWrapper": Foreign(
        "peft.utils:ModulesToSaveWrapper", "name the modules that PEFT trains whole", "when PEFT can name them"
    ),
    "LoraLinear": _layer("lora:Linear", "mask the updates of LoRA"),
    "DoraLinearLayer": _layer("lora.dora:DoraLinearLayer", "mask the updates of DoRA"),
    "DoraLinearVariant": _layer("lora.variants:DoraLinearVariant", "recognise DoRA"),
    "VeraLinear": _layer("vera.layer:Linear", "mask the updates of VeRA"),
    "LoHaLinear": _layer("loha.layer:Linear", "mask the updates of LoHa"),
    "LoKrLinear": _layer("lokr.layer:Linear", "mask the updates of LoKr"),
    "HiraLayer": _layer("hira.layer:HiraLayer", "recognise adapters that keep zeros"),
    "IA3Layer": _layer("ia3.layer:IA3Layer", "recognise adapters that keep zeros"),
    "LNTuningLayer": _layer("ln_tuning.layer:LNTuningLayer", "recognise adapters that keep zeros"),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


# Methods of those classes that are overridden, with how they are called here.
OVERRIDDEN: tuple[Foreign, ...] = (
    Foreign("peft.tuners.lora:Linear.get_delta_weight", "mask the updates of LoRA", _UNTIL, "adapter"),
    Foreign(
        "peft.tuners.lora.dora:DoraLinearLayer.get_weight_norm",
        "mask the updates of DoRA",
        _UNTIL,
        "weight, lora_weight, scaling=",
    ),
    Foreign("peft.tuners.vera.layer:Linear.get_delta_weight", "mask the updates of VeRA", _UNTIL, "adapter"),
    Foreign("peft.tuners.loha.layer:Linear.get_delta_weight", "mask the updates of LoHa", _UNTIL, "adapter_name"),
    Foreign("peft.tuners.lokr.layer:Linear.get_delta_weight", "mask the updates of LoKr", _UNTIL, "adapter_name"),
)

# The attributes of every layer with adapters, and those of LoRA layers beyond them.
OF_LAYERS: tuple[Foreign, ...] = tuple(
    Foreign(f"peft.tuners.tuners_utils:BaseTunerLayer.{name}", "mask the updates of adapters", _UNTIL)
    for name in ("get_base_layer", "adapter_layer_names", "active_adapters", "disable_adapters", "merged")
)
OF_LORA: tuple[Foreign, ...] = tuple(
    Foreign(f"peft.tuners.lora:Linear.{name}", "mask the updates of LoRA and DoRA", _UNTIL)
    for name in ("lora_dropout", "lora_magnitude_vector", "lora_variant", "lora_bias", "fan_in_fan_out")
)


def check_layers(layers: Iterable[Any]) -> None:
    """Raise IncompatibleVersionError if the updates of the adapters in these layers cannot be masked."""
    for entry in OF_LAYERS:
        find(entry)
    for entry in OVERRIDDEN:
        check_method(entry, find(entry))
    of_lora = find(NAMES["LoraLinear"])
    for layer in layers:
        for entry in OF_LORA if isinstance(layer, of_lora) else ():
            attribute(layer, entry)
