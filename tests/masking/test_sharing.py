"""Weights that share few values in training: how many, from when on, with what is resumed, and what is refused."""

import copy
import json
import logging

import pytest
import torch
from models import ARCHITECTURES, bert, bert_examples, mixtral, training_arguments
from safetensors.torch import load_file
from test_pruner import FIRST, SECOND, Noisy, Stack
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_prune import Pruner, PruningCallback, PruningConfig, PruningConfigError, PruningStateError, PruningTrainer
from hf_prune.masking.sharing import Sharing
from hf_prune.quantise.codebooks import distinct_values, nearest
from hf_prune.quantise.forms import SharedValues
from hf_prune.quantise.kmeans import kmeans

CONFIG = PruningConfig(sparsity=0.5, schedule="linear", begin=2, end=4, frequency=2, shared_values=3)


def values_of(parameter):
    return distinct_values([parameter]).tolist()


def train_step(pruner, optimizer, inputs):
    pruner.model(inputs).backward()
    pruner.mask_gradients()
    optimizer.step()
    pruner.step(optimizer)
    optimizer.zero_grad()


def stack_and_inputs(steps=10):
    torch.manual_seed(0)
    return Stack(), torch.randn(steps, 3, 8)


def test_weights_share_values_from_the_last_mask_update_on():
    model, inputs = stack_and_inputs()
    pruner = Pruner(model, CONFIG, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(10):
        train_step(pruner, optimizer, inputs[step])
        for name, parameter in pruner.parameters.items():
            kept = pruner.masks[name]
            if step + 1 < 4:
                assert distinct_values([parameter], 3) is None
                assert not pruner.codebooks
            else:
                assert values_of(parameter) == pruner.codebooks[name].tolist()
                assert len(values_of(parameter)) == 3
                assert (parameter[kept] != 0).all()
                assert int((parameter == 0).sum()) == 32
    assert pruner.sparsity == 0.5


def test_a_step_is_that_of_a_float_copy_and_each_weight_has_the_mean_of_its_cluster():
    """Straight-through as it is written down elsewhere: the copy is moved, and the model has its clustered values."""
    model, inputs = stack_and_inputs()
    copies = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    sharing = Pruner(model, PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, shared_values=3), total_steps=10)
    codebooks = dict(sharing.codebooks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    moved = 0
    for step in range(5):
        before = {name: parameter.detach().clone() for name, parameter in sharing.parameters.items()}
        sharing.model(inputs[step]).backward()
        gradients = {name: parameter.grad * sharing.masks[name] for name, parameter in sharing.parameters.items()}
        sharing.mask_gradients()
        optimizer.step()
        sharing.step(optimizer)
        optimizer.zero_grad()
        for name, parameter in sharing.parameters.items():
            copies[name] -= 0.3 * gradients[name]
            where = nearest(copies[name], codebooks[name])
            kept = sharing.masks[name]
            codebooks[name] = torch.stack([copies[name][kept & (where == index)].mean() for index in range(3)])
            torch.testing.assert_close(sharing.codebooks[name], codebooks[name])
            expected = codebooks[name][nearest(copies[name], codebooks[name])] * kept
            torch.testing.assert_close(parameter.detach(), expected)
            clusters = [nearest(tensor, codebooks[name])[kept] for tensor in (before[name], parameter.detach())]
            moved += int((clusters[0] != clusters[1]).sum())
    assert moved > 5  # into another cluster


def test_values_are_found_anew_where_no_weight_has_one_any_more():
    model, _ = stack_and_inputs()
    pruner = Pruner(model, PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, shared_values=4), total_steps=10)
    weight, kept = pruner.parameters[FIRST], pruner.masks[FIRST]
    wanted = torch.randn(8, 8).sign() * (5 + torch.rand(8, 8)) * kept
    with torch.no_grad():
        weight.copy_(wanted)  # as by a large step: every weight is outside of all values but the first and the last
    wanted = wanted + pruner._sharing._residuals[FIRST]
    pruner.after_optimizer_step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(pruner.codebooks[FIRST], kmeans(wanted[kept], 4))
    assert len(values_of(weight)) == 4


