"""Processes that `accelerate launch` or `torchrun` started together: what was asked for, and whether it came so."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from accelerate import DistributedType
from torch import nn

from ..errors import LaunchError
from ..model.anatomy import layer_classes
from .choose import no_stage_error
from .launched import wants_deepspeed, wants_fsdp

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

_WRAPPED_LAYERS = "FSDP_TRANSFORMER_CLS_TO_WRAP"


def check_sharding(args: "TrainingArguments") -> None:
    """Raise LaunchError where FSDP was asked for and a Trainer with these arguments would shard nothing."""
    state = args.distributed_state
    on_cpu = state is None or state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU)
    if on_cpu and wants_fsdp(args):
        raise LaunchError(
            f"expected accelerators and a launcher for FSDP, got {args.world_size} process(es) on {args.device.type}, "
            "where FSDP shards nothing; launch on GPUs without use_cpu, or with recipes/accelerate/ddp.yaml"
        )


def check_engine(trainer: "Trainer") -> None:
    """Raise LaunchError where FSDP2 or DeepSpeed was asked for and does not train; PlacementError for stage 0."""
    if wants_fsdp(trainer.args) and not trainer.accelerator.is_fsdp2:
        raise LaunchError(
            "fsdp_version",
            "expected 2, for version 1 keeps weights in flat pieces that cannot be pruned, got "
            f"{os.environ.get('FSDP_VERSION', 'another')}; set it in the file of accelerate launch",
        )
    if wants_deepspeed(trainer.args) and not trainer.is_deepspeed_enabled:
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
