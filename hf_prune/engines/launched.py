"""What `accelerate launch` or `torchrun` requests, from environment variables; this file imports no torch."""

import os
from typing import TYPE_CHECKING

from ..errors import LaunchError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def launched_processes() -> int:
    """The number of processes that the launcher started, whether or not they are connected yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is rank 0, the launched process that prints and writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def deepspeed_precision() -> str | None:
    """The training argument, `bf16` or `fp16`, for the mixed precision that the launcher gives DeepSpeed, or None.

    Without DeepSpeed the Trainer uses the launcher's setting; with it, the Trainer reports a contradiction.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return precision if wants_deepspeed() and precision in ("bf16", "fp16") else None


def check_launch() -> None:
    """Raise LaunchError for launcher settings that recipes do not support."""
    for asked, variable, setting in (
        (wants_fsdp(), "FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading"),
        (wants_deepspeed(), "ACCELERATE_DEEPSPEED_ZERO3_INIT", "zero3_init_flag"),
    ):
        if asked and _is_set(variable):
            raise LaunchError(
                setting,
                "expected false in the configuration file of accelerate launch, got true; every process needs the "
                "weights to plan the pruning",
            )


def check_processes(args: "TrainingArguments") -> None:
    """Raise LaunchError if the launched processes are not connected: each would train alone."""
    if args.world_size != launched_processes():
        raise LaunchError(
            f"expected {launched_processes()} processes to train together, as were launched (WORLD_SIZE), got "
            f"{args.world_size}, on {args.device}; set the training argument use_cpu if the machine has no "
            "accelerators through which processes can communicate, or launch one process"
        )


def wants_fsdp(args: "TrainingArguments | None" = None) -> bool:
    """Whether FSDP was requested, from the launcher or in the arguments."""
    return _is_set("ACCELERATE_USE_FSDP") or (args is not None and bool(args.fsdp))


def wants_deepspeed(args: "TrainingArguments | None" = None) -> bool:
    """Whether DeepSpeed was requested, from the launcher or in the arguments."""
    return _is_set("ACCELERATE_USE_DEEPSPEED") or (args is not None and bool(args.deepspeed))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
