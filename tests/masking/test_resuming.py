"""Resuming with another number of steps: what should have been pruned by then is pruned after the next step."""

import json

import pytest
import torch
from accelerate import Accelerator
from models import bert, bert_examples, training_arguments
from test_pruner import FIRST, Stack, train
from transformers import Trainer

from hf_prune import Pruner, PruningCallback, PruningConfig, PruningStateError, PruningTrainer

# Each is pruned to the end at step 20 of 40, and at step 8 of 16.
CONFIGS = {
    "magnitude": {"sparsity": 0.75},
    "random": {"sparsity": 0.75, "method": "random"},
    "global": {"sparsity": 0.75, "scope": "global"},
    "erk": {"sparsity": 0.75, "scope": "erk"},
    "one_shot": {"sparsity": 0.75, "schedule": "one_shot", "begin": 0.3},
    "taylor": {"sparsity": 0.75, "method": "taylor"},
    "movement": {"sparsity": 0.75, "method": "movement"},
    "2:4": {"pattern": "2:4"},
    "block": {"sparsity": 0.75, "pattern": "block:4x1"},
    "penalty": {"sparsity": 0.75, "penalty": "l1", "penalty_weight": 0.01},
}


def run(pruner, optimizer, steps):
    inputs = torch.randn(3, 8)
    train(pruner, optimizer, lambda: pruner.model(inputs), steps)


def stopped_at(directory, configs, step, total):
    """A model, and its pruner saved after so many of the steps."""
    torch.manual_seed(0)
    model = Stack()
    pruner = Pruner(model, configs, total_steps=total)
    run(pruner, torch.optim.AdamW(model.parameters(), lr=1e-2), step)
    pruner.save(directory)
    return model, pruner


def resumed(directory, model, configs, total):
    pruner = Pruner(model, configs)
    pruner.resume(total, directory)
    return pruner, torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_fewer_steps_prune_at_the_first_step_what_should_have_been_pruned(name, tmp_path):
    config = PruningConfig(**{"begin": 0.1, "end": 0.5, "frequency": 0.05} | CONFIGS[name])
    model, before = stopped_at(tmp_path, config, step=10, total=40)
    assert not before.at_final_sparsity
    pruner, optimizer = resumed(tmp_path, model, config, total=16)
    assert not pruner.at_final_sparsity
    run(pruner, optimizer, 1)
    final = float(config.parsed_pattern.unit_sparsity) if name == "2:4" else 0.75
    assert pruner.sparsity == final
    assert pruner.at_final_sparsity
    if name == "2:4":
        kept = pruner.masks[FIRST].reshape(-1, 4).sum(1)
        assert (kept == 2).all()
    masks = {key: mask.clone() for key, mask in pruner.masks.items()}
    run(pruner, optimizer, 5)
    assert all(torch.equal(masks[key], mask) for key, mask in pruner.masks.items())


def test_configurations_one_after_another_are_all_made_up_for(tmp_path):
    configs = [
        PruningConfig(sparsity=0.25, begin=0.1, end=0.2, frequency=0.05),
        PruningConfig(sparsity=0.5, method="random", begin=0.3, end=0.4, frequency=0.05),
    ]
    model, _ = stopped_at(tmp_path, configs, step=10, total=100)
    pruner, optimizer = resumed(tmp_path, model, configs, total=20)
    run(pruner, optimizer, 1)
    assert pruner.sparsity == 0.5
    assert pruner.at_final_sparsity


def test_the_same_number_of_steps_makes_no_update_of_its_own(tmp_path):
    config = PruningConfig(sparsity=0.75, schedule="linear", begin=0.1, end=0.5, frequency=0.2)
    model, before = stopped_at(tmp_path, config, step=10, total=40)
    pruner, optimizer = resumed(tmp_path, model, config, total=40)
    run(pruner, optimizer, 1)
    assert pruner.sparsity == before.sparsity