def test_any_optimizer_leaves_few_values_even_one_that_moves_every_weight_at_random():
    model, inputs = stack_and_inputs()
    pruner = Pruner(model, CONFIG, total_steps=10)
    optimizer = Noisy(model.parameters())
    for step in range(10):
        train_step(pruner, optimizer, inputs[step])
    assert [len(values_of(parameter)) for parameter in pruner.parameters.values()] == [3, 3]
    assert pruner.sparsity == 0.5


def test_weights_of_bfloat16_share_values_that_they_can_have():
    model, inputs = stack_and_inputs()
    model.bfloat16()
    pruner = Pruner(model, CONFIG, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(10):
        train_step(pruner, optimizer, inputs[step].bfloat16())
    assert [len(values_of(parameter)) for parameter in pruner.parameters.values()] == [3, 3]
    for name, parameter in pruner.parameters.items():
        assert parameter.dtype is torch.bfloat16
        assert values_of(parameter) == pruner.codebooks[name].tolist()


def test_fused_experts_share_the_values_of_one_tensor():
    model = mixtral()
    pruner = Pruner(model, PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, shared_values=4), total_steps=1)
    fused = [name for name, parameter in pruner.parameters.items() if parameter.ndim == 3]
    assert fused
    for name in fused:
        assert len(values_of(pruner.parameters[name])) == 4


def test_kept_zeros_and_values_of_a_saved_model_stay(tmp_path):
    first = PruningTrainer(
        model=bert(), args=training_arguments(tmp_path), train_dataset=bert_examples(), pruning_config=CONFIG
    )
    first.train()
    first.save_model(tmp_path / "saved")
    before = {name: parameter.detach().clone() for name, parameter in first.pruner.parameters.items()}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    pruner = Pruner(model, PruningConfig(method="keep", shared_values=3), total_steps=4)
    for name, parameter in pruner.parameters.items():
        assert torch.equal(parameter, before[name])  # nothing is clustered anew before training moves it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = ARCHITECTURES["bert"].batch()
    for _ in range(4):
        model(**batch).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
    for name, parameter in pruner.parameters.items():
        assert not torch.equal(parameter, before[name])
        assert len(values_of(parameter)) <= 3
        assert torch.equal(parameter == 0, before[name] == 0)


def test_each_tensor_has_the_number_of_its_configuration():
    model, _ = stack_and_inputs()
    configs = [
        PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, targets=[FIRST], shared_values=4),
        PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, targets=[SECOND]),
    ]
    pruner = Pruner(model, configs, total_steps=1)
    assert len(values_of(pruner.parameters[FIRST])) == 4
    assert distinct_values([pruner.parameters[SECOND]], 31) is None
    assert list(pruner.codebooks) == [FIRST]


# ---- With a Trainer: files, resuming, the best model ----


def trainer_of(directory, stock=False, callbacks=(), config=CONFIG, **arguments):
    extra = {"callbacks": [PruningCallback(config), *callbacks]} if stock else {"callbacks": list(callbacks)}
    if not stock:
        extra["pruning_config"] = config
    args = training_arguments(directory, **arguments)
    torch.manual_seed(0)
    kind = Trainer if stock else PruningTrainer
    return kind(model=bert(), args=args, train_dataset=bert_examples(), **extra)


