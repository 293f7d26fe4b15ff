"""Faster inference on CPUs where weights are zero: `sparse_inference`, and `dense`, which ends it.

Only the forward passes of layers are replaced, each where it was measured to be faster on this machine. Parameters,
module classes and the state dict stay as they are.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ArgumentError, first_line
from ..foreign.accelerate import forward_of
from ..structure.fields import MISFITS
from ..structure.latency import evaluating
from ..structure.timing import clock_of, time_in_turns
from .csr import csr_linear, to_csr, why_no_kernels

logger = logging.getLogger(__name__)

# Layers with fewer zeros are not timed: sparse products were slower in every one that was tried.
LEAST_SPARSITY = 0.6

# Rows (tokens of a batch) that layers are timed with where no example is given: a step of generation, and a text.
ROWS = (1, 128)

# How much faster a layer has to be: less is within the noise of the clock.
LEAST_SPEEDUP = 1.05

# Rounds of timing of a layer, and after which seconds no more begin; then the same of the whole model.
_ROUNDS, _SECONDS, _LEAST_ROUNDS = 20, 0.2, 3
_MODEL_ROUNDS, _MODEL_SECONDS = 10, 4.0


@dataclass(frozen=True)
class LayerSpeed:
    """What was measured of one layer.

    Attributes:
        name: the path of the layer in the model.
        sparsity: the share of zeros in its weight.
        ratios: rows of the input -> seconds of the dense product over seconds of the sparse one.
        used: whether its forward pass was replaced.
    """

    name: str
    sparsity: float
    ratios: dict[int, float]
    used: bool


@dataclass
class SparseInference:
    """What `sparse_inference` did. As a context manager, it ends with `dense` of the model.

    Attributes:
        model: the model.
        layers: the layers that were timed.
        speedup: seconds of the dense over those of the sparse forward pass of the whole model on the example; None
            without an example, or if no layer is faster.
        note: why no layer was replaced; None if one was.
    """

    model: nn.Module
    layers: list[LayerSpeed] = field(default_factory=list)
    speedup: float | None = None
    note: str | None = None

    def __enter__(self) -> "SparseInference":
        return self

    def __exit__(self, *_: object) -> None:
        dense(self.model)

    def __str__(self) -> str:
        lines = [
            f"{one.name}: {one.sparsity:.1%} zeros, "
            + ", ".join(f"{rows} {'row' if rows == 1 else 'rows'} {ratio:.2f}x" for rows, ratio in one.ratios.items())
            + ("" if one.used else " (dense)")
            for one in self.layers
        ]
        if self.speedup is not None:
            lines.append(f"the whole model: {self.speedup:.2f}x")
        return "\n".join([*lines, *filter(None, [self.note])])


def sparse_inference(model: nn.Module, example: Mapping[str, Any] | None = None) -> SparseInference:
    """Compute sparse layers of a model with sparse products from now on, each where that is faster on this CPU.

    Each Linear (and Conv1D) in float32 on the CPU with at least 60% zeros is timed in turns with its dense product. Its
    forward pass is replaced where the sparse product is faster by 5%. The weights as CSR are kept beside the dense
    ones: 8 bytes for each weight that is not zero. Outputs differ from the dense ones by rounding, as sums are made in
    another order.

    Inputs with other numbers of rows than those measured are computed sparsely if that was faster for the next smaller
    and the next larger number. Modules in training mode, inputs that gradients are recorded for, autocast, compilation
    and export use the dense product. So does a layer whose weight has changed since, if it has fewer zeros than when it
    was timed; otherwise the changed weight is used. Changes are noticed as autograd notices them: by optimizer steps,
    `load_state_dict`, assignments and in-place operations, but not by those through `.data`.

    Args:
        model: the model. It is evaluated, not trained, while this is in use.
        example: inputs of the model by name, such as a tokenizer gives. Layers are timed with the rows that they get in
            a forward pass of it, and with one; then the whole model is timed. Without it, with 1 and 128 rows.

    Returns:
        What was measured of each layer. `str` of it is a table. As a context manager, it switches the dense products
        on again at its end; so does `dense(model)`.

    Raises:
        ArgumentError: an argument has the wrong type, or the model does not run with the example.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("model", f"expected a model (torch.nn.Module), got {type(model).__name__}")
    if example is not None and not isinstance(example, Mapping):
        raise ArgumentError(
            "example", f"expected inputs by name, such as a tokenizer gives, got {type(example).__name__}"
        )
    dense(model)
    why = why_no_kernels()
    if why is not None:
        return SparseInference(model, note=f"Nothing was changed: {why}.")
    with evaluating(model):
        layers = dict(_sparse_layers(model))
        rows = dict.fromkeys(layers, ROWS) if example is None else _rows_of(model, layers, example)
        timed = {name: _time_layer(layer, rows[name]) for name, layer in layers.items() if rows[name]}
        found = [
            LayerSpeed(name, _share_of_zeros(layers[name]), ratios, any(_pays(ratio) for ratio in ratios.values()))
            for name, ratios in timed.items()
        ]
        forwards = [CsrForward(layers[one.name], one.ratios) for one in found if one.used]
        speedup = _time_model(model, forwards, example) if example is not None and forwards else None
    if not forwards:
        why = "no layer is faster" if found else "no Linear in float32 on the CPU has 60% zeros"
        return SparseInference(model, found, note=f"Nothing was changed: {why}.")
    if speedup is not None and not _pays(speedup):
        unused = [LayerSpeed(one.name, one.sparsity, one.ratios, used=False) for one in found]
        note = "Nothing was changed: single layers are faster, the whole model is not."
        return SparseInference(model, unused, speedup, note)
    _attach(forwards)
    return SparseInference(model, found, speedup)


