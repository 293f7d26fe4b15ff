import math

import pytest
import torch
from models import ARCHITECTURES, bert, bert_examples, gpt2, training_arguments
from peft import LoraConfig
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_prune import Pruner, PruningCallback, PruningConfig, PruningConfigError, PruningTrainer
from hf_prune.methods.penalties import PENALTIES

WINDOW = {"sparsity": 0.5, "schedule": "linear", "begin": 2, "end": 6, "frequency": 2}


def config(penalty="l1", weight=0.01, **changes):
    return PruningConfig(**WINDOW | {"penalty": penalty, "penalty_weight": weight} | changes)


# ---- Values and gradients ----


@pytest.mark.parametrize("sides", [(1, 1), (1, 4), (4, 1), (2, 3)])
@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_are_those_of_autograd(name, sides):
    weights = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    weights[0, :4, :6] = 0
    traced = weights.clone().requires_grad_()
    PENALTIES[name].value(traced + 1e-30 * traced, sides).backward()
    expected = traced.grad.nan_to_num(0.0)  # autograd has none for a norm of zero
    torch.testing.assert_close(PENALTIES[name].gradient(weights, sides), expected)


def test_values_are_the_sums_that_they_are_named_after():
    weights = torch.tensor([[[3.0, 1.0], [-4.0, 0.0]]])
    assert float(PENALTIES["l1"].value(weights, (1, 1))) == 8
    assert float(PENALTIES["l2"].value(weights, (1, 1))) == 13
    assert float(PENALTIES["group_lasso"].value(weights, (2, 1))) == pytest.approx(math.sqrt(2) * (5 + 1))
    assert float(PENALTIES["group_lasso"].value(weights, (1, 1))) == 8


def test_weights_of_bfloat16_are_penalised_in_float32():
    weights = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    for penalty in PENALTIES.values():
        assert penalty.value(weights, (2, 2)).dtype == torch.float32
        assert penalty.gradient(weights, (2, 2)).dtype == torch.float32


# ---- In training ----


