"""Processes that `accelerate launch` or `torchrun` started together: what was asked for, and whether it came so."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import DistributedType
from torch import nn
from transformers import Trainer, TrainingArguments

from ..errors import LaunchError
from ..model.anatomy import layer_classes
from .choose import no_stage_error

_WRAPPED_LAYERS = "FSDP_TRANSFORMER_CLS_TO_WRAP"


def launched_processes() -> int:
    """How many processes the launcher started, whether or not they know of each other yet."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first_process() -> bool:
    """Whether this is the process, of those that were launched, that says and writes things."""
    return int(os.environ.get("RANK", 0)) == 0


def needs_cpu() -> bool:
    """Whether `TrainingArguments` must be told `use_cpu=True`: without, the processes would train each alone."""
    return launched_processes() > 1 and not torch.accelerator.is_available()


def deepspeed_precision() -> str | None:
    """The argument, `bf16` or `fp16`, that tells the Trainer what the launcher tells DeepSpeed, or None.

    Elsewhere the Trainer finds the launcher's mixed precision; with DeepSpeed it takes it for a contradiction.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return precision if _wants_deepspeed() and precision in ("bf16", "fp16") else None


def check_launch() -> None:
    """Raise LaunchError for what the launcher asks for and a recipe cannot be run with."""
    for asked, variable, setting in (
        (_wants_fsdp(), "FSDP_CPU_RAM_EFFICIENT_LOADING", "fsdp_cpu_ram_efficient_loading"),
        (_wants_deepspeed(), "ACCELERATE_DEEPSPEED_ZERO3_INIT", "zero3_init_flag"),
    ):
        if asked and _is_set(variable):
            raise LaunchError(
                setting,
                "expected false in the file of accelerate launch, got true, with which not every process "
                "has the weights to plan the pruning with",
            )


def check_processes(args: TrainingArguments) -> None:
    """Raise LaunchError where not all processes that were launched train together: each would train alone."""
    if args.world_size != launched_processes():
        raise LaunchError(
            f"expected {launched_processes()} processes that train together, as were launched (WORLD_SIZE), got "
            f"{args.world_size}, on {args.device}; set training.use_cpu=true where the machine has no accelerators "
            "that processes can talk over, or launch one process"
        )


def check_sharding(args: TrainingArguments) -> None:
    """Raise LaunchError where FSDP was asked for and a Trainer with these arguments would shard nothing."""
    state = args.distributed_state
    on_cpu = state is None or state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if on_cpu and _wants_fsdp(args):
        raise LaunchError(
            f"expected accelerators and a launcher for FSDP, got {args.world_size} process(es) on {args.device.type}, "
            "where FSDP shards nothing; launch on GPUs without use_cpu, or with recipes/accelerate/ddp.yaml"
        )


def check_engine(trainer: Trainer) -> None:
    """Raise LaunchError where FSDP2 or DeepSpeed was asked for and does not train; PlacementError for stage 0."""
    if _wants_fsdp(trainer.args) and not trainer.accelerator.is_fsdp2:
        raise LaunchError(
            "fsdp_version",
            "expected 2, for version 1 keeps weights in flat pieces that cannot be pruned, got "
            f"{os.environ.get('FSDP_VERSION', 'another')}; set it in the file of accelerate launch",
        )
    if _wants_deepspeed(trainer.args) and not trainer.is_deepspeed_enabled:
        raise LaunchError(
            "expected a model that DeepSpeed trains, as was asked for, got one that it does not, on "
            f"{trainer.args.device.type}; launch without use_cpu, or with recipes/accelerate/ddp.yaml"
        )
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 0:
            raise no_stage_error()
        mismatches = plugin.hf_ds_config.mismatches
        if mismatches:
            raise LaunchError(
                "expected a configuration of DeepSpeed that says what the recipe says, or auto, got "
                + ", ".join(mismatch.removeprefix("- ") for mismatch in mismatches)
            )


def _wants_fsdp(args: TrainingArguments | None = None) -> bool:
    return _is_set("ACCELERATE_USE_FSDP") or (args is not None and bool(args.fsdp))


def _wants_deepspeed(args: TrainingArguments | None = None) -> bool:
    return _is_set("ACCELERATE_USE_DEEPSPEED") or (args is not None and bool(args.deepspeed))


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")


@contextmanager
def wrapping_layers(model: nn.Module) -> Iterator[None]:
    """While a Trainer is made, FSDP shards by the model's repeated layers, unless the launcher names others.

    Without, accelerate takes the model's `_no_split_modules`: among those of BERT and others are the embeddings, with
    which training ends in an error.
    """
    classes = layer_classes(model)
    if not classes or os.environ.get(_WRAPPED_LAYERS):
        yield
        return
    os.environ[_WRAPPED_LAYERS] = ",".join(classes)
    try:
        yield
    finally:
        del os.environ[_WRAPPED_LAYERS]
