import hashlib
import inspect
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import transformers
from models import ARCHITECTURES, bert, bert_examples, mixtral, t5, training_arguments
from safetensors.torch import load_file
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.optimization import Adafactor

from hf_prune import (
    Pruner,
    PruningCallback,
    PruningConfig,
    PruningConfigError,
    PruningMixin,
    PruningStateError,
    PruningTrainer,
    TargetError,
)
from hf_prune.errors import LaunchError
from hf_prune.model.names import named_parameters
from hf_prune.saved.masks import MASKS_NAME

CONFIG = PruningConfig(sparsity=0.7, schedule="linear", begin=2, end=8, frequency=2)
AT_ONCE = PruningConfig(sparsity=0.5, schedule="one_shot", begin=0)


class PruningSeq2SeqTrainer(PruningMixin, Seq2SeqTrainer):
    pass


def pruning_trainer(
    directory, config=CONFIG, model=None, examples=None, eval_dataset=None, optimizers=None, **arguments
):
    return PruningTrainer(
        model=model if model is not None else bert(),
        args=training_arguments(directory, **arguments),
        train_dataset=examples or bert_examples(),
        eval_dataset=eval_dataset,
        optimizers=optimizers or (None, None),
        pruning_config=config,
    )


def weights_of(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def assert_same(first, second):
    assert list(first) == list(second)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def assert_masked_weights_are_zero(pruner):
    for name, parameter in pruner.parameters.items():
        assert torch.count_nonzero(parameter[~pruner.masks[name]]) == 0, name


def steps_logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class Events(TrainerCallback):
    """Calls a function at each event that is named; add it after the trainer is made, so that it comes last."""

    def __init__(self, **functions):
        for event, function in functions.items():
            setattr(self, event, self._calling(function))

    @staticmethod
    def _calling(function):
        def call(args, state, control, **kwargs):
            function(state, kwargs)

        return call


# ---- The Trainer that it is ----


@pytest.mark.parametrize(
    ("ours", "stock"), [(PruningTrainer, Trainer), (PruningSeq2SeqTrainer, Seq2SeqTrainer)], ids=["trainer", "seq2seq"]
)
def test_the_signature_is_the_stock_one_with_keyword_only_additions(ours, stock):
    ours, stock = (list(inspect.signature(cls).parameters.values()) for cls in (ours, stock))
    additions = [parameter for parameter in ours if parameter not in stock]
    assert [parameter for parameter in ours if parameter not in additions] == stock
    assert [parameter.name for parameter in additions] == [
        "pruning_config",
        "peft_config",
        "teacher_model",
        "distillation_config",
    ]
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in additions)
    assert additions[0].default is None


def test_a_subclass_without_a_constructor_of_its_own_shows_the_same_signature():
    class Further(PruningTrainer):
        pass

    assert inspect.signature(Further) == inspect.signature(PruningTrainer)


def test_a_subclass_with_a_constructor_of_its_own_shows_that():
    class Own(PruningTrainer):
        def __init__(self, model, extra=1):
            super().__init__(model=model)

    assert list(inspect.signature(Own).parameters) == ["model", "extra"]


