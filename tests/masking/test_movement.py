"""Movement pruning against a plain loop of its own, and what a criterion that lets weights come back must keep."""

import json

import pytest
import torch
from models import ARCHITECTURES, bert, bert_examples, training_arguments
from torch import nn
from transformers import Trainer, TrainerState

import hf_prune
from hf_prune import Pruner, PruningCallback, PruningConfig, PruningConfigError, PruningStateError, PruningTrainer
from hf_prune.masking.readings import check_reads
from hf_prune.saved.masks import read_memory

CONFIG = PruningConfig(method="movement", sparsity=0.6, begin=2, end=8, frequency=1)
PENALISED = PruningConfig(sparsity=0.6, penalty="l1", penalty_weight=0.01)


class Layers(nn.Module):
    """Two layers of a stack, small enough to be pruned by a loop in plain Python."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2)])

    def forward(self, values):
        for layer in self.layers:
            values = values + layer(values)
        return values


def steps(model, pruner, optimizer, count, seed=0):
    """Train; in each step the gradients of the masked model, and the weights after the optimizer, before any update."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        values = torch.randn(32, 8, generator=generator)
        (model(values) - values.flip(1)).square().mean().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in pruner.parameters.items()}
        pruner.mask_gradients()
        assert all(not parameter.grad[~pruner.masks[name]].any() for name, parameter in pruner.parameters.items())
        optimizer.step()
        stepped = {name: parameter.detach().clone() for name, parameter in pruner.parameters.items()}
        pruner.step(optimizer)
        optimizer.zero_grad()
        yield gradients, stepped


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_masks_and_weights_are_those_of_a_plain_loop(scope):
    model = Layers()
    pruner = Pruner(model, PruningConfig(**CONFIG.to_dict() | {"scope": scope}), total_steps=12)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    names = list(pruner.parameters)
    importance = {name: torch.zeros_like(pruner.parameters[name]) for name in names}
    values = {name: pruner.parameters[name].detach().clone() for name in names}  # of masked weights: as they were
    masks = {name: torch.ones_like(importance[name], dtype=torch.bool) for name in names}
    plan = {update.step: update.sparsity for update in pruner.plan().updates}
    came_back = 0
    for step, (gradients, stepped) in enumerate(steps(model, pruner, optimizer, 12), start=1):
        for name in names:
            importance[name] -= values[name] * gradients[name]
            values[name] = torch.where(masks[name], stepped[name], values[name])
        if step in plan:
            check_update(pruner, plan[step], [[name] for name in names] if scope == "layer" else [names], importance)
        else:
            assert all(torch.equal(pruner.masks[name], masks[name]) for name in names)
        for name in names:
            kept = pruner.masks[name]
            came_back += int((kept & ~masks[name]).sum())
            masks[name] = kept.clone()
            assert torch.equal(pruner.parameters[name], torch.where(kept, values[name], 0.0))
    assert came_back > 20
    assert pruner.at_final_sparsity


def check_update(pruner, sparsity, pools, importance):
    """The weights of lowest importance in each pool are masked, the lower index first, as many as was planned."""
    masked = 0
    for pool in pools:
        scores = torch.cat([importance[name].reshape(-1) for name in pool])
        mask = torch.cat([pruner.masks[name].reshape(-1) for name in pool])
        dropped = int((~mask).sum())
        assert sorted(scores.argsort(stable=True)[:dropped].tolist()) == (~mask).nonzero().squeeze(1).tolist()
        masked += dropped
    assert masked / sum(mask.numel() for mask in pruner.masks.values()) == pytest.approx(sparsity, abs=1e-9)


@pytest.mark.parametrize("pattern", ["2:4", "block:4x2"])
def test_units_come_back_too_and_counts_are_exact(pattern):
    model = Layers()
    sparsity = None if pattern == "2:4" else 0.5
    config = PruningConfig(**CONFIG.to_dict() | {"pattern": pattern, "sparsity": sparsity})
    pruner = Pruner(model, config, total_steps=12)
    came_back, before = 0, None
    for _ in steps(model, pruner, torch.optim.AdamW(model.parameters(), lr=0.02), 12):
        if before is not None:
            came_back += sum(int((mask & ~before[name]).sum()) for name, mask in pruner.masks.items())
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
    assert came_back
    for name, mask in pruner.masks.items():
        assert int((~mask).sum()) == mask.numel() // 2
        assert not pruner.parameters[name][~mask].any()


def test_zeros_that_were_there_do_not_come_back():
    model = Layers()
    with torch.no_grad():
        for layer in model.layers:
            layer[0].weight[:4] = 0
    pruner = Pruner(model, CONFIG, total_steps=12)
    for _ in steps(model, pruner, torch.optim.AdamW(model.parameters(), lr=0.02), 12):
        pass
    assert all(not layer[0].weight[:4].any() for layer in model.layers)
    assert pruner.sparsity == pytest.approx(0.6, abs=2e-3)