def pruner_of(trainer):
    return next(one.pruner for one in trainer.callback_handler.callbacks if isinstance(one, PruningCallback))


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_training_ends_the_same_to_the_bit(step, stock, tmp_path):
    whole = trainer_of(tmp_path / "whole", stock, save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of(tmp_path / "whole", stock, save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name
    for name, codebook in pruner_of(resumed).codebooks.items():
        assert torch.equal(codebook, pruner_of(whole).codebooks[name])
        assert len(codebook) == 3


def test_the_saved_file_has_few_values_and_residuals_are_only_saved_while_they_are_needed(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=5)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    masked = 0
    for folder in (tmp_path / "checkpoint-5", tmp_path / "saved"):
        tensors = load_file(folder / "model.safetensors")
        for name in trainer.pruner.parameters:
            assert len(values_of(tensors[name])) == 3
            assert len(values_of(tensors[name].bfloat16())) <= 3
            masked += int((tensors[name] == 0).sum())
    assert masked == 2 * sum(trainer.pruner.masked.values())
    residuals = [
        [name for name in load_file(tmp_path / folder / "pruning_masks.safetensors") if "residual" in name]
        for folder in ("checkpoint-5", "saved")
    ]
    assert list(map(len, residuals)) == [len(trainer.pruner.parameters), 0]
    state = json.loads((tmp_path / "saved" / "pruning_state.json").read_text())
    assert {len(values) for values in state["codebooks"].values()} == {3}


class Averages(TrainerCallback):
    """Writes an average of the weights into the model after each step, as an EMA does before it is saved."""

    def __init__(self):
        self.averages = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                average = self.averages.setdefault(name, parameter.clone())
                parameter.copy_(average.lerp_(parameter, 0.3))


def test_weights_that_something_else_has_changed_share_values_when_they_are_saved(tmp_path, caplog):
    trainer = trainer_of(tmp_path, callbacks=[Averages()], save_strategy="steps", save_steps=5)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "its weights had more than 3 values" in caplog.text
    for folder in ("checkpoint-5", "checkpoint-10"):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        assert all(len(values_of(tensors[name])) <= 3 for name in trainer.pruner.parameters)


def test_the_values_of_the_best_model_are_its_own(tmp_path):
    evaluations = []

    def later_is_worse(prediction):
        evaluations.append(0)
        return {"worse": len(evaluations)}

    arguments = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "worse",
        "greater_is_better": False,
    }
    trainer = PruningTrainer(
        model=bert(),
        args=training_arguments(tmp_path, **arguments, max_steps=9),
        train_dataset=bert_examples(),
        eval_dataset=bert_examples(4),
        compute_metrics=later_is_worse,
        pruning_config=CONFIG,
    )
    trainer.train()
    assert trainer.state.best_global_step == 6
    trainer.save_model(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    best = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    for name in trainer.pruner.parameters:
        assert torch.equal(saved[name], best[name])
        assert values_of(saved[name]) == trainer.pruner.codebooks[name].tolist()


@pytest.mark.parametrize("first", ["neurons", "weights"])
def test_neurons_weights_and_values_in_one_run(first, tmp_path):
    """What is cut out of the model leaves the values of the rest, and training goes on with them."""
    windows = [{"begin": 1, "end": 2, "frequency": 1}, {"begin": 2, "end": 5, "frequency": 1}]
    windows = windows if first == "neurons" else windows[::-1]
    configs = [
        PruningConfig(structure="neurons", sparsity=0.5, **windows[0]),
        PruningConfig(sparsity=0.5, shared_values=3, **windows[1]),
    ]
    trainer = trainer_of(tmp_path, config=configs if first == "neurons" else configs[::-1])
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert model.config.intermediate_size == 12
    assert len(trainer.pruner.codebooks) == 12
    for name, codebook in trainer.pruner.codebooks.items():
        parameter = model.get_parameter(name)
        assert values_of(parameter) == codebook.tolist(), name
        assert 1 < len(codebook) <= 3, name
        assert float((parameter == 0).float().mean()) > 0.3, name


def test_residuals_of_what_is_left_stay_when_units_are_cut_out():
    torch.manual_seed(0)
    model = bert()
    configs = [
        PruningConfig(structure="neurons", sparsity=0.5, schedule="one_shot", begin=0),
        PruningConfig(sparsity=0.5, schedule="one_shot", begin=0, shared_values=3),
    ]
    pruner = Pruner(model, configs, total_steps=10)
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    rows = pruner.masks[name].any(dim=1)
    before = {key: pruner.codebooks[key] for key in pruner.codebooks}
    weight, residual = pruner.parameters[name].detach().clone(), pruner._sharing._residuals[name].clone()
    pruner.shrink()
    assert pruner.parameters[name].shape == (12, 16)
    assert torch.equal(pruner.parameters[name], weight[rows])
    assert torch.equal(pruner._sharing._residuals[name], residual[rows])
    assert residual[rows].any()
    assert all(torch.equal(codebook, before[key]) for key, codebook in pruner.codebooks.items())


# ---- What is refused ----


def test_what_would_not_save_the_values_is_refused(tmp_path):
    optimizer = type("AdamWScheduleFree", (torch.optim.SGD,), {})
    model, inputs = stack_and_inputs()
    with pytest.raises(PruningConfigError, match=r"shared_values: .*schedule-free"):
        Pruner(model, CONFIG).start(10, optimizer=optimizer(model.parameters(), lr=0.1))
    pruner = Pruner(model, CONFIG, total_steps=10)
    with pytest.raises(PruningConfigError, match=r"shared_values: .*schedule-free"):
        train_step(pruner, optimizer(model.parameters(), lr=0.1), inputs[0])


def test_weights_under_adapters_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query"], r=2))
    with pytest.raises(PruningConfigError, match=r"shared_values: cannot be used for the weights under adapters"):
        Pruner(model, CONFIG)


def test_an_engine_that_does_not_write_weights_is_refused():
    model, _ = stack_and_inputs()
    pruner = Pruner(model, PruningConfig(sparsity=0.5))
    pruner._engine.writes_weights = False
    with pytest.raises(PruningConfigError, match=r"shared_values: cannot be used with adapters='sparse_merge'"):
        Sharing({FIRST: SharedValues(3)}, pruner.parameters, pruner._masks, pruner._engine)


def test_weights_that_are_not_finite_are_refused_by_name():
    model, inputs = stack_and_inputs()
    pruner = Pruner(model, CONFIG, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        train_step(pruner, optimizer, inputs[step])
    with torch.no_grad():
        pruner.parameters[SECOND][pruner.masks[SECOND]] = torch.nan
    with pytest.raises(PruningStateError, match=rf"{SECOND}: expected finite weights"):
        pruner.after_optimizer_step(optimizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codebooks: {**codebooks, FIRST: [0.1, 0.2, 0.3, 0.4]}, "expected at most 3 shared values"),
        (lambda codebooks: {FIRST: codebooks[FIRST]}, "expected shared values of 'layers.1.dense.weight', found none"),
        (lambda codebooks: {**codebooks, FIRST: [0.2, 0.1]}, "expected a list of numbers in ascending order"),
        (lambda codebooks: {**codebooks, "other": [0.1]}, "expected at most 0 shared values of 'other'"),
    ],
)
def test_a_state_with_other_codebooks_is_refused(change, message, tmp_path):
    from hf_prune.saved.pruning_state import _digest_of

    model, inputs = stack_and_inputs()
    pruner = Pruner(model, CONFIG, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        train_step(pruner, optimizer, inputs[step])
    pruner.save(tmp_path)
    path = tmp_path / "pruning_state.json"
    content = json.loads(path.read_text())
    content["codebooks"] = change(content["codebooks"])
    del content["digest"]
    path.write_text(json.dumps(content | {"digest": _digest_of(content)}))
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningStateError, match=message):
        Pruner(model, CONFIG).resume(10, tmp_path)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


# ---- What is told ----


def test_a_plan_says_which_weights_share_values_and_from_when_on():
    model, _ = stack_and_inputs()
    configs = [
        PruningConfig(sparsity=0.5, begin=2, end=4, targets=[FIRST], shared_values=16),
        PruningConfig(sparsity=0.5, begin=2, end=6, targets=[SECOND]),
    ]
    plan = Pruner(model, configs).plan(10)
    assert (plan.shared_values, plan.shared_from) == ({FIRST: 16}, 6)
    assert plan.to_dict()["shared_values"] == {FIRST: 16}
    assert Pruner(model, PruningConfig(sparsity=0.5)).plan(10).shared_from is None
    kept = Pruner(model, PruningConfig(method="keep", shared_values=16)).plan(10)
    assert (len(kept.shared_values), kept.shared_from) == (2, 0)