@pytest.mark.parametrize(
    "method",
    [
        "compute_loss",
        "create_optimizer",
        "training_step",
        "log",
        "save_model",
        "_save",
        "_load_from_checkpoint",
        "create_model_card",
        "push_to_hub",
    ],
)
def test_methods_take_what_the_stock_trainers_take(method):
    stock = inspect.signature(getattr(Trainer, method)).parameters.values()
    ours = inspect.signature(getattr(PruningTrainer, method))
    keyword_only = {p.name: None for p in stock if p.kind is inspect.Parameter.KEYWORD_ONLY}
    names = [p.name for p in stock if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    ours.bind(*names, **keyword_only)
    ours.bind(names[0], **dict.fromkeys(names[1:]), **keyword_only)


def test_without_a_configuration_there_is_no_callback_of_ours(tmp_path):
    arguments = {"model": bert(), "args": training_arguments(tmp_path)}
    stock, ours = Trainer(**arguments), PruningTrainer(**arguments)
    assert [type(entry) for entry in ours.callback_handler.callbacks] == [
        type(entry) for entry in stock.callback_handler.callbacks
    ]
    assert ours.pruner is None
    with_configuration = PruningTrainer(**arguments, pruning_config=CONFIG)
    assert [type(entry) for entry in with_configuration.callback_handler.callbacks] == [
        *(type(entry) for entry in stock.callback_handler.callbacks),
        PruningCallback,
    ]


def test_without_a_configuration_training_is_the_stock_trainers_bit_for_bit(tmp_path):
    runs = []
    for cls in (Trainer, PruningTrainer):
        torch.manual_seed(3)
        directory = tmp_path / cls.__name__
        arguments = training_arguments(directory, max_grad_norm=0.1, save_strategy="steps", save_steps=5)
        trainer = cls(model=bert(), args=arguments, train_dataset=bert_examples())
        trainer.train()
        trainer.save_model()
        files = sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))
        runs.append((weights_of(trainer.model), trainer.state.log_history[:-1], files))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]
    assert not [name for name in runs[1][2] if "pruning" in name]


def test_a_configuration_that_does_not_fit_the_model_is_an_error_when_the_trainer_is_made(tmp_path):
    with pytest.raises(TargetError, match=r"nearest is 'classifier\.weight'"):
        pruning_trainer(tmp_path, PruningConfig(sparsity=0.5, targets=["clasifier.weight"]))


