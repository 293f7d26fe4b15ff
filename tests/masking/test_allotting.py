"""Scopes that decide in training, at the first mask update, how much of each tensor is pruned in the end."""

import copy
import json
from dataclasses import replace

import pytest
import torch
import transformers
from models import ARCHITECTURES, bert, gpt2, llama, mixtral, resnet, training_arguments
from peft import LoraConfig, get_peft_model
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
from hf_prune.masking.groups import make_groups
from hf_prune.masking.readings import check_reads
from hf_prune.model.anatomy import blocks_of
from hf_prune.model.names import named_parameters
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.counts import counts_of
from hf_prune.oneshot.layers import find_layers
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.seen import see_dense

SCOPES = ("sensitivity", "owl")
BUILD = {"bert": bert, "gpt2": gpt2, "llama": llama}
WINDOW = {"begin": 2, "end": 6, "frequency": 1}


def build(kind="llama"):
    torch.manual_seed(0)
    model = BUILD[kind]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name, parameter in model.named_parameters():
        if "layers.1" in name or "h.1" in name or "layer.1" in name:
            parameter.data.mul_(1.5)  # so that layers differ
    return model.train()


def batches(kind, count=1):
    batch = ARCHITECTURES[kind].batch(8)
    parts = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: part[index] for name, part in parts.items()} for index in range(count)]


def step(pruner, data, optimizer=None, scale=1.0):
    """One optimizer step over micro-batches; without an optimizer the weights stay."""
    for batch in data:
        (pruner.model(**batch).loss * (scale / len(data))).backward()
    pruner.mask_gradients()
    if optimizer is not None:
        optimizer.step()
    pruner.step(optimizer)
    pruner.model.zero_grad()


def shares(pruner):
    """The final sparsity of each tensor."""
    return {tensor.name: tensor.final_sparsity for tensor in pruner.plan().tensors}


def pruned_in_one_step(kind, data, config, scale=1.0):
    pruner = Pruner(build(kind), replace(config, schedule="one_shot", begin=1), total_steps=1)
    step(pruner, data, scale=scale)
    return pruner


