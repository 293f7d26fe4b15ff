"""Whether the precision that a recipe asks for is fast on this machine."""

import torch

from .schema import Recipe

# The instructions of x86 processors that multiply in bfloat16.
_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def computes_in_bfloat16() -> bool:
    """Whether there is an accelerator, or the processor has instructions for bfloat16, or is not an x86 one."""
    capabilities = torch.cpu.get_capabilities()
    is_other = capabilities.get("architecture") != "x86_64"
    return torch.accelerator.is_available() or is_other or any(capabilities.get(name) for name in _INSTRUCTIONS)


def changes_to_float32(recipe: Recipe) -> list[str]:
    """The settings of a recipe that asks for bfloat16, `KEY=VALUE`, with which it computes in float32."""
    calibration = recipe.calibration or {}
    changes = {
        "training.bf16=false": bool(recipe.training.get("bf16")),
        "calibration.autocast=null": calibration.get("autocast") == "bfloat16",
    }
    return [change for change, is_asked in changes.items() if is_asked]


def slow_bfloat16(recipe: Recipe) -> str | None:
    """What to change in a recipe that asks for bfloat16 where it is slower than float32; None if it is not."""
    changes = changes_to_float32(recipe)
    if not changes or computes_in_bfloat16():
        return None
    return (
        "This processor has no instructions for bfloat16, which is several times slower on it than float32; "
        f"to compute in float32, add {' '.join(changes)}"
    )
