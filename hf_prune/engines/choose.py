"""Which engine trains a model, and a digest of its weights whatever holds them."""

import hashlib
from typing import Any

import torch
from torch import nn

from ..errors import PlacementError
from ..foreign.accelerate import DeepSpeedOptimizerWrapper
from ..foreign.deepspeed import check_parameters, has_master_of_two, is_of_stage_three
from ..model.adapters import MaskedDelta
from ..model.names import shape_of
from .deepspeed import ZeroThree, ZeroTwo
from .engine import Adapted, Engine
from .holdings import is_shared
from .processes import gather


def is_shared_model(model: torch.nn.Module) -> bool:
    """Whether processes hold parts of a model's weights (FSDP2, ZeRO-3)."""
    engine = engine_of(model)
    return any(engine.shares(parameter) for parameter in model.parameters())


def weights_digest(model: torch.nn.Module) -> str:
    """A digest of a model's weights and buffers that changes with any of them: of their bytes, one after another.

    Of a model that processes share (FSDP2, ZeRO-3), it is one of the digests of all their parts; every process must ask
    for it.
    """
    engine = engine_of(model)
    engine.prepare(model)
    digest = hashlib.sha256()
    weights = model.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        digest.update(f"{name} {tensor.dtype} {shape_of(tensor)}\n".encode())
        part = engine.part(tensor).cpu().reshape(-1).contiguous()
        digest.update(part.view(torch.uint8).numpy().data)
    if any(engine.shares(tensor) for tensor in weights.values()):
        parts = gather(torch.tensor(list(digest.digest()), dtype=torch.uint8))
        digest = hashlib.sha256(bytes(torch.cat(parts).tolist()))
    return digest.hexdigest()


def engine_of(model: nn.Module, optimizer: Any = None) -> Engine:
    """The engine that trains a model, as its parameters tell.

    Raises PlacementError for options of DeepSpeed that hide weights, for its stage 0, and where adapters that mask what
    they add are spread over processes.
    """
    parameters = list(model.parameters())
    if any(isinstance(module, MaskedDelta) for module in model.modules()):
        if any(is_shared(one) or is_of_stage_three(one) or has_master_of_two(one) for one in parameters):
            raise shared_merge_error()
        return Adapted(model)
    with_deepspeed = isinstance(optimizer, DeepSpeedOptimizerWrapper)
    if with_deepspeed:
        check_parameters(parameters, optimizer.optimizer)
    if any(is_of_stage_three(parameter) for parameter in parameters):
        return ZeroThree()
    if any(has_master_of_two(parameter) for parameter in parameters):
        if getattr(getattr(optimizer, "optimizer", None), "round_robin_gradients", False):
            raise PlacementError(
                "round_robin_gradients",
                "expected false, got true, with which DeepSpeed does not find its master weights",
            )
        return ZeroTwo()
    if with_deepspeed:
        raise no_stage_error()
    return Engine()


def shared_merge_error() -> PlacementError:
    """Why `sparse_merge` is refused where processes share weights."""
    return PlacementError(
        "adapters",
        "expected 'sparse_base' under FSDP or DeepSpeed, got 'sparse_merge', which needs each weight whole with what "
        "is added to it; or train with DDP",
    )


def no_stage_error() -> PlacementError:
    """Why DeepSpeed's stage 0 is refused."""
    return PlacementError(
        "zero_optimization.stage",
        "expected 1, 2 or 3 for pruning under DeepSpeed, got 0; without stages train with DDP "
        "(recipes/accelerate/ddp.yaml)",
    )
