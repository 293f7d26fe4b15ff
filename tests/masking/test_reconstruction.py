"""Layers that read removed units, solved anew: against stacked least squares, and what holds beside it."""

import logging

import pytest
import torch
from models import ARCHITECTURES, bert, gpt2, llama, mixtral, training_arguments

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningTrainer, TargetError
from hf_prune.masking.collectors import Statistics
from hf_prune.masking.readings import check_reads
from hf_prune.methods.reconstructions import InputMoments, least_squares
from hf_prune.structure.coupled import find_families


def config(**changes):
    values = {"structure": "neurons", "method": "wanda", "sparsity": 0.5, "reconstruction": "least_squares"}
    return PruningConfig(**values | {"schedule": "one_shot", "begin": 1} | changes)


def heads(**changes):
    return llama(num_attention_heads=4, num_key_value_heads=2, **changes)


BUILD = {"bert": bert, "llama": llama, "gpt2": gpt2, "heads": heads}


def build(kind):
    torch.manual_seed(0)
    model = BUILD[kind]()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def batches(kind):
    """Two batches, one of them with padding."""
    architecture = ARCHITECTURES["llama" if kind == "heads" else kind]
    found = []
    for part in architecture.batch(32)["input_ids"].split(16):
        mask = torch.ones_like(part)
        mask[3, 5:] = 0
        found.append({"input_ids": part, "attention_mask": mask})
    return found


def inputs_by_hand(model, readers, data):
    """What each of these layers gets, without padding (tokens, features), in float64."""
    seen = {name: [] for name in readers}
    for batch in data:
        hooks = [
            model.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
                lambda module, arguments, name=name, batch=batch: seen[name].append(
                    arguments[0][batch["attention_mask"].bool()].detach().double()
                )
            )
            for name in readers
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


@pytest.mark.parametrize("kind", BUILD)
def test_what_reads_removed_units_is_their_least_squares_solution(kind):
    model = build(kind)
    structure = "heads" if kind == "heads" else "neurons"
    groups = [group for family in find_families(model, structure) for group in family.groups]
    names = [group.readers[0].name for group in groups]
    data = batches(kind)
    inputs = inputs_by_hand(model, names, data)
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    pruner = Pruner(model, config(structure=structure), total_steps=2)
    for batch in data:
        model(**batch)  # micro-batches of one step
    pruner.step()
    for name in names:
        turn = (lambda tensor: tensor.T) if kind == "gpt2" else (lambda tensor: tensor)
        old, new = turn(before[name]).double(), turn(model.state_dict()[name]).double()
        kept = turn(pruner.masks[name]).any(0)
        assert int(kept.sum()) == kept.numel() // 2
        assert not new[:, ~kept].any()
        x, bias = inputs[name], name.replace("weight", "bias")
        lost = x[:, ~kept] @ old[:, ~kept].T
        centred, target = x[:, kept], lost
        if bias in before:
            centred, target = centred - centred.mean(0), lost - lost.mean(0)
        squares = centred.square().mean(0)
        ridge = 2 * len(squares) / len(x) * squares + 1e-6 * squares.mean()
        stacked = torch.cat([centred / len(x) ** 0.5, ridge.sqrt().diag()])
        wanted = torch.cat([target / len(x) ** 0.5, torch.zeros(int(kept.sum()), len(old)).double()])
        change = torch.linalg.lstsq(stacked, wanted).solution.T
        assert torch.allclose(new[:, kept], old[:, kept] + change, atol=1e-5), name
        assert change.abs().max() > 1e-4
        if bias in before:
            shift = (lost - x[:, kept] @ change.T).mean(0)
            assert torch.allclose(model.state_dict()[bias].double(), before[bias].double() + shift, atol=1e-5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(pruner.masks) | {
        name.replace("weight", "bias") for name in names if name.replace("weight", "bias") in before
    }


def test_units_that_others_equal_cost_nothing():
    torch.manual_seed(0)
    x = torch.randn(20_000, 4).double() + 3.0
    x = torch.cat([x, x], dim=1)
    weight, kept = torch.randn(3, 8).double(), torch.arange(8) < 4
    means = x.mean(0)
    moments = InputMoments(20_000, means, ((x - means).T @ (x - means)).float())
    for has_bias in (False, True):
        new, shift = least_squares(weight, kept, moments, has_bias)
        assert not new[:, ~kept].any()
        before, lost = x @ weight.T, x[:, ~kept] @ weight[:, ~kept].T
        assert (x @ new.T + shift - before).norm() < 0.03 * lost.norm()


def test_inputs_that_are_all_zero_change_nothing():
    weight, kept = torch.randn(3, 4).double(), torch.tensor([True, True, False, False])
    moments = InputMoments(5, torch.zeros(4).double(), torch.zeros(4, 4))
    new, shift = least_squares(weight, kept, moments, has_bias=True)
    assert torch.equal(new, weight * kept)
    assert not shift.any()


def test_rounding_that_leaves_the_moments_indefinite_raises_the_ridge():
    weight, kept = torch.ones(1, 3).double(), torch.tensor([True, True, False])
    products = torch.tensor([[1.0, 1.05, 0.5], [1.05, 1.0, 0.3], [0.5, 0.3, 1.0]])  # kept: an eigenvalue of -0.05
    moments = InputMoments(400, torch.zeros(3).double(), 400 * products)
    new, _ = least_squares(weight, kept, moments, has_bias=False)
    products = products.double()
    expected = torch.linalg.solve(products[:2, :2] + 0.1 * torch.eye(2), products[:2, 2])  # 10 times 2 * 2 / 400
    assert torch.allclose(new[0, :2] - 1, expected, rtol=1e-3)


def test_few_tokens_change_little():
    torch.manual_seed(0)
    weight, kept = torch.randn(5, 40).double(), torch.arange(40) < 30
    x, other = torch.randn(2, 15, 40).double()
    moments = InputMoments(15, torch.zeros(40).double(), (x.T @ x).float())
    new, _ = least_squares(weight, kept, moments, has_bias=False)
    lost = other @ weight.T - other @ (weight * kept).T
    assert (other @ weight.T - other @ new.T).norm() < 1.1 * lost.norm()  # of tokens that were not seen


def test_units_that_are_gone_stay_zero_over_many_updates_and_steps():
    model = build("bert")
    gradual = config(schedule="linear", begin=1, end=4, frequency=1, sparsity=0.75)
    pruner = Pruner(model, gradual, total_steps=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(6):
        model(**ARCHITECTURES["bert"].batch()).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        for name, mask in pruner.masks.items():
            assert not model.get_parameter(name)[~mask].any()
            assert not optimizer.state[model.get_parameter(name)]["exp_avg"][~mask].any()
    assert pruner.sparsity == 0.75
    pruner.shrink(optimizer)
    assert model.config.intermediate_size == 6


def test_a_masked_bias_stays_zero():
    model = build("bert")
    names = [f"bert.encoder.layer.{index}.output.dense.bias" for index in range(2)]
    with torch.no_grad():
        model.get_parameter(names[0])[:8] = 0
    pruner = Pruner(model, [PruningConfig(method="keep", targets=names), config()], total_steps=2)
    for batch in batches("bert"):
        model(**batch)
    pruner.step()
    bias = model.get_parameter(names[0])
    assert not bias[:8].any()
    assert bias[8:].all()


def test_moments_are_summed_in_float32_under_autocast():
    model, data = build("llama"), batches("llama")
    statistics = Statistics(model, {"model.layers.1.mlp.down_proj.weight": "reconstruction"})
    statistics.begin(products=["model.layers.1.mlp.down_proj.weight"])
    seen = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0][data[len(seen)]["attention_mask"].bool()].double())
    )
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    [moments] = statistics.finish().moments.values()
    x = torch.cat(seen)
    centred = x - x.mean(0)
    expected = centred.T @ centred
    assert moments.tokens == len(x) == 250
    rounding = 1e-5 * expected.abs().max()  # of float32; sums in bfloat16 are off by a hundred times as much
    assert torch.allclose(moments.products.double(), expected, rtol=1e-4, atol=float(rounding))