# ---- Which shares ----


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind", BUILD)
def test_they_are_those_of_pruning_at_once_from_the_same_batch(kind, scope, pattern):
    config = PruningConfig(sparsity=0.6, scope=scope, pattern=pattern)
    pruner = pruned_in_one_step(kind, batches(kind), config)
    model = build(kind).eval()
    targets, weights = find_targets(model), dict(named_parameters(model))
    groups, layers = make_groups(0, config, targets), find_layers(model, targets, weights)
    positions = {
        layer.target.name: at for layer, at in Lockstep(model, batches(kind), targets).discovery.positions.items()
    }
    seen = see_dense(model, layers, batches(kind), positions, gradients=True)
    expected = counts_of(
        groups, {name: one.detach() for name, one in weights.items()}, seen, blocks_of(model, list(weights))
    )
    unit = 4 if pattern == "block:2x2" else 1
    found = {name: masked // unit for name, masked in pruner.masked.items()}
    assert sum(found.values()) == sum(expected.values())
    assert len(set(shares(pruner).values())) > 1
    assert found == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("scope", SCOPES)
def test_micro_batches_and_the_scale_of_the_loss_do_not_matter(scope):
    config = PruningConfig(sparsity=0.6, scope=scope)
    whole = pruned_in_one_step("llama", batches("llama"), config).masked
    assert pruned_in_one_step("llama", batches("llama"), config, scale=2.0**20).masked == whole
    assert pruned_in_one_step("llama", batches("llama", 4), config).masked == pytest.approx(whole, abs=2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_run_again_in_backward_are_counted_once(reentrant):
    found = []
    for checkpointing in (False, True):
        model = build("llama")
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        config = PruningConfig(sparsity=0.6, scope="sensitivity", schedule="one_shot", begin=1)
        pruner = Pruner(model, config, total_steps=1)
        step(pruner, batches("llama"))
        found.append(pruner.masked)
    assert found[0] == found[1]


def test_frozen_weights_under_adapters_are_seen_too():
    """Nothing before the first layer is trained, so that its outputs need no gradient of themselves."""
    model = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["v_proj"]))
    config = PruningConfig(sparsity=0.6, scope="sensitivity", schedule="one_shot", begin=1)
    pruner = Pruner(model, config, total_steps=1)
    step(pruner, batches("llama"))
    assert pruner.masked == pytest.approx(pruned_in_one_step("llama", batches("llama"), config).masked, abs=2)
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- On the way ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "block:2x2"},
        {"method": "wanda"},
        {"method": "movement"},
        {"method": "taylor", "schedule": "linear"},
        {"method": "sparsegpt", "frequency": 2},
        {"initial_sparsity": 0.2},
        {"overrides": {".*down_proj.*": 0.25}},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "default",
)
@pytest.mark.parametrize("scope", SCOPES)
def test_totals_are_exact_and_no_tensor_goes_back(scope, changes):
    config = PruningConfig(**{"sparsity": 0.7, "scope": scope, **WINDOW} | changes)
    model = build()
    with torch.no_grad():
        sparse = model.model.layers[0].mlp.up_proj.weight
        sparse.view(-1)[:64] = 0  # rows of zeros, so that blocks are zero too
    zeros = sparse == 0
    pruner = Pruner(model, config, total_steps=8)
    planned = {update.step: update.sparsity for update in pruner.plan().updates}
    assert shares(pruner)["model.layers.0.mlp.up_proj.weight"] is None
    assert pruner.plan().tensors[0].decided_at == 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before, final = dict(pruner.masked), None
    for number in range(1, 9):
        step(pruner, batches("llama"), optimizer)
        assert pruner.sparsity == pytest.approx(planned.get(number, pruner.sparsity), abs=1e-9)
        assert all(pruner.masked[name] >= masked for name, masked in before.items())
        assert not sparse[zeros].any()
        before = dict(pruner.masked)
        if number == 2:
            final = shares(pruner)
            assert None not in final.values()
        if final is not None:
            assert shares(pruner) == final
    weights = {target.name: target.weights for target in pruner.targets}
    assert {name: masked / weights[name] for name, masked in pruner.masked.items()} == final
    assert len(set(final.values())) > 2
    assert all(not parameter[~pruner.masks[name]].any() for name, parameter in pruner.parameters.items())
    if "overrides" in changes:
        assert final["model.layers.1.mlp.down_proj.weight"] == 0.25
    else:
        assert pruner.sparsity == pytest.approx(0.7, abs=2 / sum(weights.values()) * (4 if "pattern" in changes else 1))


def test_on_the_way_every_tensor_has_the_same_part_of_its_own_share():
    config = PruningConfig(sparsity=0.6, scope="sensitivity", schedule="linear", **WINDOW)
    pruner = Pruner(build(), config, total_steps=8)
    optimizer = torch.optim.SGD(pruner.model.parameters(), lr=1e-3)
    for number in range(1, 7):
        step(pruner, batches("llama"), optimizer)
        if number >= 2:
            part = (number - 2) / 4
            final = shares(pruner)
            for target in pruner.targets:
                assert pruner.masked[target.name] == pytest.approx(
                    part * final[target.name] * target.weights, abs=1.001
                )


@pytest.mark.parametrize("scope", SCOPES)
def test_only_the_step_before_the_first_update_is_read(scope):
    pruner = Pruner(build(), PruningConfig(sparsity=0.6, scope=scope, **WINDOW), total_steps=8)
    hooks = []
    for _ in range(8):
        hooks.append(
            sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in pruner.model.modules())
        )
        step(pruner, batches("llama"), torch.optim.SGD(pruner.model.parameters(), lr=1e-3))
    assert hooks[1] > 0
    assert not any(hooks[:1] + hooks[2:])


def test_a_step_that_is_not_finite_is_not_taken():
    pruner = Pruner(build(), PruningConfig(sparsity=0.6, scope="sensitivity", **WINDOW), total_steps=8)
    step(pruner, batches("llama"))
    step(pruner, batches("llama"), scale=float("inf"))
    assert None in shares(pruner).values()
    step(pruner, batches("llama"))
    assert None not in shares(pruner).values()
    assert pruner.sparsity > 0


def test_outputs_that_the_loss_does_not_depend_on_are_named_after_some_steps():
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            self.layers[1](x)
            return self.layers[0](x)

    model = Beside()
    pruner = Pruner(model, PruningConfig(sparsity=0.5, scope="sensitivity", begin=1, end=20), total_steps=30)

    def train():
        for _ in range(12):
            model(torch.randn(3, 6)).square().mean().backward()
            pruner.step()

    with pytest.raises(PruningStateError, match=r"layers\.1\.0\.weight: expected a gradient of the loss"):
        train()
    assert pruner.sparsity == 0


