"""DeepSpeed's ZeRO stages as engines: their float32 master weights are ranked and masked."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import PlacementError
from ..foreign.deepspeed import has_master_of_three, has_master_of_two, is_of_stage_three, link_moments_of_two
from .engine import Edit, Engine
from .holdings import Holding
from .optimizers import base_optimizer, zero_masked
from .processes import processes, rank
from .regions import flat_range


class ZeroTwo(Engine):
    """DeepSpeed's stages 1 and 2: every process has whole parameters, and a shard of the master weights.

    For a mask update DeepSpeed gathers the master weights, one tensor at a time. Gradients are masked before they are
    reduced, so that masked ones do not count in the clip norm.
    """

    steps_in_backward = True
    reaches_moments = False

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole parameter as it is trained: its master weights, or the parameter itself if it is frozen."""
        from deepspeed.utils import safe_get_full_fp32_param

        if not has_master_of_two(parameter):
            return parameter.detach()
        return safe_get_full_fp32_param(parameter).view(parameter.shape)

    @torch.no_grad()
    def mask_weight(self, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Set masked weights to zero, in the parameter and in its master weights."""
        from deepspeed.utils import safe_set_full_fp32_param

        zero_masked(parameter.detach(), mask, positions)
        if has_master_of_two(parameter):
            master = self.weight(parameter)
            zero_masked(master, mask, positions)
            safe_set_full_fp32_param(parameter, master)

    @torch.no_grad()
    def write_weight(self, parameter: nn.Parameter, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Set the weights to new values, and to zero where they are masked, in the parameter and in its master weights.

        Values that the parameter's type cannot have are rounded in the parameter, but not in its master weights.
        """
        from deepspeed.utils import safe_set_full_fp32_param

        values = values.detach().float().reshape(parameter.shape).clone()
        zero_masked(values, mask.view_as(values))
        parameter.detach().copy_(values)
        if has_master_of_two(parameter):
            safe_set_full_fp32_param(parameter, values)

    @torch.no_grad()
    def mask_moments(
        self, optimizer: Any, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> None:
        """Zero what the optimizer remembers of masked weights."""
        from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state

        if has_master_of_two(parameter):
            for key in _moments(optimizer):
                link_moments_of_two(parameter, key, optimizer.optimizer)
                moment = safe_get_full_optimizer_state(parameter, key).view(parameter.shape)
                zero_masked(moment, mask, positions)
                safe_set_full_optimizer_state(parameter, moment, key)

    def trained_by(self, optimizer: Any, parameters: Iterable[nn.Parameter]) -> set[torch.Tensor]:
        """Which of the parameters are trained; DeepSpeed's optimizer has them all."""
        return {parameter for parameter in parameters if parameter.requires_grad}

    def hook_gradients(self, parameters: Mapping[str, nn.Parameter], edit: Edit, optimizer: Any) -> Iterator[Any]:
        """Edit the gradient of each micro-batch before DeepSpeed reduces it."""
        zero = optimizer.optimizer

        def hook_for(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
            @torch.no_grad()
            def edit_gradient(gradient: torch.Tensor) -> torch.Tensor:
                gradient = gradient.clone(memory_format=torch.contiguous_format)
                edit(name, gradient, _loss_scale(zero))
                return gradient

            return edit_gradient

        for name, parameter in parameters.items():
            if parameter.requires_grad:
                yield parameter.register_hook(hook_for(name))


class ZeroThree(ZeroTwo):
    """DeepSpeed's stage 3: each process has a range of every flattened parameter and of its master weights.

    Gradients are masked after they are reduced, right before DeepSpeed's step computes their norm and clips them.
    """

    def holding(self, name: str, parameter: nn.Parameter) -> Holding:
        """The range of the flattened parameter that this process holds."""
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            raise PlacementError(
                f"{name}: zero_hpz_partition_size must be 1 for pruning, as DeepSpeed otherwise keeps a second copy of "
                "each shard, which pruning cannot change"
            )
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        region = flat_range(parameter.ds_numel, rank() * size, size)  # type: ignore[attr-defined]
        return Holding(region, sharded=True, counted=True, peers=tuple(range(processes())), kind="range")

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is sharded over processes."""
        return is_of_stage_three(tensor)

    def part(self, tensor: torch.Tensor) -> torch.Tensor:
        """This process's shard of a tensor, as forward passes see it; a parameter's is flat, without padding."""
        return _valid(tensor, tensor.ds_tensor.detach()) if self.shares(tensor) else tensor.detach()  # type: ignore[attr-defined]

    def weight(self, parameter: nn.Parameter) -> torch.Tensor:
        """This process's range of a parameter as it is trained: of its master weights, or of itself if it is frozen."""
        from deepspeed.utils import safe_get_local_fp32_param

        if not has_master_of_three(parameter):
            return self.part(parameter)
        return _valid(parameter, safe_get_local_fp32_param(parameter))

    @torch.no_grad()
    def mask_weight(self, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None) -> None:
        """Set masked weights to zero, in this process's range of the parameter and of its master weights."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        from ..foreign.deepspeed import ZeroParamStatus

        zero_masked(self.part(parameter), mask, positions)
        if has_master_of_three(parameter):
            master = safe_get_local_fp32_param(parameter)
            zero_masked(_valid(parameter, master), mask, positions)
            safe_set_local_fp32_param(parameter, master)
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]  # it is gathered, and would be used unmasked

    @torch.no_grad()
    def write_weight(self, parameter: nn.Parameter, values: torch.Tensor, mask: torch.Tensor) -> None:
        """Set the weights of this process's range to new values (flat), and to zero where they are masked."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        part = self.part(parameter)
        part.copy_(values.view_as(part))
        if has_master_of_three(parameter):
            master = safe_get_local_fp32_param(parameter)
            valid = _valid(parameter, master)
            valid.copy_(values.view_as(valid))
            safe_set_local_fp32_param(parameter, master)
        self.mask_weight(parameter, mask)

    @torch.no_grad()
    def mask_moments(
        self, optimizer: Any, parameter: nn.Parameter, mask: torch.Tensor, positions: torch.Tensor | None = None
    ) -> None:
        """Zero what the optimizer remembers of masked weights."""
        from deepspeed.utils import safe_get_local_optimizer_state, safe_set_local_optimizer_state

        if has_master_of_three(parameter):
            for key in _moments(optimizer):
                moment = safe_get_local_optimizer_state(parameter, key)
                zero_masked(_valid(parameter, moment), mask, positions)
                safe_set_local_optimizer_state(parameter, moment, key)

    def hook_gradients(self, parameters: Mapping[str, nn.Parameter], edit: Edit, optimizer: Any) -> Iterator[Any]:
        """Edit the reduced gradients each time DeepSpeed is about to step."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        zero = optimizer.optimizer
        step = zero.step

        @torch.no_grad()
        def edit_gradients() -> None:
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    gradient = safe_get_local_grad(parameter)
                    edit(name, _valid(parameter, gradient), _loss_scale(zero))
                    safe_set_local_grad(parameter, gradient)

        def edited_step(*args: Any, **kwargs: Any) -> Any:
            edit_gradients()
            return step(*args, **kwargs)

        zero.step = edited_step
        yield _Restored(zero, step)


class _Restored:
    """A handle that restores the optimizer's own step when it is removed."""

    def __init__(self, optimizer: Any, step: Callable[..., Any]):
        self._optimizer, self._step = optimizer, step

    def remove(self) -> None:
        self._optimizer.step = self._step


def _loss_scale(zero: Any) -> float:
    """What DeepSpeed has multiplied the loss by: 1 except for fp16."""
    return float(getattr(zero, "loss_scale", 1.0))


def _valid(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A process's range of a parameter, without the padding at the end of the last range."""
    start = rank() * part.numel()
    return part.view(-1)[: max(min(parameter.ds_numel - start, part.numel()), 0)]  # type: ignore[attr-defined]


def _moments(optimizer: Any) -> list[str]:
    """The names of the states that DeepSpeed's optimizer keeps for each weight, once it has made a step."""
    states = base_optimizer(optimizer).state.values() if optimizer is not None else ()
    return list(dict.fromkeys(key for state in states for key, value in state.items() if _is_of_weights(value)))


def _is_of_weights(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0