def test_a_state_of_an_earlier_version_does_not_say_what_is_finished(tmp_path):
    config = PruningConfig(sparsity=0.75, begin=0.1, end=0.5, frequency=0.05)
    for step, finished in ((10, False), (30, True)):
        model, _ = stopped_at(tmp_path, config, step=step, total=40)
        path = tmp_path / "pruning_state.json"
        content = json.loads(path.read_text())
        for name in ("finished", "mask_files", "digest"):
            del content[name]
        path.write_text(json.dumps(content))
        pruner, _ = resumed(tmp_path, model, config, total=40)
        assert pruner.at_final_sparsity is finished


def test_a_training_with_no_step_left_is_refused_with_both_numbers(tmp_path):
    config = PruningConfig(sparsity=0.75)
    model, _ = stopped_at(tmp_path, config, step=10, total=40)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(PruningStateError, match=r"after 10 of 40 optimizer steps.*this training has 10 steps"):
        resumed(tmp_path, model, config, total=10)
    assert all(map(torch.equal, weights, model.parameters()))


@pytest.mark.parametrize("stock", [False, True])
def test_a_trainer_resumed_in_fewer_steps_ends_at_the_final_sparsity(stock, tmp_path):
    config = PruningConfig(sparsity=0.8)

    def make(steps):
        args = training_arguments(tmp_path, max_steps=steps, save_strategy="steps", save_steps=4)
        extra = {"callbacks": [PruningCallback(config)]} if stock else {"pruning_config": config}
        trainer_class = Trainer if stock else PruningTrainer
        return trainer_class(model=bert(), args=args, train_dataset=bert_examples(), **extra)

    first = make(20)
    first.train()
    again = make(8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    pruner = next(
        callback.pruner for callback in again.callback_handler.callbacks if isinstance(callback, PruningCallback)
    )
    assert pruner.sparsity == pytest.approx(0.8, abs=2e-3)
    assert pruner.at_final_sparsity


def test_the_pattern_of_a_schedule_that_did_not_end_is_not_at_final_sparsity():
    """The updates that were made decide, not the number of a step."""
    model = Stack()
    pruner = Pruner(model, PruningConfig(pattern="2:4", begin=1, end=4, frequency=1), total_steps=4)
    run(pruner, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    assert not pruner.at_final_sparsity
    run(pruner, torch.optim.SGD(model.parameters(), lr=0.1), 1)
    assert pruner.at_final_sparsity


# ---- Loops of one's own that count wrongly ----


def test_more_steps_than_the_training_has_are_an_error():
    model = Stack()
    pruner = Pruner(model, PruningConfig(sparsity=0.5), total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(pruner, optimizer, 4)
    with pytest.raises(PruningStateError, match="at most the 4 optimizer steps"):
        run(pruner, optimizer, 1)


def test_micro_batches_under_accumulate_are_not_counted():
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = accelerator.prepare(Stack())
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    pruner = Pruner(model, PruningConfig(sparsity=0.5, begin=1, end=3, frequency=1), total_steps=3)
    for _ in range(6):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(3, 8)))
            pruner.mask_gradients()
            optimizer.step()
            pruner.step(optimizer)
            optimizer.zero_grad()
    assert pruner.completed_steps == 3
    assert pruner.sparsity == 0.5


@pytest.mark.parametrize("penalty", [None, "l2"])
@pytest.mark.parametrize("method", ["taylor", "movement"])
def test_what_methods_read_under_accumulate_is_of_the_whole_batch(method, penalty):
    options = {"penalty": penalty, "penalty_weight": 0.5} if penalty else {}
    config = PruningConfig(method=method, sparsity=0.5, begin=1, end=6, frequency=1, **options)
    masks = []
    for parts in (1, 2):
        torch.manual_seed(0)
        accelerator = Accelerator(gradient_accumulation_steps=parts, cpu=True)
        model = accelerator.prepare(Stack())
        optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
        pruner = Pruner(model, config, total_steps=6)
        for batch in torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(1)):
            for micro_batch in batch.chunk(parts):
                with accelerator.accumulate(model):
                    accelerator.backward(parts * model(micro_batch))  # a sum
                    pruner.mask_gradients()
                    optimizer.step()
                    pruner.step(optimizer)
                    optimizer.zero_grad()
        masks.append(pruner.masks)
    assert all(torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())