class Gradients(TrainerCallback):
    """The weights and gradients of each step, before they are clipped."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {name: (weight.detach().clone(), weight.grad.clone()) for name, weight in model.named_parameters()}
        )


def steps_of(directory, pruning_config, model=bert, examples=None, trainer=PruningTrainer, **arguments):
    torch.manual_seed(0)
    built = model()
    for module in built.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    seen = Gradients()
    changes = {"max_steps": 8, "max_grad_norm": 0, "learning_rate": 0.0, "logging_steps": 1} | arguments
    made = trainer(
        model=built,
        args=training_arguments(directory, **changes),
        train_dataset=examples or bert_examples(64),
        callbacks=[seen],
        pruning_config=pruning_config,
    )
    made.train()
    return made, seen.steps


# With steps that have completed, what the linear schedule from step 2 to 6 leaves of the weight.
FACTORS = [0, 0, 0, 0.25, 0.5, 0.75, 0, 0]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("penalty", "pattern"),
    [("l1", "unstructured"), ("l2", "unstructured"), ("group_lasso", "block:4x1"), ("group_lasso", "2:4")],
)
def test_gradients_are_those_of_the_task_and_of_the_penalty_by_the_schedule(tmp_path, penalty, pattern, accumulation):
    changes = {"pattern": pattern} | ({"sparsity": None} if pattern == "2:4" else {})
    batches = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    with_penalty, steps = steps_of(tmp_path / "with", config(penalty, **changes), **batches)
    plain = PruningConfig(**WINDOW | changes)
    _, without = steps_of(tmp_path / "without", plain, **batches)
    targets = {target.name for target in with_penalty.pruner.targets}
    sides = with_penalty.pruner.configs[0].parsed_pattern.sides
    logs = [entry for entry in with_penalty.state.log_history if "loss" in entry]
    for factor, step, before, log in zip(FACTORS, steps, without, logs, strict=True):
        total = 0.0
        for name, (weight, gradient) in step.items():
            expected = before[name][1]
            assert torch.equal(weight, before[name][0])  # nothing is learned: the masks are the same
            if name in targets:
                traced = weight.clone().requires_grad_()
                value = 0.01 * factor * PENALTIES[penalty].value(traced[None], sides)
                total += float(value.detach())
                value.backward()
                expected = expected + traced.grad.nan_to_num(0.0)
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)
        assert log.get(f"{penalty}_penalty", 0.0) == pytest.approx(total, rel=1e-4)


def test_weights_of_another_layout_are_penalised_in_its_units(tmp_path):
    examples = ARCHITECTURES["gpt2"].examples(64)
    _, steps = steps_of(tmp_path / "a", config("group_lasso", pattern="block:4x1"), gpt2, examples)
    _, before = steps_of(tmp_path / "b", PruningConfig(**WINDOW | {"pattern": "block:4x1"}), gpt2, examples)
    name = "transformer.h.0.mlp.c_fc.weight"  # (in, out)
    (weight, gradient), (_, plain) = steps[4][name], before[4][name]
    expected = 0.5 * 0.01 * PENALTIES["group_lasso"].gradient(weight.t()[None], (4, 1))[0].t()
    torch.testing.assert_close(gradient - plain, expected, rtol=1e-3, atol=1e-7)


def test_gradients_that_taylor_ranks_by_are_without_penalties(tmp_path):
    """Nothing is learned in these steps, so the masks can only differ by the gradients that were read."""
    trainers = [
        steps_of(tmp_path / str(weight), config(weight=weight, method="taylor"))[0].pruner for weight in (1e-9, 10.0)
    ]
    for one, other in zip(trainers[0].parameters.values(), trainers[1].parameters.values(), strict=True):
        assert torch.equal(one == 0, other == 0)
    assert trainers[0].sparsity == 0.5


def test_a_penalty_makes_the_weights_that_are_to_go_smaller(tmp_path):
    arguments = {"learning_rate": 1e-2, "optim": "adamw_torch", "max_steps": 40}
    window = {"begin": 2, "end": 30, "frequency": 4}

    def size(directory, **changes):
        trainer, _ = steps_of(tmp_path / directory, PruningConfig(**WINDOW | window | changes), **arguments)
        assert trainer.pruner.sparsity == 0.5
        return sum(float(weight.detach().abs().sum()) for weight in trainer.pruner.parameters.values())

    assert size("with", penalty="l1", penalty_weight=0.05) < 0.8 * size("without")


def test_a_callback_adds_penalties_after_the_clip(tmp_path):
    def stock(pruning_config=None, callbacks=(), **arguments):
        return Trainer(**arguments, callbacks=[PruningCallback(pruning_config), *callbacks])

    _, ours = steps_of(tmp_path / "ours", config("l2"))
    _, theirs = steps_of(tmp_path / "theirs", config("l2"), trainer=stock)
    for one, other in zip(ours, theirs, strict=True):
        for name, (_, gradient) in one.items():
            torch.testing.assert_close(gradient, other[name][1], rtol=1e-4, atol=1e-7)


def test_a_loop_of_ones_own_penalises_once_a_step():
    torch.manual_seed(0)
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, config("l1", begin=0, end=4, frequency=1), total_steps=6)
    batch = {name: torch.stack([one[name] for one in bert_examples(4)]) for name in ("input_ids", "labels")}
    for _ in range(2):
        model(**batch).loss.backward()
        pruner.mask_gradients()
        pruner.mask_gradients()
        pruner.step(optimizer)
        optimizer.zero_grad()
    model(**batch).loss.backward()
    name, parameter = next(iter(pruner.parameters.items()))
    before = parameter.grad.clone().masked_fill(~pruner.masks[name], 0)
    pruner.mask_gradients()
    pruner.mask_gradients()
    torch.testing.assert_close(parameter.grad, before + 0.01 * 0.5 * parameter.detach().sign())
    assert set(pruner.penalties) == {"l1_penalty"}


# ---- What is refused ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"penalty": "l3"}, "penalty: expected one of l1, l2, group_lasso or None, got 'l3'"),
        ({"penalty_weight": None}, "penalty_weight: expected a number greater than 0 with a penalty, got None"),
        ({"penalty_weight": -1}, "penalty_weight: expected a number greater than 0"),
        ({"penalty": None}, "penalty_weight: must not be set without a penalty, got 0.01"),
        ({"schedule": "one_shot"}, "penalty: must not be set with method 'keep' or schedule 'one_shot'"),
    ],
)
def test_a_penalty_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(PruningConfigError, match=message):
        config(**{"weight": 0.01} | {("weight" if key == "penalty_weight" else key): v for key, v in changes.items()})


def test_penalties_on_what_is_not_trained_are_refused(tmp_path):
    with pytest.raises(PruningConfigError, match="penalty: must not be set for weights that are not trained, got 'l1'"):
        PruningTrainer(
            model=ARCHITECTURES["llama"].build(),
            args=training_arguments(tmp_path),
            train_dataset=ARCHITECTURES["llama"].examples(8),
            pruning_config=config(),
            peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
        )
