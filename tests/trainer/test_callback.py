import pytest
import torch
from models import ARCHITECTURES, bert, bert_examples, mixtral, training_arguments
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from hf_prune import Pruner, PruningCallback, PruningConfig, PruningStateError, PruningTrainer
from hf_prune.saved.masks import MASKS_NAME
from hf_prune.saved.report import make_report

CONFIG = PruningConfig(sparsity=0.7, schedule="linear", begin=2, end=8, frequency=2)


def stock_trainer(directory, config=CONFIG, model=None, callbacks=(), examples=None, eval_dataset=None, **arguments):
    return Trainer(
        model=model if model is not None else bert(),
        args=training_arguments(directory, **arguments),
        train_dataset=examples or bert_examples(),
        eval_dataset=eval_dataset,
        callbacks=[PruningCallback(config), *callbacks],
    )


def callback_of(trainer):
    return next(entry for entry in trainer.callback_handler.callbacks if isinstance(entry, PruningCallback))


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same(first, second):
    assert list(first) == list(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def has_hooks(model):
    return [name for name, parameter in model.named_parameters() if parameter._post_accumulate_grad_hooks]


class Watch(TrainerCallback):
    """Runs a check on the pruner after every optimizer step and every update of the masks."""

    def __init__(self, callback, check):
        self.callback, self.check, self.steps = callback, check, 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.check(self.callback.pruner)

    def on_step_end(self, args, state, control, **kwargs):
        self.check(self.callback.pruner)
        self.steps += 1


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("build", [bert, mixtral])
def test_a_stock_trainer_with_the_callback_trains_what_pruning_trainer_trains(tmp_path, build, accumulation):
    examples = ARCHITECTURES[build.__name__].examples(40)
    arguments = {"max_grad_norm": 0.1, "gradient_accumulation_steps": accumulation}
    torch.manual_seed(3)
    stock = stock_trainer(tmp_path, model=build(), examples=examples, **arguments)
    stock.train()
    torch.manual_seed(3)
    ours = PruningTrainer(
        model=build(),
        args=training_arguments(tmp_path, **arguments),
        train_dataset=examples,
        pruning_config=CONFIG,
    )
    ours.train()
    assert_same(weights_of(stock.model), weights_of(ours.model))
    assert_same(callback_of(stock).pruner.masks, ours.pruner.masks)
    logged = [
        [(entry["step"], entry["loss"], entry["grad_norm"], entry["sparsity"]) for entry in log[:-1]]
        for log in (stock.state.log_history, ours.state.log_history)
    ]
    assert logged[0] == logged[1]
    assert max(grad_norm for _, _, grad_norm, _ in logged[0]) > 0.1


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
def test_masked_weights_are_zero_after_every_step_under_a_stock_trainer(tmp_path, optim):
    trainer = stock_trainer(tmp_path, optim=optim, weight_decay=0.1)

    def check(pruner):
        for name, parameter in pruner.parameters.items():
            assert torch.count_nonzero(parameter[~pruner.masks[name]]) == 0

    watch = Watch(callback_of(trainer), check)
    trainer.add_callback(watch)
    trainer.train()
    assert watch.steps == 10
    assert callback_of(trainer).pruner.sparsity == pytest.approx(0.7, abs=1e-3)


def test_gradients_are_masked_before_they_are_clipped_under_a_stock_trainer(tmp_path):
    norms = []

    class Norms(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            pruner = callback_of(trainer).pruner
            for name, parameter in pruner.parameters.items():
                assert torch.count_nonzero(parameter.grad[~pruner.masks[name]]) == 0
            grads = [parameter.grad for parameter in kwargs["model"].parameters() if parameter.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(grads)))

    trainer = stock_trainer(tmp_path, callbacks=[Norms()], max_grad_norm=1e9)
    trainer.train()
    assert [entry["grad_norm"] for entry in trainer.state.log_history[:-1]] == pytest.approx(norms)


def test_gradients_are_left_alone_once_training_ends(tmp_path):
    trainer = stock_trainer(tmp_path)
    during = []

    class Count(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            during.append(len(has_hooks(kwargs["model"])))

    trainer.add_callback(Count())
    trainer.train()
    assert set(during) == {12}
    assert has_hooks(trainer.model) == []
    model, pruner = trainer.model, callback_of(trainer).pruner
    model.zero_grad()
    model(**ARCHITECTURES["bert"].batch()).loss.backward()
    assert all(torch.count_nonzero(p.grad[~pruner.masks[name]]) for name, p in pruner.parameters.items())


def test_training_that_begins_again_does_not_hook_twice(tmp_path):
    model = bert()
    callback = PruningCallback(CONFIG)
    state = TrainerState(max_steps=10)
    for _ in range(3):
        callback.on_train_begin(training_arguments(tmp_path), state, TrainerControl(), model=model)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in callback.pruner.parameters.values())


def test_training_that_begins_again_on_another_model_leaves_the_first_alone(tmp_path):
    first, second = bert(), bert()
    callback = PruningCallback(CONFIG)
    state = TrainerState(max_steps=10)
    callback.on_train_begin(training_arguments(tmp_path), state, TrainerControl(), model=first)
    callback.on_train_begin(training_arguments(tmp_path), state, TrainerControl(), model=second)
    assert has_hooks(first) == []
    assert len(has_hooks(second)) == 12
    assert callback.pruner.model is second


def test_sparsity_joins_the_log_history_of_a_stock_trainer(tmp_path):
    trainer = stock_trainer(tmp_path, eval_dataset=bert_examples(4), eval_strategy="steps", eval_steps=5)
    trainer.train()
    planned = {update.step: update.sparsity for update in Pruner(bert(), CONFIG).plan(10).updates}
    assert list(planned) == [2, 4, 6, 8]
    logs = trainer.state.log_history
    assert {"loss", "eval_loss", "train_loss"} <= {name for entry in logs for name in entry}
    for entry in logs:
        now = [sparsity for step, sparsity in planned.items() if step <= entry["step"]]
        assert entry["sparsity"] == (now[-1] if now else 0)
        assert entry["target_sparsity"] == planned[8]


def test_a_log_before_training_has_no_sparsity_and_is_no_error(tmp_path):
    trainer = stock_trainer(tmp_path)
    trainer.evaluate(bert_examples(4))
    assert "sparsity" not in trainer.state.log_history[-1]


def test_several_configurations_go_through_the_callback(tmp_path):
    configs = [
        PruningConfig(sparsity=0.5, schedule="one_shot", begin=0),
        PruningConfig(method="random", sparsity=0.6, schedule="one_shot", begin=5),
    ]
    trainer = stock_trainer(tmp_path, configs)
    trainer.train()
    history = [entry["sparsity"] for entry in trainer.state.log_history[:-1]]
    assert history == [0.5] * 4 + [pytest.approx(0.6, abs=1e-3)] * 6


def test_a_pruner_made_beforehand_is_used(tmp_path):
    model = bert()
    pruner = Pruner(model, CONFIG)
    trainer = Trainer(
        model=model,
        args=training_arguments(tmp_path),
        train_dataset=bert_examples(),
        callbacks=[PruningCallback(CONFIG, pruner)],
    )
    trainer.train()
    assert callback_of(trainer).pruner is pruner
    assert pruner.completed_steps == 10


# ---- Checkpoints ----


def test_a_checkpoint_of_a_stock_trainer_has_the_masks_of_its_weights(tmp_path):
    trainer = stock_trainer(tmp_path, save_strategy="steps", save_steps=4)
    trainer.train()
    for step in (4, 8):
        checkpoint = tmp_path / f"checkpoint-{step}"
        weights = load_file(checkpoint / "model.safetensors")
        pruner = Pruner(bert(), CONFIG)
        pruner.load(checkpoint)
        assert pruner.completed_steps == step
        assert pruner.sparsity > 0
        for name, mask in pruner.masks.items():
            assert torch.equal(weights[name] != 0, mask)


def test_resuming_a_stock_trainer_ends_where_the_uninterrupted_run_ends(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0.1}
    whole = stock_trainer(tmp_path, **arguments)
    whole.train()
    resumed = stock_trainer(tmp_path, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(weights_of(whole.model), weights_of(resumed.model))
    assert_same(callback_of(whole).pruner.masks, callback_of(resumed).pruner.masks)


def test_a_second_run_into_the_same_folder_replaces_the_masks_of_the_first(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4}
    stock_trainer(tmp_path, **arguments).train()
    torch.manual_seed(5)
    second = stock_trainer(tmp_path, **arguments)
    second.train()
    pruner = Pruner(bert(), CONFIG)
    pruner.load(tmp_path / "checkpoint-8")
    assert_same(pruner.masks, callback_of(second).pruner.masks)


def test_resuming_from_a_checkpoint_without_masks_is_an_error_that_names_the_file(tmp_path):
    stock_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    (tmp_path / "checkpoint-4" / MASKS_NAME).unlink()
    resumed = stock_trainer(tmp_path)
    with pytest.raises(PruningStateError, match=f"checkpoint-4/{MASKS_NAME}: .*does not exist"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_resuming_from_another_folder_needs_to_know_the_folder(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0.1}
    whole = stock_trainer(tmp_path / "first", **arguments)
    whole.train()
    torch.manual_seed(5)
    stock_trainer(tmp_path / "second", **arguments).train()  # has a checkpoint-4 of its own
    checkpoint = str(tmp_path / "first" / "checkpoint-4")

    resumed = stock_trainer(tmp_path / "second", **arguments)
    with pytest.raises(PruningStateError, match="training was resumed from another checkpoint"):
        resumed.train(resume_from_checkpoint=checkpoint)

    resumed = stock_trainer(tmp_path / "third", **arguments)
    with pytest.raises(
        PruningStateError, match="third/checkpoint-4: expected the checkpoint that training resumes from"
    ):
        resumed.train(resume_from_checkpoint=checkpoint)

    resumed = stock_trainer(tmp_path / "second", **arguments)
    callback_of(resumed).resume_directory = checkpoint
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same(weights_of(whole.model), weights_of(resumed.model))
    assert_same(callback_of(whole).pruner.masks, callback_of(resumed).pruner.masks)


def test_saving_the_pruner_warns_of_masked_weights_that_a_later_callback_changed(tmp_path, caplog):
    class Average(TrainerCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.bert.encoder.layer[0].output.dense.weight.add_(1.0)

    trainer = stock_trainer(tmp_path / "run", callbacks=[Average()])
    trainer.train()
    trainer.save_model(tmp_path / "model")
    pruner = callback_of(trainer).pruner
    pruner.save(tmp_path / "model")
    assert "masked weights of bert.encoder.layer.0.output.dense.weight are not zero" in caplog.text
    caplog.clear()
    pruner.hold_zeros()
    caplog.clear()
    pruner.save(tmp_path / "model")
    assert "not zero" not in caplog.text


def test_a_model_that_a_stock_trainer_saves_is_reported_as_it_was_pruned_once_the_pruner_is_saved_beside_it(tmp_path):
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    trainer = stock_trainer(tmp_path / "run", PruningConfig(sparsity=0.7, exclude=[r".*intermediate.*"]), model)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    assert make_report(tmp_path / "model").prunable_sparsity < 0.5
    pruner = callback_of(trainer).pruner
    pruner.save(tmp_path / "model")
    found = make_report(tmp_path / "model")
    assert [tensor.name for tensor in found.prunable] == [target.name for target in pruner.targets]
    assert found.prunable_sparsity == pruner.sparsity
