"""What `accelerate launch` or `torchrun` asks for, as the environment tells; this file needs no torch."""

import os
from typing import TYPE_CHECKING

from ..errors import LaunchError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def launched_processes() -> int:
    """How many processes the launcher started, whether or not they know of each other yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the process, of those that were launched, that says and writes things."""
    return int(os.environ.get("RANK", 0)) == 0


def deepspeed_precision() -> str | None:
    """The argument, `bf16` or `fp16`, that tells the Trainer what the launcher tells DeepSpeed, or None.

    Elsewhere the Trainer finds the launcher's mixed precision; with DeepSpeed it takes it for a contradiction.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return precision if wants_deepspeed() and precision in ("bf16", "fp16") else None


def check_launch() -> None:
    """Raise LaunchError for what the launcher asks for and a recipe cannot be run with."""
    for asked, variable, setting in (
        (wants_fsdp(), "FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading"),
        (wants_deepspeed(), "ACCELERATE_DEEPSPEED_ZERO3_INIT", "zero3_init_flag"),
    ):
        if asked and _is_set(variable):
            raise LaunchError(
                setting,
                "expected false in the file of accelerate launch, got true, with which not every process "
                "has the weights to plan the pruning with",
            )


def check_processes(args: "TrainingArguments") -> None:
    """Raise LaunchError where not all processes that were launched train together: each would train alone."""
    if args.world_size != launched_processes():
        raise LaunchError(
            f"expected {launched_processes()} processes that train together, as were launched (WORLD_SIZE), got "
            f"{args.world_size}, on {args.device}; set training.use_cpu=true where the machine has no accelerators "
            "that processes can talk over, or launch one process"
        )


def wants_fsdp(args: "TrainingArguments | None" = None) -> bool:
    """Whether FSDP was asked for, of the launcher or in the arguments."""
    return _is_set("ACCELERATE_USE_FSDP") or (args is not None and bool(args.fsdp))


def wants_deepspeed(args: "TrainingArguments | None" = None) -> bool:
    """Whether DeepSpeed was asked for, of the launcher or in the arguments."""
    return _is_set("ACCELERATE_USE_DEEPSPEED") or (args is not None and bool(args.deepspeed))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
