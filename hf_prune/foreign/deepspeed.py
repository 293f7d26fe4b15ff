"""Undocumented names of DeepSpeed, most of them attributes of parameters. Used only when DeepSpeed trains."""

from collections.abc import Iterable
from typing import Any

from .entry import Foreign, attribute, find, find_in

_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_FRAGMENT = "deepspeed.utils.tensor_fragment"
_UNTIL = "when DeepSpeed's public functions tell which part of a parameter a process holds"
_MOMENTS = "find the moments of biases and norms under stages 1 and 2"
_UNTIL_LINKED = "when DeepSpeed links the moments of all groups of parameters"

NAMES: dict[str, Foreign] = {
    "ZeroParamStatus": Foreign(f"{_PARTITION}:ZeroParamStatus", "know whether a parameter is gathered", _UNTIL),
    "ZeROOptimizer": Foreign(
        "deepspeed.runtime.base_optimizer:ZeROOptimizer",
        "detect training with ZeRO",
        "when an optimizer says so",
    ),
    "lazy_init_hp_params_optimizer_state": Foreign(
        "deepspeed.utils:lazy_init_hp_params_optimizer_state", _MOMENTS, _UNTIL_LINKED
    ),
}


def __getattr__(name: str) -> Any:
    return find_in(NAMES, __name__, name)


# What parameters have under stage 3, under stages 1 and 2, and, where they are trained, under stage 3.
OF_STAGE_THREE: dict[str, Foreign] = {
    name: Foreign(f"{_PARTITION}:Parameter.{name}", "find the shard of a parameter that a process holds", _UNTIL)
    for name in ("ds_id", "ds_tensor", "ds_numel", "ds_shape", "ds_status", "partition")
}
MASTER_OF_TWO = Foreign(f"{_FRAGMENT}:Parameter._hp_mapping", "find the master weights of stages 1 and 2", _UNTIL)
MOMENTS_OF_TWO = Foreign(f"{_FRAGMENT}:tensor_fragment.optim_fragment", _MOMENTS, _UNTIL_LINKED)
GROUPS_OF_TWO = tuple(
    Foreign(f"deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.{name}", _MOMENTS, _UNTIL_LINKED)
    for name in ("bit16_groups", "single_partition_of_fp32_groups")
)
MASTER_OF_THREE = Foreign(f"{_FRAGMENT}:Parameter._z3_optimizer", "find the master weights of stage 3", _UNTIL)


def is_of_stage_three(parameter: Any) -> bool:
    """Whether DeepSpeed's stage 3 has sharded a parameter."""
    return hasattr(parameter, "ds_id")


def has_master_of_two(parameter: Any) -> bool:
    """Whether DeepSpeed's stage 1 or 2 trains a parameter through master weights."""
    return hasattr(parameter, "_hp_mapping")


def has_master_of_three(parameter: Any) -> bool:
    """Whether DeepSpeed's stage 3 trains a parameter through master weights."""
    return bool(parameter.requires_grad) and hasattr(parameter, "_z3_optimizer")


def link_moments_of_two(parameter: Any, key: str, zero: Any) -> None:
    """Make a moment of a parameter under stages 1 and 2 known to DeepSpeed's public functions.

    DeepSpeed (0.19.8) links moments to parameters right after the first step of its first group of parameters, when the
    other groups (biases and norms) have none yet. `zero` is its unwrapped optimizer.
    """
    mapping = attribute(parameter, MASTER_OF_TWO)
    if mapping is None or key in (attribute(mapping, MOMENTS_OF_TWO) or ()):  # None: another process has it
        return
    link = find(NAMES["lazy_init_hp_params_optimizer_state"])
    for parameters, partition in zip(*(attribute(zero, entry) for entry in GROUPS_OF_TWO), strict=True):
        link(parameters, partition, zero.optimizer.state)


def check_parameters(parameters: Iterable[Any], optimizer: Any) -> None:
    """Check the attributes that DeepSpeed has set on a model's parameters, given its unwrapped optimizer.

    Raises IncompatibleVersionError if ZeRO trains the parameters and the attributes are missing.
    """
    parameters = list(parameters)
    for parameter in filter(is_of_stage_three, parameters):
        for entry in OF_STAGE_THREE.values():
            attribute(parameter, entry)
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained or not isinstance(optimizer, find(NAMES["ZeROOptimizer"])):
        return
    if not any(has_master_of_two(parameter) or has_master_of_three(parameter) for parameter in trained):
        attribute(trained[0], MASTER_OF_THREE if is_of_stage_three(trained[0]) else MASTER_OF_TWO)