def trainer_of(directory, config=CONFIG, **arguments):
    torch.manual_seed(0)
    arguments = {"max_steps": 12, "save_strategy": "steps", "save_steps": 1, **arguments}
    args = training_arguments(directory, **arguments)
    return PruningTrainer(model=bert(), args=args, train_dataset=bert_examples(), pruning_config=config)


@pytest.mark.parametrize("step", [1, 5, 8, 10])
def test_resuming_is_bit_identical_before_while_and_after_weights_come_back(tmp_path, step):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert all(torch.equal(mask, resumed.pruner.masks[name]) for name, mask in whole.pruner.masks.items())


def test_a_checkpoint_remembers_until_pruning_ends(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    regions = {name: trainer.pruner._masks.regions[name] for name in trainer.pruner.parameters}
    before, after = (read_memory(tmp_path / f"checkpoint-{step}", regions) for step in (7, 8))
    assert {key.partition("/")[0] for key in before} == {"movement.importance", "movement.masked_values"}
    assert {one.parameter for one in before.values()} == set(regions)
    assert after == {}


def test_masks_stay_where_a_finished_run_is_resumed_with_more_steps(tmp_path):
    trainer = trainer_of(tmp_path, PruningConfig(method="movement", sparsity=0.5, end=0.5))
    trainer.train()
    longer = trainer_of(tmp_path / "longer", PruningConfig(method="movement", sparsity=0.5, end=0.5), max_steps=40)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert longer.state.global_step == 40
    assert all(torch.equal(mask, longer.pruner.masks[name]) for name, mask in trainer.pruner.masks.items())
    assert longer.pruner.at_final_sparsity


def test_memory_of_which_a_part_is_missing_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    regions = dict(trainer.pruner._masks.regions)
    regions.pop(next(iter(regions)))
    with pytest.raises(PruningStateError, match="for every weight of '"):
        read_memory(tmp_path / "checkpoint-5", regions)


def test_a_callback_remembers_what_the_trainer_remembers_where_nothing_is_clipped(tmp_path):
    """Its gradients are seen after they are clipped."""
    ours = trainer_of(tmp_path / "ours", max_grad_norm=0.0)
    ours.train()
    torch.manual_seed(0)
    args = training_arguments(tmp_path / "stock", max_steps=12, max_grad_norm=0.0)
    callback = PruningCallback(CONFIG)
    stock = Trainer(model=bert(), args=args, train_dataset=bert_examples(), callbacks=[callback])
    stock.train()
    assert callback.pruner.sparsity == pytest.approx(0.6, abs=1e-3)
    assert all(torch.equal(mask, callback.pruner.masks[name]) for name, mask in ours.pruner.masks.items())
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, stock.model.state_dict()[name]), name


def test_what_cannot_be_done_is_refused_by_name():
    with pytest.raises(
        PruningConfigError, match=r"methods that read gradients cannot be used with DeepSpeed.*'movement'"
    ):
        check_reads(CONFIG, shows_gradients=False)
    with pytest.raises(PruningConfigError, match=r"begin: .*'movement'"):
        CONFIG.from_dict(CONFIG.to_dict() | {"begin": 0}).window(10)
    model = bert()
    model.requires_grad_(False)
    with pytest.raises(PruningConfigError, match="weights that are not trained, got 'movement'"):
        Pruner(model, CONFIG)


def test_gradients_that_are_never_seen_are_told_at_the_first_update():
    model = bert()
    pruner = Pruner(model, PruningConfig(method="movement", sparsity=0.5, begin=1, end=4), total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**ARCHITECTURES["bert"].batch()).loss.backward()
    with pytest.raises(PruningStateError, match="expected its gradient in the optimizer steps before a mask update"):
        pruner.step(optimizer)  # without mask_gradients


def test_an_older_package_is_told_what_it_cannot_read(tmp_path):
    """The masks stay where they were in the file: what is remembered lies beside them, under other names."""
    trainer = trainer_of(tmp_path)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-5" / "pruning_state.json").read_text())
    assert state["format_version"] == 1
    hf_prune.load_masks(bert(), tmp_path / "checkpoint-5")


@pytest.mark.parametrize(
    ("config", "refused"), [(CONFIG, "method: 'movement'"), (PENALISED, "penalty: must not be set")]
)
def test_fp16_in_a_callback_is_refused_for_what_needs_its_loss_scale(tmp_path, config, refused):
    """The arguments alone say so: fp16 itself needs a GPU."""
    callback = PruningCallback(config)
    args = training_arguments(tmp_path)
    args.fp16 = True
    state, model = TrainerState(max_steps=12), bert()
    with pytest.raises(PruningConfigError, match=f"{refused}.* with fp16 in PruningCallback"):
        callback.on_train_begin(args, state, None, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