def test_an_end_beyond_the_last_step_is_an_error_before_training(tmp_path):
    trainer = pruning_trainer(tmp_path, PruningConfig(sparsity=0.5, begin=2, end=11))
    before = weights_of(trainer.model)
    with pytest.raises(PruningConfigError, match=r"end: expected at most the last step of training \(10\), got 11"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert_same(before, weights_of(trainer.model))


class Regression(nn.Module):
    """Nothing in it is prunable by default."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, inputs, labels):
        return {"loss": (self.linear(inputs).squeeze(-1) - labels).square().mean()}


def test_nothing_prunable_is_a_warning_and_training_is_the_stock_trainers(tmp_path, caplog):
    examples = [{"inputs": torch.randn(4), "labels": torch.randn(())} for _ in range(8)]
    runs = []
    for cls, extra in ((Trainer, {}), (PruningTrainer, {"pruning_config": CONFIG})):
        torch.manual_seed(3)
        args = training_arguments(tmp_path / cls.__name__, save_strategy="steps", save_steps=5)
        trainer = cls(model=Regression(), args=args, train_dataset=examples, **extra)
        trainer.train()
        runs.append((weights_of(trainer.model), trainer.state.log_history[:-1]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    warnings = [record for record in caplog.records if record.name.startswith("hf_prune")]
    assert warnings
    assert all(record.levelno == logging.WARNING and "Nothing to prune" in record.message for record in warnings)


# ---- Every optimizer step ----


def noisy(parameters):
    class Noisy(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
                    self.state[parameter]["moment"] = torch.randn_like(parameter)

    return Noisy(parameters, {"lr": 1e-2})


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda parameters: Adafactor(
        parameters, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.1
    ),
    "noisy": noisy,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_weights_and_moments_are_zero_after_every_optimizer_step(tmp_path, name):
    model = bert()
    optimizer = OPTIMIZERS[name](model.parameters())
    trainer = pruning_trainer(tmp_path, model=model, optimizers=(optimizer, None))
    checked = []

    def check(state, kwargs):
        pruner = trainer.pruner
        assert_masked_weights_are_zero(pruner)
        for key, parameter in pruner.parameters.items():
            for value in optimizer.state[parameter].values():
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    assert torch.count_nonzero(value[~pruner.masks[key]]) == 0
                    checked.append(state.global_step)

    trainer.add_callback(Events(on_optimizer_step=check, on_step_end=check))
    trainer.train()
    assert set(checked) == set(range(11))
    assert trainer.pruner.sparsity == trainer.pruner.plan().final_sparsity == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_to_exactly_its_planned_sparsity(tmp_path, name):
    architecture = ARCHITECTURES[name]
    model = architecture.build()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    trainer = pruning_trainer(tmp_path, AT_ONCE, model, architecture.examples(), max_steps=2)
    planned = trainer.pruner.plan()
    trainer.train()
    assert trainer.pruner.masked == {tensor.name: tensor.weights // 2 for tensor in planned.tensors}
    assert_masked_weights_are_zero(trainer.pruner)
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes


def test_gradients_are_masked_before_they_are_clipped(tmp_path):
    """The logged norm is that of the masked gradients, and so is what is clipped to `max_grad_norm`."""
    seen = []
    trainer = pruning_trainer(tmp_path, AT_ONCE, max_grad_norm=1e9, gradient_accumulation_steps=2)

    def measure(state, kwargs):
        for name, parameter in trainer.pruner.parameters.items():
            assert torch.count_nonzero(parameter.grad[~trainer.pruner.masks[name]]) == 0
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])))

    trainer.add_callback(Events(on_pre_optimizer_step=measure))
    trainer.train()
    assert len(seen) == 10
    assert [entry["grad_norm"] for entry in steps_logged(trainer)] == pytest.approx(seen)


def test_gradients_are_masked_once_a_step_and_not_by_hooks(tmp_path):
    hooks = []
    trainer = pruning_trainer(tmp_path, AT_ONCE, max_steps=2)

    def count(state, kwargs):
        hooks.extend(name for name, p in trainer.model.named_parameters() if p._post_accumulate_grad_hooks)

    trainer.add_callback(Events(on_step_begin=count))
    trainer.train()
    assert trainer.state.global_step == 2
    assert hooks == []


def test_clipped_gradients_have_the_norm_that_was_asked_for(tmp_path):
    seen = []
    trainer = pruning_trainer(tmp_path, AT_ONCE, max_grad_norm=0.01)

    def measure(state, kwargs):
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters()])))

    trainer.add_callback(Events(on_pre_optimizer_step=measure))
    trainer.train()
    assert seen == pytest.approx([0.01] * 10, rel=1e-3)


def test_steps_are_optimizer_steps_under_gradient_accumulation(tmp_path):
    trainer = pruning_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    planned = {update.step: update.sparsity for update in trainer.pruner.plan().updates}
    assert list(planned) == [2, 4, 6, 8]
    trainer.train()
    for entry in steps_logged(trainer):
        now = [sparsity for step, sparsity in planned.items() if step <= entry["step"]]
        assert entry["sparsity"] == (now[-1] if now else 0)
    assert trainer.pruner.completed_steps == trainer.state.global_step == 10


def test_one_shot_at_zero_prunes_before_the_first_step(tmp_path):
    first = []
    trainer = pruning_trainer(tmp_path, AT_ONCE)

    def check(state, kwargs):
        if state.global_step == 0:
            first.append(trainer.pruner.sparsity)
            assert_masked_weights_are_zero(trainer.pruner)

    trainer.add_callback(Events(on_step_begin=check))
    trainer.train()
    assert first == [0.5]


def test_masked_weights_are_zero_in_bfloat16_training(tmp_path):
    trainer = pruning_trainer(tmp_path, bf16=True)
    trainer.add_callback(Events(on_step_end=lambda state, kwargs: assert_masked_weights_are_zero(trainer.pruner)))
    trainer.train()
    assert trainer.pruner.sparsity == trainer.pruner.target_sparsity > 0.69


def test_base_weights_under_adapters_are_pruned_while_the_adapters_train(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(bert(), LoraConfig(r=2, target_modules=["query", "value"]))
    trainer = pruning_trainer(tmp_path, model=model, label_names=["labels"])
    before = weights_of(model)
    dense = {name: parameter.detach().clone() for name, parameter in named_parameters(model)}
    trainer.train()
    assert len(trainer.pruner.masked) == 12
    assert_masked_weights_are_zero(trainer.pruner)
    adapters = [name for name in before if "lora_" in name]
    assert adapters
    assert all(not torch.equal(before[name], model.state_dict()[name]) for name in adapters)
    after = dict(named_parameters(model))
    for name, mask in trainer.pruner.masks.items():
        assert torch.equal(dense[name] * mask, after[name])


def test_several_configurations_go_through_the_trainer(tmp_path):
    configs = [
        PruningConfig(sparsity=0.5, schedule="one_shot", begin=0),
        PruningConfig(method="random", sparsity=0.6, schedule="one_shot", begin=5),
    ]
    trainer = pruning_trainer(tmp_path, configs)
    trainer.train()
    assert [entry["sparsity"] for entry in steps_logged(trainer)] == [0.5] * 4 + [pytest.approx(0.6, abs=1e-3)] * 6


# ---- Steps known beforehand ----


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": 7},
        {"max_steps": 7, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 2},
        {"num_train_epochs": 1.5, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 0.5, "per_device_train_batch_size": 3},
        {"num_train_epochs": 3, "dataloader_drop_last": True},
        {"num_train_epochs": 1, "per_device_train_batch_size": 64},
        {"num_train_epochs": 1, "gradient_accumulation_steps": 64},
    ],
    ids=str,
)
def test_a_plan_before_training_knows_the_steps_that_training_takes(tmp_path, arguments):
    arguments = {"max_steps": -1} | arguments
    trainer = pruning_trainer(tmp_path, AT_ONCE, examples=bert_examples(22), **arguments)
    plan = trainer.pruner.plan()
    assert plan.final_sparsity == 0.5
    trainer.train()
    assert trainer.state.max_steps == trainer.state.global_step == plan.total_steps
    assert trainer.pruner.plan().total_steps == plan.total_steps


def test_a_plan_before_training_changes_nothing(tmp_path):
    trainer = pruning_trainer(tmp_path)
    before = weights_of(trainer.model)
    assert [update.step for update in trainer.pruner.plan().updates] == [2, 4, 6, 8]
    assert trainer.pruner.plan(20).total_steps == 20
    assert trainer.pruner.sparsity == 0
    assert trainer.pruner.total_steps is None
    assert_same(before, weights_of(trainer.model))


def test_a_plan_without_data_to_tell_the_steps_asks_for_them(tmp_path):
    trainer = PruningTrainer(
        model=bert(), args=training_arguments(tmp_path, max_steps=-1), pruning_config=PruningConfig(sparsity=0.5)
    )
    with pytest.raises(PruningConfigError, match="total_steps"):
        trainer.pruner.plan()
    assert trainer.pruner.plan(100).updates[-1].step == 50


# ---- Logs ----


def test_sparsity_is_logged_beside_loss_and_learning_rate(tmp_path):
    trainer = pruning_trainer(tmp_path, eval_dataset=bert_examples(4), eval_strategy="steps", eval_steps=5)
    planned = {update.step: update.sparsity for update in trainer.pruner.plan().updates}
    trainer.train()
    assert len(steps_logged(trainer)) == 10
    for entry in trainer.state.log_history:
        now = [sparsity for step, sparsity in planned.items() if step <= entry["step"]]
        assert entry["sparsity"] == (now[-1] if now else 0)
        assert entry["target_sparsity"] == planned[8]
    assert {"loss", "learning_rate", "grad_norm"} <= set(steps_logged(trainer)[0])
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [5, 10]


def test_sparsity_is_in_tensorboard_event_files(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = pruning_trainer(tmp_path, report_to="tensorboard")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    for name in ("loss", "learning_rate", "sparsity", "target_sparsity"):
        scalars = [(event.step, event.value) for event in events.Scalars(f"train/{name}")][:10]
        assert scalars == [(entry["step"], pytest.approx(entry[name])) for entry in steps_logged(trainer)]
    assert events.Scalars("train/sparsity")[0].value == 0
    assert events.Scalars("train/sparsity")[9].value == pytest.approx(0.7, abs=1e-3)


# ---- Saved models ----


OPEN_PLAINLY = """
import hashlib, json, sys
import transformers

answers = []
for name, directory in json.loads(sys.argv[1]):
    model, info = getattr(transformers, name).from_pretrained(directory, output_loading_info=True)
    zeros = {key: hashlib.sha256((p == 0).numpy().tobytes()).hexdigest() for key, p in model.named_parameters()}
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    answers.append({"class": type(model).__name__, "zeros": zeros, "problems": problems})
assert not [name for name in sys.modules if name.startswith("hf_prune")]
print(json.dumps(answers))
"""


def test_a_plain_from_pretrained_without_this_package_opens_the_exact_zeros(tmp_path):
    trainers = {}
    for build in (bert, mixtral):
        directory = tmp_path / build.__name__
        trainer = pruning_trainer(directory, model=build(), examples=ARCHITECTURES[build.__name__].examples(40))
        trainer.train()
        trainer.save_model(directory)
        trainers[str(directory)] = trainer
    saved = [(type(trainer.model).__name__, directory) for directory, trainer in trainers.items()]
    answer = subprocess.run(
        [sys.executable, "-c", OPEN_PLAINLY, json.dumps(saved)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    for opened, trainer in zip(json.loads(answer.stdout), trainers.values(), strict=True):
        assert opened["class"] == type(trainer.model).__name__
        assert opened["problems"] == {}
        assert list(opened["zeros"]) == [name for name, _ in trainer.model.named_parameters()]
        for name, mask in trainer.pruner.masks.items():
            assert opened["zeros"][name] == hashlib.sha256((~mask).numpy().tobytes()).hexdigest()


def test_the_saved_state_dict_and_configuration_are_those_of_an_unpruned_model(tmp_path):
    trainer = pruning_trainer(tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "pruned")
    bert().save_pretrained(tmp_path / "plain")
    pruned, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "plain"))
    assert {name: (w.shape, w.dtype) for name, w in pruned.items()} == {
        name: (w.shape, w.dtype) for name, w in plain.items()
    }
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("pruned", "plain")]
    assert configs[0].keys() - configs[1].keys() <= {"problem_type"}
    suffixes = {path.suffix for path in (tmp_path / "pruned").iterdir() if "pruning" in path.name}
    assert suffixes == {".json", ".safetensors"}


def test_a_saved_model_has_its_masks_beside_it(tmp_path):
    trainer = pruning_trainer(tmp_path)
    trainer.train()
    for directory in (tmp_path / "elsewhere", tmp_path):
        trainer.save_model(None if directory == tmp_path else directory)
        pruner = Pruner(bert(), CONFIG)
        pruner.load(directory)
        assert_same(pruner.masks, trainer.pruner.masks)


def test_a_model_saved_before_training_has_its_masks_too(tmp_path):
    trainer = pruning_trainer(tmp_path)
    trainer.save_model(tmp_path / "early")
    pruner = Pruner(bert(), CONFIG)
    pruner.load(tmp_path / "early")
    assert pruner.sparsity == 0


# ---- Checkpoints ----


def test_checkpoints_have_the_masks_of_their_weights(tmp_path):
    trainer = pruning_trainer(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    sparsities = []
    for step in (3, 6, 9, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        weights = load_file(checkpoint / "model.safetensors")
        pruner = Pruner(bert(), CONFIG)
        pruner.resume(10, checkpoint)
        assert pruner.completed_steps == step
        sparsities.append(pruner.sparsity)
        for name, mask in pruner.masks.items():
            assert torch.equal(weights[name] != 0, mask)
    assert sparsities[0] == 0
    assert sparsities[1] > 0.4
    assert sparsities[2] == sparsities[3] == trainer.pruner.sparsity


def optimizer_state(trainer):
    return [value for state in trainer.optimizer.state.values() for value in state.values()]


def test_a_resumed_run_ends_bit_identical_to_one_that_was_not_interrupted(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 5, "max_grad_norm": 0.1}
    whole = pruning_trainer(tmp_path / "whole", **arguments)
    whole.train()
    resumed = pruning_trainer(tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(weights_of(whole.model), weights_of(resumed.model))
    assert_same(whole.pruner.masks, resumed.pruner.masks)
    assert all(torch.equal(a, b) for a, b in zip(optimizer_state(whole), optimizer_state(resumed), strict=True))
    assert whole.state.log_history[:-1] == resumed.state.log_history[:-1]
    assert resumed.pruner.completed_steps == 10


def test_resuming_from_a_checkpoint_without_masks_is_an_error_that_names_the_file(tmp_path):
    pruning_trainer(tmp_path, save_strategy="steps", save_steps=5).train()
    (tmp_path / "checkpoint-5" / MASKS_NAME).unlink()
    with pytest.raises(PruningStateError, match=f"checkpoint-5/{MASKS_NAME}: .*does not exist"):
        pruning_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


# ---- Trained again ----


def test_training_twice_holds_the_zeros_of_the_first_time(tmp_path):
    trainer = pruning_trainer(tmp_path)
    trainer.train()
    masks = dict(trainer.pruner.masks)
    trainer.add_callback(Events(on_step_end=lambda state, kwargs: assert_masked_weights_are_zero(trainer.pruner)))
    before = weights_of(trainer.model)
    trainer.train()
    assert_same(masks, trainer.pruner.masks)
    assert len(steps_logged(trainer)) == 10
    assert {entry["sparsity"] for entry in steps_logged(trainer)} == {trainer.pruner.target_sparsity}
    assert not torch.equal(before["classifier.weight"], trainer.model.state_dict()["classifier.weight"])


def test_a_model_made_anew_for_each_training_is_pruned_from_dense_each_time(tmp_path):
    models = []

    def model_init():
        torch.manual_seed(len(models))
        models.append(bert())
        return models[-1]

    trainer = PruningTrainer(
        model_init=model_init,
        args=training_arguments(tmp_path),
        train_dataset=bert_examples(),
        pruning_config=CONFIG,
    )
    for _ in range(2):
        trainer.train()
        assert trainer.model is models[-1]
        assert trainer.pruner.model is trainer.model
        assert steps_logged(trainer)[0]["sparsity"] == 0
        assert trainer.pruner.sparsity == pytest.approx(0.7, abs=1e-3)
        assert_masked_weights_are_zero(trainer.pruner)
        assert all(trainer.model.get_parameter(name) is p for name, p in trainer.pruner.parameters.items())
    assert len(models) >= 2


# ---- Other Trainer classes ----


def test_the_mixin_makes_a_pruning_trainer_of_another_trainer(tmp_path):
    examples = ARCHITECTURES["t5"].examples(8)
    model = t5()
    trainer = PruningSeq2SeqTrainer(
        model=model,
        args=training_arguments(
            tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=6
        ),
        train_dataset=examples,
        eval_dataset=examples[:4],
        pruning_config=CONFIG,
    )
    assert isinstance(trainer, Seq2SeqTrainer)
    trainer.train()
    assert len(trainer.pruner.masked) == 32
    assert_masked_weights_are_zero(trainer.pruner)
    assert steps_logged(trainer)[-1]["sparsity"] == trainer.pruner.target_sparsity
    assert "eval_loss" in trainer.evaluate()
    trainer.save_model()
    opened = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    for name, mask in trainer.pruner.masks.items():
        assert torch.equal(opened.get_parameter(name) != 0, mask)


def test_the_mixin_without_a_configuration_leaves_the_other_trainer_as_it_is(tmp_path):
    trainer = PruningSeq2SeqTrainer(
        model=t5(),
        args=training_arguments(tmp_path, Seq2SeqTrainingArguments),
        train_dataset=ARCHITECTURES["t5"].examples(8),
    )
    trainer.train()
    assert trainer.pruner is None
    assert "sparsity" not in trainer.state.log_history[0]


def test_launched_processes_that_do_not_train_together_are_refused(tmp_path, monkeypatch):
    """As `accelerate launch` on a machine without accelerators does without use_cpu: each would train alone."""
    args = training_arguments(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"expected 2 processes to train together.*got 1.*use_cpu"):
        PruningTrainer(
            model=bert(), args=args, train_dataset=bert_examples(), pruning_config=PruningConfig(sparsity=0.5)
        )