def dense(model: nn.Module) -> nn.Module:
    """End `sparse_inference`: every layer of the model computes its dense product again. Returns the model."""
    for module in model.modules():
        if _is_sparse(module):
            del module.forward
    return model


class CsrForward:
    """The forward pass of one Linear or Conv1D with its weight in CSR, for the inputs for which that is faster.

    `forward` is set as that of the one module. A deep copy of the module gets a copy that belongs to it.

    Args:
        layer: the module.
        ratios: rows of the input -> how many times as fast the sparse product is.
    """

    def __init__(self, layer: nn.Module, ratios: Mapping[int, float]):
        self.layer = layer
        self.ratios = dict(sorted(ratios.items()))
        self._csr: torch.Tensor | None = to_csr(_matrix_of(layer))
        self._most = self._csr.values().numel()  # so many weights are not zero
        weight: Any = layer.weight
        self._weight, self._stamp = weight, _stamp_of(weight)
        self._has_told = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The output of the layer."""
        if self._is_fit(inputs):
            weight = self._current()
            if weight is not None:
                bias: Any = self.layer.bias
                return csr_linear(inputs, weight, bias)
        return type(self.layer).forward(self.layer, inputs)

    def __getstate__(self) -> dict[str, Any]:
        """What copies get: not the weight as CSR, which each makes of the weight that it has then."""
        return self.__dict__ | {"_csr": None, "_stamp": ()}

    def _is_fit(self, inputs: torch.Tensor) -> bool:
        weight: Any = self.layer.weight
        if self.layer.training or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if inputs.device.type != "cpu" or inputs.dtype != torch.float32 or type(weight) is not nn.Parameter:
            return False
        if torch.is_grad_enabled() and (inputs.requires_grad or weight.requires_grad):
            self._tell("gradients are recorded; call the model under torch.no_grad() or torch.inference_mode()")
            return False
        return self._is_faster(inputs.numel() // max(inputs.shape[-1], 1))

    def _is_faster(self, rows: int) -> bool:
        """Whether it was faster for the next smaller and the next larger number of rows."""
        smaller = [ratio for measured, ratio in self.ratios.items() if measured <= rows][-1:]
        larger = [ratio for measured, ratio in self.ratios.items() if measured >= rows][:1]
        return all(_pays(ratio) for ratio in (*smaller, *larger))

    def _current(self) -> torch.Tensor | None:
        """The weight in CSR as it is now; None if it cannot be, or has fewer zeros than when it was timed."""
        weight: Any = self.layer.weight
        if weight is not self._weight or _stamp_of(weight) != self._stamp:
            self._weight, self._stamp = weight, _stamp_of(weight)
            fits = _can_be_sparse(self.layer) and int(weight.count_nonzero()) <= self._most
            self._csr = to_csr(_matrix_of(self.layer)) if fits else None
        if self._csr is None:
            self._tell("a weight has changed, and has fewer zeros than when it was timed")
        return self._csr

    def _tell(self, why: str) -> None:
        if not self._has_told:
            logger.warning("A layer of sparse_inference computes its dense product: %s.", why)
            self._has_told = True


def _is_sparse(module: nn.Module) -> bool:
    """Whether the forward pass of a module is one of ours."""
    return isinstance(getattr(module.__dict__.get("forward"), "__self__", None), CsrForward)


def _matrix_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a Linear or Conv1D, outputs by inputs."""
    weight: Any = layer.weight
    return weight.detach().T if isinstance(layer, Conv1D) else weight.detach()


