"""Whether training is distributed as `accelerate launch` or `torchrun` was asked to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate import DistributedType
from torch import nn

from ..errors import LaunchError
from ..model.anatomy import layer_classes
from .choose import NO_STAGE
from .launched import wants_deepspeed, wants_fsdp

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_WRAPPED_LAYERS = "FSDP_TRANSFORMER_CLS_TO_WRAP"


def check_sharding(args: "TrainingArguments") -> None:
    """Raise LaunchError if FSDP was requested and a Trainer with these arguments would shard nothing."""
    state = args.distributed_state
    on_cpu = state is None or state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if on_cpu and wants_fsdp(args):
        raise LaunchError(
            f"FSDP needs accelerators and a launcher, got {args.world_size} process(es) on {args.device.type}, "
            "where FSDP shards nothing; launch on GPUs without use_cpu, or with recipes/accelerate/ddp.yaml"
        )


def check_engine(trainer: "Trainer") -> None:
    """Raise LaunchError if FSDP2 or DeepSpeed was requested and is not used, and for DeepSpeed's stage 0."""
    if wants_fsdp(trainer.args) and not trainer.accelerator.is_fsdp2:
        raise LaunchError(
            "fsdp_version",
            f"expected 2, got {os.environ.get('FSDP_VERSION', 'another')}; version 1 flattens weights, which cannot be "
            "pruned then. Set fsdp_version: 2 in the configuration file of accelerate launch",
        )
    if wants_deepspeed(trainer.args) and not trainer.is_deepspeed_enabled:
        raise LaunchError(
            f"DeepSpeed was requested, but does not train the model on {trainer.args.device.type}; launch without "
            "use_cpu, or with recipes/accelerate/ddp.yaml"
        )
    if trainer.is_deepspeed_enabled:
        plugin = trainer.accelerator.state.deepspeed_plugin
        if plugin.zero_stage == 0:
            raise LaunchError(*NO_STAGE)
        mismatches = plugin.hf_ds_config.mismatches
        if mismatches:
            raise LaunchError(
                "expected a DeepSpeed configuration with the values of the training arguments, or auto, got "
                + ", ".join(mismatch.removeprefix("- ") for mismatch in mismatches)
            )


@contextmanager
def wrapping_layers(model: nn.Module) -> Iterator[None]:
    """While a Trainer is made, set FSDP to wrap the model's repeated layers, unless the launcher names others.

    Otherwise accelerate wraps the model's `_no_split_modules`: for BERT and others these include the embeddings, and
    training fails.
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
