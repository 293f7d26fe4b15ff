"""Checkpoints that were written under FSDP, for training that goes on without."""

from pathlib import Path
from typing import Any

import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

# ---- Checkpoints of FSDP, for training that goes on without ----

_FSDP_MODEL = "pytorch_model_fsdp"

_FSDP_OPTIMIZER = "optimizer"


def is_fsdp_checkpoint(folder: Path) -> bool:
    """Whether accelerate wrote a checkpoint under FSDP, whole or in shards."""
    return (folder / f"{_FSDP_MODEL}.bin").is_file() or (folder / f"{_FSDP_MODEL}_0").is_dir()


def load_fsdp_model(model: nn.Module, folder: Path) -> None:
    """Load the weights of a checkpoint that was written under FSDP into a model that is not sharded."""
    state = {"model": get_model_state_dict(model)}
    _load(state, "model", folder, _FSDP_MODEL)
    set_model_state_dict(model, state["model"])


def load_fsdp_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load the optimizer's state from a checkpoint that was written under FSDP, for a model that is not sharded."""
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    _load(state, "optimizer", folder, _FSDP_OPTIMIZER)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def _load(state: dict[str, Any], key: str, folder: Path, name: str) -> None:
    """Fill `state[key]` from one file or from shards; each process by itself."""
    whole_file = folder / f"{name}.bin"
    if whole_file.is_file():
        state[key] = torch.load(whole_file, map_location="cpu", weights_only=True)
    else:
        torch.distributed.checkpoint.load(state, checkpoint_id=str(folder / f"{name}_0"), no_dist=True)
