"""A stream compared with what it stands for: the changed model and the dense one, run plainly."""

import collections
import copy

import torch

from hf_prune.model.targets import find_targets
from hf_prune.oneshot.layers import find_layers, inputs_of_part, matrix_of
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.settings import set_for_streaming
from hf_prune.structure.batches import on_model


def micro_batches(batch):
    """Two micro-batches: the batch, and its samples in another order."""
    rows = max(len(value) for value in batch.values() if torch.is_tensor(value) and value.dim())
    other = {
        name: value.roll(1, 0) if torch.is_tensor(value) and value.dim() and len(value) == rows else value
        for name, value in batch.items()
    }
    return [batch, other]


def tensors_in(value):
    """All tensors in an output, in its order."""
    if torch.is_tensor(value):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for one in values for tensor in tensors_in(one)]


def plain_outputs(model, batches):
    """What the model returns for each micro-batch, without a stream."""
    with torch.no_grad(), set_for_streaming(model):
        return [tensors_in(model(**on_model(batch, model))) for batch in batches]


def farthest(ones, others):
    """The largest difference of two lists of tensors, relative to the largest value; 0 where they are equal."""
    assert [one.shape for one in ones] == [other.shape for other in others]
    differences = [0.0]
    for one, other in zip(ones, others, strict=True):
        one, other = one.double().nan_to_num(), other.double().nan_to_num()
        if one.numel() and not torch.equal(one, other):
            differences.append(float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)))
    return max(differences)


def randomly_masked(stop):
    """The matrix of a stop without some of its weights."""
    return stop.weight * (torch.rand(stop.shape) > 0.3)


def matrices_of(model):
    """A function that gives the matrix that a model of the same class has where a stream stops."""
    parameters = dict(model.named_parameters())
    by_name = {layer.target.name: layer for layer in find_layers(model, find_targets(model), parameters)}
    return lambda stop: matrix_of(by_name[stop.target.name], stop.part)


def stream(model, batches, targets, change=randomly_masked, dense_twin=True, **options):
    """Stream with changes; the stream, its outputs, and (name, part) -> what `inputs` gave for each micro-batch."""
    outputs, inputs = {}, {}

    def keep(index, dense, output):
        outputs[index, dense] = tensors_in(output)

    made = Lockstep(model, batches, targets, dense_twin, on_output=keep, **options)
    before = []
    for stop in made:
        now = inputs[stop.target.name, stop.part] = list(stop.inputs())
        if stop.shares_inputs:
            assert all(torch.equal(one[0], other[0]) for one, other in zip(now, before, strict=True)), stop.target.name
        before = now
        stop.set(change(stop))
    return made, outputs, inputs


def recorded(model, batches, targets):
    """Name -> what the modules of a layer get at their first call, for each micro-batch, by plain hooks."""
    seen = collections.defaultdict(dict)
    hooks, now = [], {}
    for layer in find_layers(model, targets, dict(model.named_parameters())):
        for module in layer.modules if layer.kind in ("linear", "convolution") else ():

            def note(module, arguments, options, name=layer.target.name):
                seen[name].setdefault(now["batch"], next(iter([*arguments, *options.values()])).clone())

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    with torch.no_grad(), set_for_streaming(model):
        for now["batch"], batch in enumerate(batches):
            model(**on_model(batch, model))
    for hook in hooks:
        hook.remove()
    return seen


def check(model, batches, change=randomly_masked, without=(), **options):
    """Differences between a stream with changes on the way and plain forward passes; AssertionError for larger ones."""
    dense = copy.deepcopy(model)
    targets = [target for target in find_targets(model) if target.name not in without]
    model.train()
    made, outputs, inputs = stream(model, batches, targets, change, **options)
    assert all(module.training for module in model.modules())
    assert not made.missed, made.missed
    apart = {"pruned": 0.0, "dense": 0.0, "inputs": 0.0}
    for index, (changed, plain) in enumerate(
        zip(plain_outputs(model, batches), plain_outputs(dense, batches), strict=True)
    ):
        apart["pruned"] = max(apart["pruned"], farthest(outputs[index, False], changed))
        apart["dense"] = max(apart["dense"], farthest(outputs[index, True], plain))
    layers = [layer for layer in made._layers if layer.target.name not in made.never_reached]
    in_changed, in_dense = recorded(model, batches, targets), recorded(dense, batches, targets)
    parameters = dict(model.named_parameters())
    for layer in layers:
        for part in range(layer.parts) if layer.kind != "experts" else ():
            for index, (x, of_dense, _) in enumerate(inputs[layer.target.name, part]):
                assert (of_dense is None) == layer.routed
                for given, there in ((x, in_changed), (of_dense, in_dense)):
                    if given is None:
                        continue
                    wanted = inputs_of_part(layer, part, there[layer.target.name][index])
                    wanted = wanted if len(wanted) == len(given) else wanted[:0]
                    apart["inputs"] = max(apart["inputs"], farthest([given] if len(wanted) else [wanted], [wanted]))
        if layer.target.name not in made.experts_never_reached:
            assert (parameters[layer.target.name] == 0).any(), f"{layer.target.name} was not changed"
    return {
        **apart,
        "targets": len(targets),
        "never": made.never_reached,
        "experts": sum(layer.kind == "experts" for layer in layers),
        "residual": [layer.target.name for layer in layers if layer in made.discovery.residual],
        "unlocated": sum(made.discovery.positions.get(layer) is None for layer in layers),
        "again": len(made.uses),
    }
