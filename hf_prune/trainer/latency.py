"""The latency of a Trainer's model, on a sample of its evaluation data."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..foreign.accelerate import forward_of
from ..foreign.transformers import evaluation_collator, prepare_inputs
from ..publish.measure import input_shapes, measure_latency
from ..publish.record import Latency

# How many samples structures are measured with.
SAMPLES = 32


def measure_trainer(trainer: Trainer, dense: nn.Module | None = None) -> Latency | None:
    """The latency of a forward pass on the first sample of a Trainer's evaluation data; None if it cannot be measured.

    The model gets the inputs that it takes by name, from the batch that the Trainer's collator makes. The Trainer's own
    steps are not called: they may need other models, and record metrics. A dense model to compare with is measured in
    turns with the Trainer's. Both compute in the precision of their weights, whatever precision the Trainer trained in.
    """
    dataset: Any = trainer.eval_dataset
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
        return None
    if not len(dataset) or trainer.args.world_size > 1:
        return None
    assert trainer.model is not None  # ensured by Trainer.__init__
    inputs = _inputs_of(trainer.model, evaluation_collator(trainer)([dataset[0]]))
    if inputs is None:
        return None
    inputs = prepare_inputs(trainer, inputs)
    models = [trainer.model] if dense is None else [trainer.model, dense.to(trainer.args.device)]
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.random.fork_rng(), torch.no_grad(), trainer.compute_loss_context_manager():
            seconds, passes = measure_latency([partial(forward_of(model), **inputs) for model in models])
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    shapes = input_shapes(inputs)
    return Latency(
        shapes=shapes, passes=passes, seconds=seconds[0], dense_seconds=seconds[1] if dense is not None else None
    )


def example_of(trainer: Trainer) -> dict[str, Any] | None:
    """A batch of the first samples of a Trainer's training data, on the CPU; None if there are fewer than two.

    The model gets the inputs that it takes by name.
    """
    dataset: Any = trainer.train_dataset
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or len(dataset) < 2:
        return None
    assert trainer.model is not None  # ensured by Trainer.__init__
    with torch.random.fork_rng():
        samples = [dataset[index] for index in range(min(SAMPLES, len(dataset)))]
        return _inputs_of(trainer.model, evaluation_collator(trainer)(samples))


def _inputs_of(model: nn.Module, batch: Any) -> dict[str, Any] | None:
    """The inputs of a batch that a model's forward pass takes, by name; None if it takes none, or one is missing."""
    if not isinstance(batch, Mapping):
        return None
    parameters = inspect.signature(model.forward).parameters.values()
    named = [
        parameter for parameter in parameters if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if any(parameter.default is parameter.empty and parameter.name not in batch for parameter in named):
        return None
    return {parameter.name: batch[parameter.name] for parameter in named if parameter.name in batch} or None
