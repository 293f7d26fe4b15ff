"""Which shard of a tensor this process holds, from the placements of torch's DTensor."""

import math
from dataclasses import dataclass

import torch.distributed.checkpoint
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..errors import PlacementError
from .processes import rank
from .regions import Region, whole


@dataclass(frozen=True)
class Holding:
    """How this process holds a tensor.

    `region` is its shard; `sharded` whether processes hold different shards; `counted` whether this process is the one
    of those with this shard that counts it; `peers` are the ranks, with this one, that together hold the
    tensor once. `kind` describes the placement of the tensor, equal on all processes.
    """

    region: Region
    sharded: bool
    counted: bool
    peers: tuple[int, ...]
    kind: str


def reshard(model: nn.Module) -> None:
    """Free the gathered weights that FSDP2 may have kept from a forward pass without a backward pass.

    Until then `named_parameters` has some whole tensors among the shards, and the next forward pass ignores what is
    written into the shards. Every process must call it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_shared(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor: sharded or replicated over processes by torch."""
    return isinstance(tensor, DTensor)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory: a DTensor's local tensor, or the tensor itself."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor


def holding_of(name: str, tensor: torch.Tensor) -> Holding:
    """How this process holds a tensor. Raises PlacementError, naming the tensor, if its placement is not supported."""
    if not isinstance(tensor, DTensor):
        return Holding(whole(tensor.shape), sharded=False, counted=rank() == 0, peers=(rank(),), kind="whole")
    mesh = tensor.device_mesh
    coordinates = mesh.get_coordinate()
    if coordinates is None:
        raise PlacementError(
            f"{name}: expected every process to hold a shard of the tensor, but rank {rank()} is not in its mesh"
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
            f"{name}: expected a shard of the shape {tuple(size)} for the placements {tensor.placements}, got "
            f"{local_shape}; this way of sharding is not supported"
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
    """The mesh dimensions that shard a tensor, in the order in which they do.

    FSDP over tensor parallelism on the same dimension is marked `_StridedShard`: it follows the inner mesh dimensions.
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