def test_how_many_tokens_were_read_is_logged(caplog):
    model = build("llama")
    pruner = Pruner(model, config(), total_steps=2)
    for batch in batches("llama"):
        model(**batch)
    with caplog.at_level(logging.INFO, logger="hf_prune"):
        pruner.step()
    assert "2 layers were solved anew from 250 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"structure": "layers"}, "must not be set with a structure other than neurons or heads"),
        ({"reconstruction": "least_square"}, "did you mean 'least_squares'"),
        ({"reconstruction": 3}, "expected one of least_squares or None, got 3"),
    ],
)
def test_configurations_that_cannot_be_are_refused(changes, message):
    with pytest.raises(PruningConfigError, match=message):
        config(**changes)


def test_it_needs_the_tokens_of_a_step():
    with pytest.raises(PruningConfigError, match="1 or more for 'least_squares', which needs the data of one step"):
        Pruner(build("llama"), config(method="magnitude", begin=0), total_steps=2)


def test_fused_experts_are_refused_by_name():
    with pytest.raises(TargetError, match=r"down_proj: expected the weight of a linear layer for a reconstruction"):
        Pruner(mixtral(), config(method="magnitude"), total_steps=2)


def test_a_compiled_model_is_refused():
    with pytest.raises(PruningConfigError, match="reconstruction: reads inputs and cannot be used with torch_compile"):
        check_reads(config(method="magnitude"), shows_inputs=False)


def test_a_run_that_is_resumed_ends_with_the_same_weights(tmp_path):
    saved = []
    for resume in (False, True):
        torch.manual_seed(0)
        trainer = PruningTrainer(
            model=build("bert"),
            args=training_arguments(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=6),
            train_dataset=ARCHITECTURES["bert"].examples(32),
            pruning_config=config(schedule="linear", begin=1, end=4, frequency=1),
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2") if resume else None)
        saved.append(dict(trainer.model.state_dict()))
    assert saved[0]["bert.encoder.layer.0.output.dense.weight"].shape == (16, 12)
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
