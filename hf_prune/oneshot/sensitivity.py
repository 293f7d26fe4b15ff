"""How much each tensor alone adds to the loss when it is pruned, measured; and the allocation that follows from it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.calibration import CalibrationConfig
from ..config.pruning import PruningConfig
from ..errors import CalibrationError, PruningConfigError, one_line
from ..methods.allocation import cheapest
from ..methods.choosing import dropped_units
from ..methods.patterns import count_of
from ..methods.scopes import SCOPES
from ..model.layouts import Target
from ..model.names import named_parameters
from ..model.targets import find_targets
from .counts import split_count
from .grams import Moments, moments_of
from .layers import Layer, find_layers, matrix_of, put_matrix
from .lockstep import Lockstep
from .onload import check_device, computed, device_of
from .prune import check_arguments
from .solve import Matrix, by_magnitude, more_to_drop, needs_products, no_moments, solve
from .windows import as_batches, digest_of

# Called after each tensor with how many are done, how many there are, and its name.
Measured = Callable[[int, int, str], None]

RATES = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Curve:
    """A tensor: how many units of the pattern it has, how many are dropped already, and sparsity -> loss with it alone
    pruned."""

    units: int
    dropped: int
    losses: dict[float, float]


@dataclass(frozen=True)
class Sensitivity:
    """What `measure_sensitivity` has measured.

    Attributes:
        dense: the loss of the dense model.
        curves: parameter name -> its curve, in the order of the forward pass; without the dense model's point.
        settings: what it depends on, as plain values.
    """

    dense: float
    curves: dict[str, Curve]
    settings: dict[str, Any] = field(default_factory=dict)

    def allocate(self, sparsity: float) -> tuple[dict[str, float], float]:
        """The sparsity of each tensor at the least loss, for one of all of them together; and that loss.

        What pruning several tensors adds to the loss is taken to be the sum of what each alone does. The sparsities are
        of whole counts, which are exact in all. See `methods.allocation.cheapest`.

        Raises PruningConfigError if the measured sparsities end before this one.
        """
        units = sum(curve.units for curve in self.curves.values())
        dropped = sum(curve.dropped for curve in self.curves.values())
        points = []
        for curve in self.curves.values():
            at_rates = [(count_of(rate, curve.units), loss - self.dense) for rate, loss in curve.losses.items()]
            points.append([(curve.dropped, 0.0), *(point for point in at_rates if point[0] > curve.dropped)])
        total = max(count_of(sparsity, units), dropped)
        found = cheapest(points, total)
        if found is None:
            most = max(rate for curve in self.curves.values() for rate in curve.losses)
            raise PruningConfigError(
                "sparsity", f"expected at most {most}, the highest rate that was measured, got {sparsity}"
            )
        counts, added = found
        shares = {
            name: count / max(curve.units, 1) for (name, curve), count in zip(self.curves.items(), counts, strict=True)
        }
        return shares, self.dense + added

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        curves = {name: vars(curve) for name, curve in self.curves.items()}
        return {"settings": self.settings, "dense_loss": self.dense, "tensors": curves}


def as_overrides(shares: Mapping[str, float]) -> dict[str, float]:
    """Sparsities by parameter name as `PruningConfig.overrides` has them: expressions that match the names alone."""
    return {re.escape(name): share for name, share in shares.items()}


def measure_sensitivity(
    model: PreTrainedModel,
    config: PruningConfig,
    data: Any,
    evaluate: Callable[[PreTrainedModel], float],
    rates: Sequence[float] = RATES,
    calibration: CalibrationConfig | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kept_in: Path | None = None,
    progress: Measured | None = None,
) -> Sensitivity:
    """Prune each tensor alone at several sparsities, and measure the loss of the model each time.

    The inputs of each layer are those in the dense model, from one forward pass of all calibration data that is held
    before the layer. Everything else is a full forward pass of the evaluation: one for the dense model, and one for
    each tensor and rate. The model is left as it was.

    Args:
        model: the dense model.
        config: the method, the pattern and the tensors; its sparsity, scope and overrides do not count.
        data: calibration data, see `prune`.
        evaluate: returns the loss of a model, lower is better; such as on text that is not used for calibration.
        rates: the sparsities, each between 0 and 1.
        calibration: settings; the weights of the dense model's outputs do not count, as inputs are the dense model's.
        tokenizer: the model's tokenizer, if the data are texts.
        kept_in: a file of JSON lines to which each measured tensor is added; those in it are not measured again.
        progress: called after each tensor.

    Raises:
        PruningConfigError: an n:m pattern, which leaves nothing to allocate, or a method that cannot be used at once.
        CalibrationError: the data cannot be used, or `kept_in` is of other settings.
    """
    calibration = calibration if calibration is not None else CalibrationConfig()
    check_arguments(model, config, calibration)
    rates = check_rates(rates)
    if config.parsed_pattern.name == "n:m":
        raise PruningConfigError(
            "pattern", f"expected one that leaves a choice of sparsities, got {config.pattern!r}; use 'unstructured'"
        )
    batches = as_batches(data, model, tokenizer, calibration)
    own = replace(calibration, dense_weight=0.0, residual_weight=0.0)
    targets = find_targets(model, config.targets, config.exclude, config.adapters)
    layers = {layer.target.name: layer for layer in find_layers(model, targets, dict(named_parameters(model)))}
    check_device(model, calibration)
    stream = Lockstep(model, batches, targets, device=device_of(model, calibration))
    settings = {
        "method": config.method,
        "pattern": config.pattern,
        "rates": list(rates),
        "calibration": {"damping": own.damping, "data": digest_of(batches)},
    }
    with computed(model, calibration):
        dense = evaluate(model)
    known: dict[str, Curve] = {}
    if kept_in is not None:
        known = _read(kept_in, {**settings, "dense_loss": dense})
    run = _Run(model, config, own, rates, evaluate, dense, known, kept_in)
    reached = {layer.target.name for layer, _ in stream.discovery.order}
    names = [name for name in layers if name in reached]
    done = 0
    moments: Moments | None = None
    for stop in stream:
        layer = layers[stop.target.name]
        if layer.target.name not in known:
            if moments is None or not stop.shares_inputs:
                moments = moments_of(stop.inputs(), stop.shape[1], needs_products(config))
            run.solve(layer, stop.part, moments)
        else:
            moments = None
        if layer.parts == 1 and layer.kind != "experts":
            run.measure(layer)
            done += 1
            if progress is not None:
                progress(done, len(names), layer.target.name)
    with computed(model, calibration):
        for name in names:
            if name not in run.curves:
                run.measure(layers[name])
                done += 1
                if progress is not None:
                    progress(done, len(names), name)
    order = dict.fromkeys(layer.target.name for layer, _ in stream.discovery.order)
    return Sensitivity(dense, {name: run.curves[name] for name in order}, settings)


def check_rates(rates: Sequence[float]) -> tuple[float, ...]:
    """Sparsities in rising order, each once. Raises PruningConfigError for others than between 0 and 1."""
    bad = [rate for rate in rates if not 0 < rate < 1]
    if bad or not rates:
        raise PruningConfigError("rates", f"expected sparsities between 0 and 1, got {list(rates)}")
    return tuple(sorted(set(rates)))


class _Run:
    """The tensors that are solved and not measured yet, and the curves of the others."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: PruningConfig,
        calibration: CalibrationConfig,
        rates: Sequence[float],
        evaluate: Callable[[PreTrainedModel], float],
        dense: float,
        known: Mapping[str, Curve],
        kept_in: Path | None,
    ):
        scope = config.scope if SCOPES[config.scope].within_rows else "layer"
        self.model, self.config, self.calibration = model, replace(config, scope=scope, overrides=None), calibration
        self.rates, self.evaluate, self.dense = rates, evaluate, dense
        self.known, self.kept_in = known, kept_in
        self.curves: dict[str, Curve] = {}
        self._solved: dict[str, dict[float, torch.Tensor]] = {}
        self._parts: set[tuple[str, int]] = set()

    def solve(self, layer: Layer, part: int, moments: Moments, config: PruningConfig | None = None) -> None:
        """Prune one matrix at each rate, in copies of its tensor."""
        self._parts.add((layer.target.name, part))
        copies = self._solved.setdefault(
            layer.target.name, {rate: layer.parameter.detach().clone() for rate in self.rates}
        )
        weight = matrix_of(layer, part).to(moments.squares.device)
        for rate, copied in copies.items():
            count = split_count(count_of(rate, self._units(layer.target)), layer.parts)[part]
            kept = weight != 0
            matrix = Matrix(layer.target.name, weight.float(), kept, more_to_drop(kept, self.config, count))
            solved = solve(matrix, moments, config or self.config, self.calibration)
            into = replace(layer, parameter=torch.nn.Parameter(copied, requires_grad=False))
            put_matrix(into, part, solved.weight.to(copied.dtype))

    def _units(self, target: Target) -> int:
        return target.weights // self.config.parsed_pattern.unit_size

    def measure(self, layer: Layer) -> None:
        """Evaluate the model with each of the pruned copies of a tensor in its place."""
        name, parameter = layer.target.name, layer.parameter
        if name in self.known:
            self.curves[name] = self.known[name]
            return
        for part in range(layer.parts):
            if (name, part) not in self._parts:  # an expert that got no token
                self.solve(layer, part, no_moments(matrix_of(layer, part)), by_magnitude(self.config))
        losses, before = {}, parameter.detach().clone()
        for rate, copied in self._solved.pop(name).items():
            try:
                parameter.detach().copy_(copied)
                losses[rate] = self.evaluate(self.model)
            finally:
                parameter.detach().copy_(before)
        dropped = sum(
            int(dropped_units(matrix_of(layer, part) != 0, self.config.parsed_pattern).sum())
            for part in range(layer.parts)
        )
        self.curves[name] = Curve(self._units(layer.target), dropped, losses)
        if self.kept_in is not None:
            with self.kept_in.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"name": name, **vars(self.curves[name])}) + "\n")


def _read(path: Path, settings: Mapping[str, Any]) -> dict[str, Curve]:
    """The curves that a file has; a new file is begun with the settings. A last line that is not whole is cut off."""
    if not path.exists():
        path.write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return {}
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("".join(f"{line}\n" for line in lines[:-1]), encoding="utf-8")
    try:
        saved, *rows = [json.loads(line) for line in lines[:-1]]
        curves = {
            row["name"]: Curve(
                row["units"], row["dropped"], {float(rate): loss for rate, loss in row["losses"].items()}
            )
            for row in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(
            f"{path}: expected measurements, got a file that cannot be read: {one_line(error)}; delete it"
        ) from error
    if saved != json.loads(json.dumps(settings)):
        raise CalibrationError(
            f"{path}: expected measurements of the same model, data and settings, got others; delete it, or use "
            "another folder"
        )
    return curves
