"""Pruning a model at once: each matrix as the stream meets it, from its inputs in the model that is pruned so far."""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.calibration import CalibrationConfig
from ..config.pruning import PruningConfig
from ..engines.choose import weights_digest
from ..errors import CalibrationError
from ..masking.groups import Group
from ..methods.scopes import SCOPES, Seen
from ..model.anatomy import blocks_of
from ..model.layouts import Target
from ..model.names import named_parameters
from ..structure.batches import rows_of
from .counts import counts_of, split_count
from .grams import Moments, moments_of
from .layers import Layer, as_part, can_map, find_layers, matrix_of, part_of, put_matrix
from .lockstep import Lockstep, Stop
from .masks import PackedMasks
from .offload import CpuStore, DiskStore, Store
from .onload import computed, device_of
from .pruned import Progress, Pruned, PrunedLayer
from .seen import see_dense
from .solve import Matrix, by_magnitude, damping_of, more_to_drop, needs_products, no_moments, solve
from .windows import Batch, digest_of
from .work import Finished, Work

# An expert that got fewer tokens than this times its input features says too little of their products.
_FEW_TOKENS = 2

# Fields of the calibration that the result does not depend on, once the data are there.
_WITHOUT_EFFECT = ("samples", "length", "offload", "device")


class Run:
    """One run of `prune`: the model, its layers, and the stream that meets them."""

    def __init__(
        self,
        model: PreTrainedModel,
        config: PruningConfig,
        calibration: CalibrationConfig,
        batches: Sequence[Batch],
        targets: Sequence[Target],
        groups: Sequence[Group],
    ):
        self.model, self.config, self.calibration, self.batches = model, config, calibration, batches
        self.parameters = dict(named_parameters(model))
        self.groups = groups
        self.counts: dict[str, int] | None = None
        self.layers = {layer.target.name: layer for layer in find_layers(model, targets, self.parameters)}
        self.products = needs_products(config)
        twins = self.products and calibration.dense_weight > 0
        autocast = getattr(torch, calibration.autocast) if calibration.autocast is not None else None
        self.rounds = autocast == torch.bfloat16  # inputs, as the layers do
        store = self.make_store if calibration.offload is not None else None
        device = device_of(model, calibration)
        self.stream = Lockstep(model, batches, targets, twins, autocast, device=device, store=store)
        self.work: Work | None = None
        self.left_dense: list[str] = []
        self.masks = PackedMasks()
        self.few_tokens: list[str] = []

    def make_store(self) -> Store:
        """Where the tensors of paused passes wait."""
        if self.calibration.offload == "cpu":
            return CpuStore()
        return DiskStore(self.work.folder if self.work is not None else None)

    def check_reached(self, leave_unreached: bool) -> None:
        """Raise CalibrationError for layers that are not called, unless they are to be left dense.

        Of experts that are modules, others may be called later: a token reaches only some of them.
        """
        called = {layer.target.name: layer for layer, _ in self.stream.discovery.order}
        experts = {_numberless(name) for name, layer in called.items() if layer.routed and layer.kind != "experts"}
        missing = [name for name in self.layers if name not in called and _numberless(name) not in experts]
        if missing and not leave_unreached:
            others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise CalibrationError(
                f"{missing[0]}{others}: expected a call of its layer in the forward pass of the first batch, saw none: "
                "its module uses the weight without calling the layer, or not at all; exclude it, or leave such layers "
                "dense (leave_unreached=True, --leave-unreached)"
            )
        self.left_dense = missing

    def count(self) -> dict[str, int]:
        """How many units are dropped of each tensor, with what the scope sees of the dense model."""
        groups = [
            replace(group, members=tuple(one for one in group.members if one.name not in self.left_dense))
            for group in self.groups
        ]
        names = [target.name for group in groups for target in group.members]
        reads = {SCOPES[group.scope].reads for group in groups}
        seen: dict[str, list[Seen]] = {}
        if reads != {None}:
            layers = [self.layers[name] for name in names if self.layers[name].kind != "unknown"]
            positions = {layer.target.name: at for layer, at in self.stream.discovery.positions.items()}
            with computed(self.model, self.calibration):
                seen = see_dense(self.model, layers, self.batches, positions, gradients="outputs" in reads)
        weights = {name: self.parameters[name].detach() for name in names}
        return counts_of(groups, weights, seen, blocks_of(self.model, names))

    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "model": weights_digest(self.model),
            "data": digest_of(self.batches),
            "pruning": self.config.to_dict(),
            "calibration": {
                name: value for name, value in self.calibration.to_dict().items() if name not in _WITHOUT_EFFECT
            },
            "torch": torch.__version__,
            "device": (device_of(self.model, self.calibration) or self.model.device).type,
            "threads": torch.get_num_threads(),
        }

    def run(self, progress: Progress | None) -> Pruned:
        """Prune all matrices, in the order of the forward pass."""
        done: list[PrunedLayer] = []
        moments: Moments | None = None
        total = sum(layer.parts for name, layer in self.layers.items() if name not in self.left_dense)
        for place, stop in enumerate(self.stream):
            if stop.target.name in self.left_dense:  # the first batch did not call it, another one does
                continue
            start = time.perf_counter()
            finished = self.work.find(place, _name(stop)) if self.work is not None else None
            if finished is None:
                if moments is None or not stop.shares_inputs or stop.writes_into_residual:
                    moments = moments_of(stop.inputs(), stop.shape[1], self.products, self.rounds)
                elif moments.lack is not None:  # of the layer before, whose inputs are the same
                    moments = replace(moments, lack=None)
                finished = self.finish(stop, moments, start)
                if self.work is not None:
                    self.work.keep(place, finished)
                    finished = self.work.find(place, _name(stop)) if self.maps(stop.target) else finished
                    assert finished is not None
            else:
                moments = None
            self.take(stop, finished)
            notes = {name: value for name, value in finished.notes.items() if name != "few"}
            if finished.notes.get("few"):
                self.few_tokens.append(_name(stop))
            done.append(PrunedLayer(**{**notes, "name": stop.target.name, "part": stop.part}))
            if progress is not None:
                progress(len(done), total, done[-1])
        if not done:
            raise CalibrationError("no layer that is to be pruned was called in the forward pass")
        return self.result(done)

    def maps(self, target: Target) -> bool:
        """Whether mask and weights of a tensor are mapped from the file of its finished layer, and take no memory."""
        return self.work is not None and self.calibration.offload == "disk" and can_map(target)

    def take(self, stop: Stop, finished: Finished) -> None:
        """Give the model the weights of a finished matrix, and enter its mask."""
        parameter = self.parameters[stop.target.name]
        if self.maps(stop.target):
            self.masks.set_mapped(stop.target.name, finished.kept)
        else:
            self.note_mask(self.layers[stop.target.name], stop.part, finished.kept)
        weight = finished.weight.to(parameter)
        stop.set(weight, take=self.maps(stop.target) and weight is finished.weight)

    def finish(self, stop: Stop, moments: Moments, start: float) -> Finished:
        """Prune one matrix."""
        if not bool(moments.squares.isfinite().all()):
            raise CalibrationError(
                f"{_name(stop)}: expected inputs of its layer whose squares are finite in float32, got others; check "
                "what the model, pruned up to there, computes from the calibration data"
            )
        dtype = self.parameters[stop.target.name].dtype
        matrix = self.matrix(self.layers[stop.target.name], stop.part, stop.weight)
        few = self.products and self.layers[stop.target.name].routed
        few = few and moments.tokens < _FEW_TOKENS * matrix.weight.shape[1]
        if few:  # ranked by the inputs' norms alone, and not changed
            moments = replace(moments, gram=None, cross=None, lack=None)
        solved = solve(matrix, moments, self.config, self.calibration)
        notes = {
            "name": _name(stop),
            "weights": solved.kept.numel(),
            "masked": int((~solved.kept).sum()),
            "tokens": moments.tokens,
            "error": solved.error,
            "seconds": time.perf_counter() - start,
            "few": few,
        }
        return Finished(solved.weight.to(dtype), solved.kept, notes)

    def matrix(self, layer: Layer, part: int, weight: torch.Tensor) -> Matrix:
        """The problem of one matrix."""
        assert self.counts is not None
        kept = weight != 0
        count = split_count(self.counts[layer.target.name], layer.parts)[part]
        indices = None
        if self.config.method == "random":
            flat = torch.arange(layer.parameter.numel(), device=weight.device).view(layer.target.shape)
            indices = matrix_of(replace(layer, parameter=nn.Parameter(flat, requires_grad=False)), part)
        return Matrix(layer.target.name, weight.float(), kept, more_to_drop(kept, self.config, count), indices)

    def note_mask(self, layer: Layer, part: int, kept: torch.Tensor) -> None:
        """Enter the mask of a matrix into that of its tensor."""
        name, parts = layer.target.name, layer.parts
        if name not in self.masks:
            self.masks.add(name, layer.target.shape)
            for other in range(parts):
                self.masks.set_part(name, other, parts, part_of(layer, other).ne(0))
        self.masks.set_part(name, part, parts, as_part(layer, kept.cpu()))

    def result(self, done: list[PrunedLayer]) -> Pruned:
        """What was done, after the last layer."""
        notes = []
        for name, parts in self.stream.experts_never_reached.items():
            for part in parts:
                self.prune_unseen(self.layers[name], part)
            numbers = ", ".join(map(str, parts))
            notes.append(f"{name}: no token reached the experts {numbers}; they were pruned by magnitude.")
        missed = [name for name in self.stream.never_reached if name not in self.left_dense]
        for name in missed:
            for part in range(self.layers[name].parts):
                self.prune_unseen(self.layers[name], part)
            notes.append(f"{name}: no token reached this expert; it was pruned by magnitude.")
        if self.few_tokens:
            notes.append(
                f"{len(self.few_tokens)} matrices of experts got fewer tokens than {_FEW_TOKENS} for each of their "
                f"input features; they were pruned by the norms of their inputs, and not changed: "
                f"{', '.join(self.few_tokens[:5])}{' and others' if len(self.few_tokens) > 5 else ''}."
            )
        notes += [
            f"{name}: its layer was not called in the first batch; it was left dense." for name in self.left_dense
        ]
        for name, missing in self.stream.missed.items():
            notes.append(f"{name}: {missing} micro-batches came to it after it was pruned; it was pruned without them.")
        for name, times in self.stream.uses.items():
            notes.append(
                f"{name}: its layer is called {times + 1} times in a forward pass; it was pruned at the first."
            )
        return Pruned(
            config=self.config,
            masks=self.masks.in_order(self.layers),
            layers=done,
            samples=sum(map(rows_of, self.batches)),
            tokens=max(layer.tokens for layer in done),
            damping=damping_of(self.config, self.calibration).share if self.products else None,
            left_dense=self.left_dense,
            notes=notes,
            _work=self.work,
        )

    def prune_unseen(self, layer: Layer, part: int) -> None:
        """Prune an expert that got no token by magnitude."""
        weight = matrix_of(layer, part).clone()
        matrix = self.matrix(layer, part, weight)
        solved = solve(matrix, no_moments(weight), by_magnitude(self.config), self.calibration)
        put_matrix(layer, part, solved.weight.to(weight.dtype))
        self.note_mask(layer, part, solved.kept)


def _numberless(name: str) -> str:
    """A name without its numbers, which the layers of all experts share."""
    return re.sub(r"\d+", "#", name)


def _name(stop: Stop) -> str:
    return f"{stop.target.name}[{stop.part}]" if stop.target.layout.startswith("experts") else stop.target.name
