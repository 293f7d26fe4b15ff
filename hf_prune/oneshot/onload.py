"""A model computed on another device than its weights are on: each module's are copied there while it is computed."""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from ..config.calibration import CalibrationConfig
from ..errors import CalibrationError
from ..foreign.torch import changes_arguments
from ..model.devices import why_not_device, why_not_name


def device_of(model: PreTrainedModel, calibration: CalibrationConfig) -> torch.device | None:
    """Where a model is computed while its weights stay where they are; None: there.

    Raises CalibrationError for what is no name of a device.
    """
    if calibration.device is None:
        return None
    problem = why_not_name(calibration.device)
    if problem is not None:
        raise CalibrationError("device", problem)
    device = torch.device(calibration.device)
    here = model.device
    return None if device.type == here.type and device.index in (None, here.index) else device


def check_device(model: PreTrainedModel, calibration: CalibrationConfig) -> None:
    """Raise CalibrationError for a device that torch cannot compute on, or with weights that are on another one."""
    if calibration.device is None:
        return
    problem = why_not_device(calibration.device)
    if problem is None and device_of(model, calibration) is not None and model.device.type != "cpu":
        problem = f"expected a model on the CPU, or on {calibration.device}, got one on {model.device}"
    if problem is not None:
        raise CalibrationError("device", problem)


def computed(model: PreTrainedModel, calibration: CalibrationConfig) -> AbstractContextManager[Any]:
    """A context in which calls of a model, with inputs on any device, are computed where a calibration computes it."""
    device = device_of(model, calibration)
    return nullcontext() if device is None else Onload(model, device)


