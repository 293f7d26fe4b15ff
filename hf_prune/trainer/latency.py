"""What a forward pass of a Trainer's model costs, on samples of its evaluation data."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from ..foreign.accelerate import forward_of
from ..foreign.transformers import evaluation_collator, prepare_inputs
from ..model.names import plain_model
from ..publish.measure import input_shapes, measure_costs
from ..publish.record import Cost
from ..structure.latency import build_dense
from ..structure.record import fields_before

# How many samples structures are measured with, and a second batch has at most.
SAMPLES = 32

# How long a forward pass of the second batch may take, and how large a dense model may be that is built to be timed.
_MOST_SECONDS, _MOST_PARAMETERS = 2.0, 1_000_000_000


def measure_trainer(trainer: Trainer, dense: nn.Module | None = None) -> list[Cost]:
    """What a forward pass costs on the first samples of a Trainer's evaluation data: on one, and on up to 32.

    The second batch has as many samples as a pass of two seconds can take, and on an accelerator no more than the
    Trainer evaluates at once. There is none where that is one sample, or where the Trainer evaluates one at a time. The
    list is empty if nothing can be measured.

    The model gets the inputs that it takes by name, from the batch that the Trainer's collator makes. The Trainer's own
    steps are not called: they may need other models, and record metrics. A dense model to compare with is measured in
    turns with the Trainer's; without one, a model that units were removed from is compared with one of the original
    sizes with new weights. All compute in the precision of their weights, whatever precision the Trainer trained in.
    """
    dataset: Any = trainer.eval_dataset
    if not hasattr(dataset, "__getitem__") or isinstance(dataset, Mapping) or not hasattr(dataset, "__len__"):
        return []
    if not len(dataset) or trainer.args.world_size > 1:
        return []
    assert trainer.model is not None  # ensured by Trainer.__init__
    is_new = dense is None
    if dense is None:
        dense = _dense_of(trainer)
    models = [trainer.model] if dense is None else [trainer.model, dense.to(trainer.args.device)]
    modes = [model.training for model in models]
    try:
        for model in models:
            model.eval()
        with torch.random.fork_rng(), torch.no_grad(), trainer.compute_loss_context_manager():
            first = _measure_batch(trainer, models, dataset, 1)
            if first is None:
                return []
            slowest = max(one.seconds for one in (first.model, first.dense) if one is not None)
            at_once = trainer.args.per_device_eval_batch_size
            most = SAMPLES if at_once > 1 and trainer.args.device.type == "cpu" else at_once
            samples = min(SAMPLES, most, len(dataset), int(_MOST_SECONDS / slowest))
            second = _measure_batch(trainer, models, dataset, samples) if samples > 1 else None
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    costs = [cost for cost in (first, second) if cost is not None]
    return [cost.model_copy(update={"dense_is_new": is_new and dense is not None}) for cost in costs]


def _measure_batch(trainer: Trainer, models: Sequence[nn.Module], dataset: Any, samples: int) -> Cost | None:
    """What a pass on the first samples costs with the Trainer's and the dense model; None without inputs for it."""
    assert trainer.model is not None
    batch = evaluation_collator(trainer)([dataset[index] for index in range(samples)])
    inputs = _inputs_of(trainer.model, batch)
    if inputs is None:
        return None
    inputs = prepare_inputs(trainer, inputs)
    costs, passes = measure_costs(models, [partial(forward_of(model), **inputs) for model in models])
    return Cost(shapes=input_shapes(inputs), passes=passes, model=costs[0], dense=costs[1] if len(costs) > 1 else None)


def _dense_of(trainer: Trainer) -> nn.Module | None:
    """A model of the original sizes, where units were cut out of the Trainer's; None for very large ones."""
    pruner: Any = getattr(trainer, "pruner", None)
    removed = getattr(pruner, "removed", None)
    assert trainer.model is not None
    model = plain_model(trainer.model)
    if removed is None or not isinstance(model, PreTrainedModel) or removed["parameters"][0] > _MOST_PARAMETERS:
        return None
    tokens = pruner.chosen.dense_fields if pruner.chosen is not None else {}
    return build_dense(model, {**fields_before(removed), **tokens})


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