def _stamp_of(weight: torch.Tensor) -> tuple[Any, ...]:
    """What is another after any change of a tensor that autograd notices."""
    return weight.data_ptr(), weight._version, weight.dtype, weight.device, tuple(weight.shape)


def _can_be_sparse(module: nn.Module) -> bool:
    """Whether a module is a plain Linear or Conv1D with a plain float32 weight on the CPU."""
    weight: Any = getattr(module, "weight", None)
    return (
        type(module) in (nn.Linear, Conv1D)
        and ("forward" not in module.__dict__ or _is_sparse(module))  # nobody else's
        and type(weight) is nn.Parameter
        and weight.layout is torch.strided
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and not weight.is_inference()  # whose changes cannot be noticed
    )


def _share_of_zeros(layer: nn.Module) -> float:
    weight: Any = layer.weight
    return 1 - int(weight.count_nonzero()) / max(weight.numel(), 1)


def _sparse_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _can_be_sparse(module) and _share_of_zeros(module) >= LEAST_SPARSITY:
            yield name, module


def _rows_of(
    model: nn.Module, layers: Mapping[str, nn.Module], example: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The rows of the inputs of each layer in a forward pass of the example, and 1; none of a layer not called."""
    rows: dict[str, set[int]] = {name: set() for name in layers}

    def note(name: str, _: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows[name].add(arguments[0].numel() // arguments[0].shape[-1])

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        forward_of(model)(**example)
    except MISFITS as error:
        shapes = {name: list(value.shape) for name, value in example.items() if isinstance(value, torch.Tensor)}
        raise ArgumentError(
            "example", f"{type(model).__name__} does not run with inputs of the shapes {shapes}: {first_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return {name: tuple(sorted({1, *some})) if some else () for name, some in rows.items()}


def _time_layer(layer: nn.Module, rows: Sequence[int]) -> dict[int, float]:
    """Rows of random inputs -> seconds of the dense product over those of the sparse one, the least of several each."""
    matrix = _matrix_of(layer)
    weight, bias = to_csr(matrix), getattr(layer, "bias", None)
    ratios = {}
    for number in rows:
        inputs = torch.randn(number, matrix.shape[1])
        calls = [partial(layer, inputs), partial(csr_linear, inputs, weight, bias)]
        times = time_in_turns(calls, _ROUNDS, _SECONDS, _LEAST_ROUNDS, clock_of(inputs.device))
        ratios[number] = min(times[0]) / min(times[1])
    return ratios


def _time_model(model: nn.Module, forwards: Sequence[CsrForward], example: Mapping[str, Any]) -> float:
    """Seconds of the dense forward pass of a model over those of the sparse one, the least of several, in turns."""

    def densely() -> None:
        dense(model)
        forward_of(model)(**example)

    def sparsely() -> None:
        _attach(forwards)
        forward_of(model)(**example)

    try:
        clock = clock_of(torch.device("cpu"))
        times = time_in_turns([densely, sparsely], _MODEL_ROUNDS, _MODEL_SECONDS, _LEAST_ROUNDS, clock)
    finally:
        dense(model)
    return min(times[0]) / min(times[1])


def _attach(forwards: Sequence[CsrForward]) -> None:
    for forward in forwards:
        forward.layer.forward = forward.forward


def _pays(ratio: float) -> bool:
    return ratio >= LEAST_SPEEDUP
