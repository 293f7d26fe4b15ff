"""Weights that something else than training changes: noticed, told, and zero again."""

import copy
import logging

import pytest
import torch
from models import bert, bert_examples, training_arguments
from safetensors.torch import load_file
from test_pruner import FIRST, ONE_SHOT, Stack, train
from transformers import Trainer, TrainerCallback

from hf_prune import Pruner, PruningCallback, PruningConfig, PruningTrainer

CONFIG = PruningConfig(sparsity=0.5, **ONE_SHOT)


class Averages(TrainerCallback):
    """An exponential moving average that is written into the model, at this event."""

    def __init__(self, event):
        self.before = None
        setattr(self, event, self.write)

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = copy.deepcopy(kwargs["model"].state_dict())

    def write(self, args, state, control, **kwargs):
        for name, parameter in kwargs["model"].named_parameters():
            parameter.data.copy_(0.5 * self.before[name] + 0.5 * parameter.data)


def zeros_of(pruner, weights):
    return [int((weights[name] != 0)[~mask].sum()) for name, mask in pruner.masks.items()]


@pytest.mark.parametrize("event", ["on_step_end", "on_train_end"])
def test_a_model_whose_weights_a_callback_averaged_is_saved_as_its_masks_say(event, tmp_path, caplog):
    # The average is of weights from before pruning: `Averages` comes first in training, and pruning at step 2.
    config = PruningConfig(sparsity=0.5, schedule="one_shot", begin=2)
    args = training_arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=3)
    trainer = PruningTrainer(
        model=bert(), args=args, train_dataset=bert_examples(), pruning_config=config, callbacks=[]
    )
    trainer.add_callback(Averages(event))
    with caplog.at_level(logging.WARNING, "hf_prune"):
        trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
    assert not any(zeros_of(trainer.pruner, load_file(tmp_path / "saved" / "model.safetensors")))
    assert not any(zeros_of(trainer.pruner, load_file(tmp_path / "checkpoint-3" / "model.safetensors")))
    told = [record.getMessage() for record in caplog.records if "masked weights of" in record.getMessage()]
    assert told
    assert "layer.0.attention.self.query.weight" in told[0]


def test_a_checkpoint_of_a_stock_trainer_says_what_it_holds(tmp_path, caplog):
    config = PruningConfig(sparsity=0.5, schedule="one_shot", begin=1)
    args = training_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    pruning = PruningCallback(config)
    trainer = Trainer(
        model=bert(), args=args, train_dataset=bert_examples(), callbacks=[pruning, Averages("on_step_end")]
    )
    with caplog.at_level(logging.WARNING, "hf_prune"):
        trainer.train()
    assert any("checkpoint-2: the Trainer saved the model before" in record.getMessage() for record in caplog.records)
    assert not any(zeros_of(pruning.pruner, dict(trainer.model.named_parameters())))


def test_the_best_model_of_a_stock_trainer_has_its_zeros_though_its_checkpoint_has_not(tmp_path):
    config = PruningConfig(sparsity=0.5, schedule="one_shot", begin=1)
    args = training_arguments(
        tmp_path, max_steps=2, load_best_model_at_end=True, eval_strategy="steps", save_strategy="steps", save_steps=1
    )
    pruning = PruningCallback(config)
    trainer = Trainer(
        model=bert(),
        args=args,
        train_dataset=bert_examples(),
        eval_dataset=bert_examples(4),
        callbacks=[pruning, Averages("on_step_end")],
    )
    trainer.train()
    assert not any(zeros_of(pruning.pruner, dict(trainer.model.named_parameters())))


@pytest.mark.parametrize("change", ["load_state_dict", "data"])
def test_weights_that_are_loaded_in_the_middle_are_zero_again_after_the_next_step(change, caplog):
    torch.manual_seed(0)
    model = Stack()
    dense = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, CONFIG, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    inputs = torch.randn(3, 8)
    train(pruner, optimizer, lambda: model(inputs), 2)
    if change == "data":
        for name, parameter in model.named_parameters():
            parameter.data = dense[name].clone()
    else:
        model.load_state_dict(dense)
    with caplog.at_level(logging.WARNING, "hf_prune"):
        train(pruner, optimizer, lambda: model(inputs), 1)
    assert not any(zeros_of(pruner, dict(model.named_parameters())))
    [told] = [record.getMessage() for record in caplog.records]
    assert told.startswith(f"32 masked weights of {FIRST}, and weights in 1 more tensors, were not zero: ")
    train(pruner, optimizer, lambda: model(inputs), 1)
    assert pruner.hold_zeros() == 0


def test_a_training_that_nobody_disturbs_is_not_warned(caplog):
    model = Stack()
    pruner = Pruner(model, CONFIG, total_steps=10)
    with caplog.at_level(logging.WARNING, "hf_prune"):
        train(pruner, torch.optim.AdamW(model.parameters(), lr=1e-2), lambda: model(torch.randn(3, 8)), 5)
        assert pruner.hold_zeros() == 0
    assert not caplog.records