class Onload:
    """While it is entered, calls of a model are computed on a device; its weights stay where they are.

    The parameters and buffers of a module have their memory on the device while the module's own `forward` runs, and
    that of before when it has ended, also by an error. So they can be read and set between two calls as ever. What
    `forward` writes into them is lost. Those that are used without a call of their module are copied for the operation
    that reads them. Inputs of the model, or of a part that is called by itself, are copied to the device, and outputs
    stay there. Kernels that torch knows nothing of get the weights of modules that are not called where these stay.

    Args:
        model: the model, with all of its weights on one device.
        device: where it is computed. Weights are copied there even if that is where they are.
        apart: calls the function that copies weights; such as outside of modes that see the model's operations.

    Attributes:
        most: the most bytes of parameters and buffers that were on the device at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        apart: Callable[[Callable[[], torch.Tensor]], torch.Tensor] = lambda function: function(),
    ):
        self._model = model
        self._device = device
        self._apart = apart
        self._inside: dict[int, _Inside] = {}  # by the tensor's id
        self._at_home = WeakIdKeyDictionary()  # the storages that parameters and buffers have where they stay
        self._held: dict[tuple[Any, ...], torch.Tensor] | None = None
        self._is_copying = False
        self._thread = threading.local()
        self._bytes = 0
        self.most = 0

    def __enter__(self) -> "Onload":
        self._devices = {id(tensor): tensor.device for tensor in (*self._model.parameters(), *self._model.buffers())}
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            self._at_home[tensor.untyped_storage()] = None
        self._forwards = [(module, module.__dict__.get("forward")) for module in self._model.modules()]
        for module, _ in self._forwards:
            module.forward = self._around(module)
        return self

    def __exit__(self, *error: object) -> None:
        for module, own in self._forwards:
            del module.__dict__["forward"]
            if own is not None:
                module.forward = own
        home = self._model.device
        for tensor in (*self._model.parameters(), *self._model.buffers()):  # buffers that `forward` has made anew
            if tensor.device != self._devices.get(id(tensor), home):
                tensor.data = tensor.data.to(home)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep all copies that are made until it ends, for calls that use the same weights, which do not change."""
        self._held = {}
        try:
            yield
        finally:
            self._held = None

    def set(self, parameter: nn.Parameter, write: Callable[[], None]) -> None:
        """Change a parameter with a function, where its weights stay, and on the device if they are there, too."""
        inside = self._inside.get(id(parameter))
        on_device = parameter.data
        if inside is not None:
            parameter.data = inside.home
        write()
        self._at_home[parameter.untyped_storage()] = None
        if inside is None:
            return
        is_in_place = parameter.data_ptr() == inside.home.data_ptr()
        inside.home, parameter.data = parameter.data, on_device
        if is_in_place:
            write()
        else:
            on_device.copy_(inside.home)

    def _around(self, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @functools.wraps(forward)
        def on_device(*arguments: Any, **options: Any) -> Any:
            with ExitStack() as stack:
                if not getattr(self._thread, "is_reading", False):
                    arguments, options = tree_map_only(torch.Tensor, self._moved, (arguments, options))
                    stack.enter_context(self._reading())
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    stack.enter_context(self._there(tensor))
                return forward(*arguments, **options)

        return on_device

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """In the outermost call of a module in a thread: operations get copies on the device."""
        self._thread.is_reading = True
        try:
            with _Reading(self, self._device):
                yield
        finally:
            self._thread.is_reading = False

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device)

    @contextmanager
    def _there(self, tensor: torch.Tensor) -> Iterator[None]:
        """A parameter or buffer on the device, unless another call has it there already."""
        inside = self._inside.get(id(tensor))
        if inside is None:
            home = tensor.data
            tensor.data = self.copy_of(home)
            inside = self._inside[id(tensor)] = _Inside(home)
        inside.calls += 1
        try:
            yield
        finally:
            inside.calls -= 1
            if inside.calls == 0:
                del self._inside[id(tensor)]
                tensor.data = inside.home

    def is_at_home(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a parameter or buffer, or a part of one, where these stay, and is to be copied."""
        return not self._is_copying and tensor.untyped_storage() in self._at_home

    def copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that is at home, on the device."""
        storage = tensor.untyped_storage()
        key = (id(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if self._held is not None and key in self._held:
            return self._held[key]
        self._at_home[storage] = None
        self._is_copying = True
        try:
            copy = self._apart(functools.partial(tensor.to, self._device, copy=True))
        finally:
            self._is_copying = False
        self._bytes += copy.nbytes
        self.most = max(self.most, self._bytes)
        weakref.finalize(copy.untyped_storage(), self._freed, copy.nbytes)
        if self._held is not None:
            self._held[key] = copy
        return copy

    def changed(self) -> None:
        """Something at home has changed: make its copies anew."""
        if self._held is not None:
            self._held = {}

    def _freed(self, size: int) -> None:
        self._bytes -= size


class _Inside:
    """A parameter or buffer that is on the device: what it was before, and how many unfinished calls use it."""

    def __init__(self, home: torch.Tensor):
        self.home = home
        self.calls = 0


class _Reading(TorchDispatchMode):
    """Gives operations copies on the device of what is at home, and of tensors that `forward` has made elsewhere."""

    def __init__(self, onload: Onload, device: torch.device):
        super().__init__()
        self._onload = onload
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        # What an operation changes stays what it is.
        changed = args[:1] if changes_arguments(func) else ()
        if changed and isinstance(changed[0], torch.Tensor) and self._onload.is_at_home(changed[0]):
            self._onload.changed()
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, self._there, (args[len(changed) :], kwargs))
        places = {one.device.type for one in tree_leaves((changed, args, kwargs)) if _is_placed(one)}
        if len(places) > 1 and self._device.type in places:
            args, kwargs = tree_map_only(torch.Tensor, self._moved, (args, kwargs))
        return func(*changed, *args, **kwargs)

    def _there(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._onload.copy_of(tensor) if self._onload.is_at_home(tensor) else tensor

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device) if _is_placed(tensor) else tensor


def _is_placed(value: Any) -> bool:
    """Whether a value is a tensor that must be where others are; numbers need not."""
    return isinstance(value, torch.Tensor) and value.dim() > 0