# ---- In a Trainer ----


def trained(directory, config, resume=None, trainer_class=PruningTrainer, **changes):
    transformers.set_seed(0)
    args = training_arguments(directory, **changes)
    callback = PruningCallback(config)
    extra = {"pruning_config": config} if trainer_class is PruningTrainer else {"callbacks": [callback]}
    trainer = trainer_class(model=build("bert"), args=args, train_dataset=ARCHITECTURES["bert"].examples(40), **extra)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.pruner if trainer_class is Trainer else trainer.pruner


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("saved_at", [2, 3, 5], ids=["before", "in the step that is read", "after"])
def test_a_resumed_run_ends_as_one_that_was_not_interrupted(tmp_path, scope, saved_at):
    config = PruningConfig(sparsity=0.8, scope=scope, begin=3, end=8, frequency=1)
    save = {"save_strategy": "steps", "save_steps": saved_at}
    whole, pruner = trained(tmp_path, config, **save)
    folder = tmp_path / f"checkpoint-{saved_at}"
    state = json.loads((folder / "pruning_state.json").read_text(encoding="utf-8"))
    assert bool(state["allotted"]) == (saved_at >= 3)
    resumed, again = trained(tmp_path, config, resume=str(folder), **save)
    assert shares(again) == shares(pruner)
    weights = resumed.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in whole.model.state_dict().items())


def test_a_stock_trainer_with_a_callback_gives_the_same_shares(tmp_path):
    config = PruningConfig(sparsity=0.8, scope="sensitivity", begin=3, end=8, frequency=1)
    whole = shares(trained(tmp_path / "a", config)[1])
    stock = shares(trained(tmp_path / "b", config, trainer_class=Trainer)[1])
    assert stock == whole


def test_more_steps_after_a_resume_keep_the_shares(tmp_path):
    config = PruningConfig(sparsity=0.8, scope="sensitivity", begin=3, end=0.8, frequency=1)
    _, pruner = trained(tmp_path, config, save_strategy="steps", save_steps=5)
    _, again = trained(tmp_path, config, resume=str(tmp_path / "checkpoint-5"), max_steps=20)
    assert shares(again) == shares(pruner)
    assert again.masked == pruner.masked


@pytest.mark.parametrize("counts", [[3], [10**9] * 12], ids=["too few", "too many"])
def test_numbers_that_do_not_fit_the_tensors_are_refused(tmp_path, counts):
    config = PruningConfig(sparsity=0.8, scope="owl", begin=1, end=8, frequency=1)
    pruner = Pruner(build("bert"), config, total_steps=10)
    pruner._state.allotted[0] = counts
    pruner.save(tmp_path)
    with pytest.raises(PruningStateError, match=r"pruning_state\.json: expected 12 numbers of units"):
        Pruner(build("bert"), config).resume(10, tmp_path)


def test_the_card_says_the_scope(tmp_path):
    config = PruningConfig(sparsity=0.8, scope="sensitivity", begin=3, end=8, frequency=1)
    trainer, _ = trained(tmp_path, config)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "scope: `sensitivity`" in card
    assert "with a sparsity for each tensor by how much the loss depends on its weights" in card


# ---- Refused ----


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("build_model", [resnet, mixtral])
def test_layers_whose_inputs_are_not_read_are_refused_by_name(scope, build_model):
    model = build_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=r"weight of a linear layer for a scope that reads inputs, got one of"):
        Pruner(model, PruningConfig(sparsity=0.5, scope=scope), total_steps=10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("scope", SCOPES)
def test_what_gives_no_step_to_read_is_refused(scope):
    config = PruningConfig(sparsity=0.5, scope=scope, begin=0, end=4)
    with pytest.raises(PruningConfigError, match=f"expected 1 or more for '{scope}', which needs the data of one step"):
        Pruner(build(), config, total_steps=10)
    with pytest.raises(PruningConfigError, match="scopes that read inputs cannot be used with torch_compile"):
        check_reads(config, shows_inputs=False)
    with pytest.raises(PruningConfigError, match="expected 'layer' or 'global' with the structure 'neurons'"):
        PruningConfig(sparsity=0.5, scope=scope, structure="neurons")
