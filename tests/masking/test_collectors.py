"""Criteria that read inputs or gradients of the step before an update, against references written by hand."""

import pytest
import torch
import transformers
from models import ARCHITECTURES, bert, bert_examples, training_arguments
from torch import nn
from transformers import Trainer

from hf_prune import (
    Pruner,
    PruningCallback,
    PruningConfig,
    PruningConfigError,
    PruningStateError,
    PruningTrainer,
    TargetError,
)

CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in transformers.TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"

ONCE = {"schedule": "one_shot", "begin": 3}


class Layer(nn.Module):
    """Two linear layers in a stack."""

    def __init__(self, width=6):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width, bias=False)) for _ in range(2))

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return x


def lowest(scores, count):
    order = scores.reshape(-1).argsort(stable=True)
    mask = torch.ones(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = False
    return mask.reshape(scores.shape)


def step(model, batches, pruner, optimizer):
    """One optimizer step over micro-batches; the inputs of each layer and the whole gradients."""
    inputs = [[], []]
    for batch, mask in batches:
        x = batch
        for index, layer in enumerate(model.layers):
            inputs[index].append(x[mask.bool()].detach())
            x = layer(x)
        model(batch, attention_mask=mask).square().mean().backward()
    gradients = [layer[0].weight.grad.clone() for layer in model.layers]
    pruner.mask_gradients()
    weights = [layer[0].weight.detach().clone() for layer in model.layers]
    optimizer.step()
    after = [layer[0].weight.detach().clone() for layer in model.layers]
    pruner.step(optimizer)
    optimizer.zero_grad()
    return [torch.cat(seen) for seen in inputs], gradients, weights, after


def data(count=2):
    batches = []
    for index in range(count):
        mask = torch.ones(3, 4, dtype=torch.int64)
        mask[0, 4 - index :] = 0
        batches.append((torch.randn(3, 4, 6), mask))
    return batches


@pytest.mark.parametrize("method", ["wanda", "taylor"])
def test_scores_are_those_of_the_step_before_the_update_alone(method):
    torch.manual_seed(0)
    model = Layer()
    pruner = Pruner(model, PruningConfig(method=method, sparsity=0.5, **ONCE), total_steps=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(1, 6):
        inputs, gradients, _, after = step(model, data(), pruner, optimizer)
        model.eval()
        model(torch.full((1, 1, 6), 1e6))  # an evaluation is not counted
        model.train()
        if number == 3:
            expected = {}
            for index, weight in enumerate(after):
                norms = inputs[index].double().square().sum(0).sqrt().float()
                scores = weight.abs() * norms if method == "wanda" else (weight * gradients[index]).abs()
                expected[f"layers.{index}.0.weight"] = lowest(scores, 18)
        assert pruner.sparsity == (0.5 if number >= 3 else 0.0)
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:2x1"])
@pytest.mark.parametrize("method", ["wanda", "taylor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])  # of losses that the Trainer divides by the tokens of the batch
def test_micro_batches_of_any_size_give_the_same_masks(tmp_path, name, method, pattern):
    """The same eight examples a step, as they come, one after another, or with a callback in the stock Trainer."""
    sparsity = {} if pattern == "2:4" else {"sparsity": 0.5}
    config = PruningConfig(method=method, pattern=pattern, **sparsity, **ONCE)
    masks = []
    for size, trainer_class in ((8, PruningTrainer), (2, PruningTrainer), (4, Trainer)):
        transformers.set_seed(0)
        model = ARCHITECTURES[name].build()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        args = training_arguments(
            tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=4, optim="sgd"
        )
        callback = PruningCallback(config)
        extra = {"pruning_config": config} if trainer_class is PruningTrainer else {"callbacks": [callback]}
        trainer = trainer_class(model=model, args=args, train_dataset=ARCHITECTURES[name].examples(32), **extra)
        trainer.train()
        pruner = callback.pruner if trainer_class is Trainer else trainer.pruner
        assert pruner.sparsity == 0.5
        masks.append(torch.cat([mask.reshape(-1) for mask in pruner.masks.values()]))
    for other in masks[1:]:
        assert (masks[0] != other).float().mean() < 0.005  # rounding may turn what is all but equal


def test_checkpointed_layers_are_counted_once(tmp_path):
    masks = []
    for checkpointing in (False, True):
        transformers.set_seed(0)
        config = PruningConfig(method="wanda", sparsity=0.5, scope="global", **ONCE)
        args = training_arguments(tmp_path, max_steps=4, **{CHECKPOINTING: checkpointing})
        trainer = PruningTrainer(model=bert(), args=args, train_dataset=bert_examples(16), pruning_config=config)
        trainer.train()
        masks.append(torch.cat([mask.reshape(-1) for mask in trainer.pruner.masks.values()]))
    assert torch.equal(*masks)


@pytest.mark.parametrize("method", ["wanda", "taylor"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, method):
    config = PruningConfig(method=method, sparsity=0.6, begin=2, end=8, frequency=1)
    results = []
    for resume in (None, str(tmp_path / "checkpoint-5")):
        transformers.set_seed(0)
        args = training_arguments(tmp_path, save_strategy="steps", save_steps=5)
        trainer = PruningTrainer(model=bert(), args=args, train_dataset=bert_examples(), pruning_config=config)
        trainer.train(resume_from_checkpoint=resume)
        results.append(trainer.model.state_dict())
    assert all(torch.equal(weight, results[1][name]) for name, weight in results[0].items())


def test_no_hook_is_left_when_training_is_over(tmp_path):
    """Training ends where an update would be due after the next step."""
    transformers.set_seed(0)
    config = PruningConfig(method="wanda", sparsity=0.5, begin=2, end=8, frequency=1)
    args = training_arguments(tmp_path)

    class StopsEarly(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 4

    trainer = PruningTrainer(
        model=bert(), args=args, train_dataset=bert_examples(), pruning_config=config, callbacks=[StopsEarly()]
    )
    trainer.train()
    assert 0 < trainer.pruner.sparsity < 0.5
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in trainer.model.modules()]
    assert sum(hooks) == 0


@pytest.mark.parametrize("method", ["wanda", "taylor"])
def test_an_update_waits_where_what_it_reads_is_not_finite(method):
    """As in a step that fp16 skips: without waiting, all scores would be equal, and the first rows would go."""
    torch.manual_seed(0)
    model = Layer()
    pruner = Pruner(model, PruningConfig(method=method, sparsity=0.5, **ONCE), total_steps=6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(1, 5):
        if number == 3:
            x = torch.randn(2, 3, 6)
            model(x if method == "taylor" else x.fill_(torch.inf))
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, torch.inf if method == "taylor" else 0.0)
            pruner.mask_gradients()
            pruner.step()
            assert pruner.sparsity == 0.0
            assert not pruner.at_final_sparsity
            optimizer.zero_grad()
        else:
            step(model, data(), pruner, optimizer)
    assert pruner.sparsity == 0.5
    assert pruner.at_final_sparsity
    assert all(mask.any(dim=1).sum() > 3 for mask in pruner.masks.values())


class UsesWeights(Layer):
    """Its second layer is never called: its weight is used as it is, as nn.MultiheadAttention does."""

    def __init__(self):
        super().__init__()
        self.layers[1] = Unused()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.inner.weight)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_layer_that_is_never_called_is_named_at_the_first_update(scope):
    torch.manual_seed(0)
    model = UsesWeights()
    config = PruningConfig(method="wanda", sparsity=0.5, scope=scope, schedule="one_shot", begin=1)
    pruner = Pruner(model, config, total_steps=4)
    model(torch.randn(2, 3, 6))
    with pytest.raises(PruningStateError, match=r"layers\.1\.inner\.weight: expected a call of its layer.*exclude it"):
        pruner.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert pruner.sparsity == 0.0


def test_a_layer_that_is_skipped_as_a_whole_is_named_after_some_steps():
    torch.manual_seed(0)
    model = Layer()
    pruner = Pruner(model, PruningConfig(method="wanda", sparsity=0.5, schedule="one_shot", begin=1), total_steps=40)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    used, whole = model.layers[:1], model.layers

    def skip():
        model.layers = used
        model(torch.randn(2, 3, 6))
        model.layers = whole
        pruner.step(optimizer)

    for _ in range(10):
        skip()
    with pytest.raises(PruningStateError, match=r"layers\.1\.0\.weight: expected a call"):
        skip()


def test_an_update_waits_for_a_layer_that_was_not_used():
    torch.manual_seed(0)
    model = Layer()
    pruner = Pruner(model, PruningConfig(method="wanda", sparsity=0.5, schedule="one_shot", begin=1), total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layers, model.layers = model.layers, model.layers[:1]
    model(torch.randn(2, 3, 6))
    pruner.step(optimizer)
    model.layers = layers
    assert {name: int((~mask).sum()) for name, mask in pruner.masks.items()} == {
        "layers.0.0.weight": 18,
        "layers.1.0.weight": 0,
    }
    step(model, data(), pruner, optimizer)
    assert pruner.sparsity == 0.5


@pytest.mark.parametrize("method", ["wanda", "taylor"])
def test_a_dense_training_beyond_the_schedule_is_pruned_after_the_next_step(method):
    torch.manual_seed(0)
    model = Layer()
    config = PruningConfig(method=method, sparsity=0.5, begin=2, end=4, frequency=1)
    pruner = Pruner(model, config)
    pruner.start(10, completed_steps=6)
    assert not pruner.at_final_sparsity
    step(model, data(), pruner, torch.optim.SGD(model.parameters(), lr=0.1))
    assert pruner.sparsity == 0.5
    assert pruner.at_final_sparsity


def test_a_loop_of_ones_own_goes_on_from_what_it_saved(tmp_path):
    config = PruningConfig(method="wanda", sparsity=0.6, begin=2, end=8, frequency=1)
    torch.manual_seed(0)
    model = Layer()
    pruner = Pruner(model, config, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        step(model, data(), pruner, optimizer)
    pruner.save(tmp_path)
    again = Pruner(model, config, total_steps=10)
    again.load(tmp_path)
    step(model, data(), again, optimizer)
    assert again.completed_steps == 6
    assert again.sparsity > pruner.sparsity


# ---- What is refused ----


def test_a_compiled_model_is_refused_when_the_trainer_is_made(tmp_path):
    args = training_arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    config = PruningConfig(method="wanda", sparsity=0.5)
    with pytest.raises(PruningConfigError, match="methods that read inputs cannot be used with torch_compile"):
        PruningTrainer(model=bert(), args=args, train_dataset=bert_examples(), pruning_config=config)


def test_layers_whose_inputs_cannot_be_seen_are_refused_by_name():
    with pytest.raises(TargetError, match=r"convolution\.weight: expected the weight of a linear layer"):
        Pruner(ARCHITECTURES["resnet"].build(), PruningConfig(method="wanda", sparsity=0.5), total_steps=10)


def test_an_update_at_step_0_is_refused():
    with pytest.raises(PruningConfigError, match="begin: expected 1 or more for 'wanda'"):
        Pruner(Layer(), PruningConfig(method="wanda", sparsity=0.5, begin=0), total_steps=10)


@pytest.mark.parametrize(("method", "what"), [("wanda", "inputs"), ("taylor", "gradient")])
def test_an_update_without_a_step_before_it_is_refused(method, what):
    model = Layer()
    pruner = Pruner(model, PruningConfig(method=method, sparsity=0.5, schedule="one_shot", begin=1), total_steps=1)
    with pytest.raises(PruningStateError, match=rf"layers\.0\.0\.weight: expected its {what} in the optimizer step"):
        pruner.step()
    assert pruner.sparsity == 0.0
