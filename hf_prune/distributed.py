"""Processes that train one model together: what each holds of a tensor, and the few collectives that pruning needs.

The only file that imports `torch.distributed`. All collectives are on the group of all processes, so every process must
make the same calls in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from .regions import Region, whole


class PlacementError(ValueError):
    """A tensor is spread over processes in a way that cannot be pruned."""


@dataclass(frozen=True)
class Holding:
    """How this process holds a tensor.

    `region` is its part; `sharded` whether parts differ between processes; `counted` whether this process is the first
    of those that hold this part, the one that counts it; `peers` are the ranks that hold the tensor once together, this
    process among them. `kind` says how the tensor is spread over processes, the same on each of them.
    """

    region: Region
    sharded: bool
    counted: bool
    peers: tuple[int, ...]
    kind: str


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def reshard(model: nn.Module) -> None:
    """Let go of the whole weights that FSDP2 may have kept from a forward pass without a backward pass.

    Until then `named_parameters` has some whole tensors among the parts, and what is written into the parts does not
    reach the next forward pass. Every process must call it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether each process holds a part of a tensor, or a copy that torch knows of."""
    return isinstance(tensor, DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, sharing its memory: a DTensor's local tensor, any other tensor itself."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def holding_of(name: str, tensor: torch.Tensor) -> Holding:
    """How this process holds a tensor. Raises PlacementError, naming it, for a placement that is not supported."""
    if not isinstance(tensor, DTensor):
        return Holding(whole(tensor.shape), sharded=False, counted=rank() == 0, peers=(rank(),), kind="whole")
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        raise PlacementError(
            f"{name}: expected a tensor of which every process holds a part, this one is not in its mesh"
        )
    start, size = [0] * tensor.ndim, list(tensor.shape)
    for mesh_dim in _sharding_order(name, tensor):
        dim, parts = tensor.placements[mesh_dim].dim, mesh.size(mesh_dim)  # type: ignore[attr-defined]
        a_part = math.ceil(size[dim] / parts)
        first = min(coordinates[mesh_dim] * a_part, size[dim])
        start[dim] += first
        size[dim] = min(a_part, size[dim] - first)
    local_shape = tuple(local_part(tensor).shape)
    if local_shape != tuple(size):
        raise PlacementError(
            f"{name}: expected a part of the shape {tuple(size)} for the placements {tensor.placements}, got "
            f"{local_shape}: it is sharded in a way that is not known here"
        )
    replicas = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
    peers = mesh.mesh[tuple(coordinates[dim] if dim in replicas else slice(None) for dim in range(mesh.ndim))]
    first_replica = all(coordinates[dim] == 0 for dim in replicas) and bool((mesh.mesh == 0).any())
    return Holding(
        region=Region(tuple(tensor.shape), tuple(start), tuple(size)),
        sharded=len(replicas) < mesh.ndim,
        counted=first_replica,
        peers=tuple(peers.flatten().tolist()),
        kind=f"{mesh.mesh.tolist()} {tensor.placements}",
    )


def _sharding_order(name: str, tensor: DTensor) -> list[int]:
    """The dimensions of the mesh that shard a tensor, in the order in which they do.

    FSDP over tensor parallelism on the same dimension is marked `_StridedShard`: it comes after what lies inside it.
    """
    plain, strided = [], []
    for mesh_dim, placement in enumerate(tensor.placements):
        if type(placement) is Shard:
            plain.append(mesh_dim)
        elif type(placement).__name__ == "_StridedShard":
            inside = [
                other
                for other in range(mesh_dim + 1, tensor.device_mesh.ndim)
                if getattr(tensor.placements[other], "dim", None) == placement.dim  # type: ignore[attr-defined]
            ]
            if placement.split_factor != math.prod(tensor.device_mesh.size(other) for other in inside):  # type: ignore[attr-defined]
                raise PlacementError(f"{name}: the placements {tensor.placements} are not supported")
            strided.append(mesh_dim)
        elif not isinstance(placement, Replicate):
            raise PlacementError(
                f"{name}: expected a tensor that is replicated or sharded, got the placements {tensor.placements}"
            )
    return plain + strided[::-1]


# ---- Collectives ----


def total(counts: torch.Tensor) -> torch.Tensor:
    """The sum of the counts (int64), or of other numbers, of all processes, the same on each."""
    if processes() == 1:
        return counts
    summed = counts.to(_device(), copy=True)
    torch.distributed.all_reduce(summed)
    return summed.to(counts.device)


def gather(values: torch.Tensor) -> list[torch.Tensor]:
    """The values (of one shape everywhere) of every process, in the order of ranks."""
    if processes() == 1:
        return [values]
    sent = values.to(_device())
    received = [torch.empty_like(sent) for _ in range(processes())]
    torch.distributed.all_gather(received, sent)
    return [one.to(values.device) for one in received]


def exchange(rows: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """Send the first `sizes[0]` rows to process 0, the next to process 1, and so on.

    Returns the rows that were sent here, in the order of ranks, and how many came from each.
    """
    if processes() == 1:
        return rows, list(sizes)
    expected = torch.empty(len(sizes), dtype=torch.int64, device=_device())
    torch.distributed.all_to_all_single(expected, torch.tensor(sizes, dtype=torch.int64, device=_device()))
    came = expected.tolist()
    received = torch.empty((sum(came), *rows.shape[1:]), dtype=rows.dtype, device=_device())
    torch.distributed.all_to_all_single(received, rows.to(_device()).contiguous(), came, list(sizes))
    return received.to(rows.device), came


def wait_for_all() -> None:
    """Return when every process has come here."""
    if processes() > 1:
        total(torch.zeros(1, dtype=torch.int64))


def _device() -> torch.device:
    """Where tensors must be that go over the wire."""
    if "gloo" in torch.distributed.get_backend():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return (
        torch.device("cpu")
        if accelerator is None
        else torch.device(accelerator.type, torch.accelerator.current_device_index())
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
