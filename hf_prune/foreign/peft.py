"""What PEFT does not document: classes of its layers, and what those have that is overridden or read."""

from collections.abc import Iterable
from typing import Any

from .entry import Foreign, attribute, check_method, find, find_in

_UNTIL = "when PEFT can mask what an adapter adds"
_PUBLIC = "when PEFT documents how its layers tell what lies under them"


def _layer(path: str, why: str, until: str = _UNTIL) -> Foreign:
    return Foreign(f"peft.tuners.{path}", why, until)


NAMES: dict[str, Foreign] = {
    "BaseTuner": _layer("tuners_utils:BaseTuner", "know a model with adapters", _PUBLIC),
    "BaseTunerLayer": _layer("tuners_utils:BaseTunerLayer", "know a layer with adapters", _PUBLIC),
    "LoraLinear": _layer("lora:Linear", "mask what LoRA adds"),
    "DoraLinearLayer": _layer("lora.dora:DoraLinearLayer", "mask what DoRA adds"),
    "DoraLinearVariant": _layer("lora.variants:DoraLinearVariant", "know DoRA"),
    "VeraLinear": _layer("vera.layer:Linear", "mask what VeRA adds"),
    "LoHaLinear": _layer("loha.layer:Linear", "mask what LoHa adds"),
    "LoKrLinear": _layer("lokr.layer:Linear", "mask what LoKr adds"),
    "HiraLayer": _layer("hira.layer:HiraLayer", "know adapters that keep zeros"),
    "IA3Layer": _layer("ia3.layer:IA3Layer", "know adapters that keep zeros"),
    "LNTuningLayer": _layer("ln_tuning.layer:LNTuningLayer", "know adapters that keep zeros"),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


# Methods of those classes that are overridden, with how they are called here.
OVERRIDDEN: tuple[Foreign, ...] = (
    Foreign("peft.tuners.lora:Linear.get_delta_weight", "mask what LoRA adds", _UNTIL, "adapter"),
    Foreign(
        "peft.tuners.lora.dora:DoraLinearLayer.get_weight_norm",
        "mask what DoRA adds",
        _UNTIL,
        "weight, lora_weight, scaling=",
    ),
    Foreign("peft.tuners.vera.layer:Linear.get_delta_weight", "mask what VeRA adds", _UNTIL, "adapter"),
    Foreign("peft.tuners.loha.layer:Linear.get_delta_weight", "mask what LoHa adds", _UNTIL, "adapter_name"),
    Foreign("peft.tuners.lokr.layer:Linear.get_delta_weight", "mask what LoKr adds", _UNTIL, "adapter_name"),
)

# What every layer with adapters has by its class, and what a layer of LoRA has beyond that.
OF_LAYERS: tuple[Foreign, ...] = tuple(
    Foreign(f"peft.tuners.tuners_utils:BaseTunerLayer.{name}", "mask what adapters add", _UNTIL)
    for name in ("get_base_layer", "adapter_layer_names", "active_adapters", "disable_adapters", "merged")
)
OF_LORA: tuple[Foreign, ...] = tuple(
    Foreign(f"peft.tuners.lora:Linear.{name}", "mask what LoRA and DoRA add", _UNTIL)
    for name in ("lora_dropout", "lora_magnitude_vector", "lora_variant", "lora_bias", "fan_in_fan_out")
)


def check_layers(layers: Iterable[Any]) -> None:
    """Raise IncompatibleVersionError where what adapters add to the weights of these layers cannot be masked."""
    for entry in OF_LAYERS:
        find(entry)
    for entry in OVERRIDDEN:
        check_method(entry, find(entry))
    of_lora = find(NAMES["LoraLinear"])
    for layer in layers:
        for entry in OF_LORA if isinstance(layer, of_lora) else ():
            attribute(layer, entry)
