"""Scopes that see the dense model: what they see, and what comes of it."""

import copy

import pytest
import torch
from models import LENGTH, VOCABULARY, bert, gpt2, llama, mixtral, resnet, t5

from hf_prune import CalibrationConfig, PruningConfig, PruningConfigError, prune
from hf_prune.errors import CalibrationError
from hf_prune.model.anatomy import blocks_of
from hf_prune.model.names import named_parameters
from hf_prune.model.targets import find_targets
from hf_prune.oneshot.layers import find_layers, matrix_of
from hf_prune.oneshot.lockstep import Lockstep
from hf_prune.oneshot.seen import see_dense
from hf_prune.oneshot.work import WORK_NAME

SETTINGS = CalibrationConfig(batch_size=2)


def tokens(samples=6, length=LENGTH):
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


def seen_of(model, batches, gradients=True):
    """What is seen of a model, and its layers."""
    targets = find_targets(model)
    layers = find_layers(model, targets, dict(named_parameters(model)))
    found = Lockstep(model, batches, targets).discovery.positions
    positions = {layer.target.name: position for layer, position in found.items()}
    return see_dense(model, layers, batches, positions, gradients), layers


@pytest.mark.parametrize("build", [llama, gpt2, mixtral, t5], ids=lambda build: build.__name__)
def test_with_one_token_the_cost_is_the_square_of_weight_times_its_gradient(build):
    """Then the gradient of a weight is that of its output times its input, and both are seen apart."""
    model = build().eval()
    ids = tokens(1, 2)
    labels = torch.tensor([[int(ids[0, 1]), -100]] if build is t5 else [[-100, int(ids[0, 1])]])
    seen, layers = seen_of(model, [{"input_ids": ids, "labels": labels}])
    if build is mixtral:
        model.set_experts_implementation("eager")
    model(input_ids=ids, labels=labels).loss.backward()
    compared = 0
    for layer in layers:
        if "encoder" in layer.target.name or "EncDecAttention.k" in layer.target.name:
            continue  # of T5: these have both tokens of the encoder
        if "EncDecAttention.v" in layer.target.name:
            continue
        gradient = copy.copy(layer)
        object.__setattr__(gradient, "parameter", torch.nn.Parameter(layer.parameter.grad, requires_grad=False))
        for part in range(layer.parts):
            one = seen[layer.target.name][part]
            found = one.squares * one.gradients
            torch.testing.assert_close(found, matrix_of(gradient, part).square(), rtol=1e-3, atol=1e-12)
            assert torch.equal(one.weight, matrix_of(layer, part))
            compared += bool(found.any())
    assert compared >= 8


def test_many_tokens_are_added_up():
    model, batches = llama().eval(), [{"input_ids": rows} for rows in tokens(6).split(3)]
    seen, layers = seen_of(model, batches)
    inputs, outputs = {}, {}
    for layer in layers:

        def keep(module, arguments, output, name=layer.target.name):
            output.retain_grad()
            inputs.setdefault(name, []).append(arguments[0].detach())
            outputs.setdefault(name, []).append(output)

        layer.modules[0].register_forward_hook(keep)
    for batch in batches:
        (model(**batch, labels=batch["input_ids"]).loss * batch["input_ids"].numel()).backward()
    for name, (one,) in seen.items():
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in inputs[name]])
        gradients = torch.cat([part.grad.reshape(-1, part.shape[-1]) for part in outputs[name]])
        torch.testing.assert_close(one.squares, rows.square().mean(0), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(one.gradients[:, 0], gradients.square().sum(0), rtol=1e-4, atol=1e-9)


def test_a_convolution_is_seen_at_all_of_its_positions():
    model = resnet().eval()
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 0])}
    seen, layers = seen_of(model, [batch])
    outputs = {}
    for layer in layers:

        def keep(module, arguments, output, name=layer.target.name):
            output.retain_grad()
            outputs[name] = arguments[0].detach(), output, module

        layer.modules[0].register_forward_hook(keep)
    (model(**batch).loss * 3).backward()
    for name, (one,) in seen.items():
        inputs, output, module = outputs[name]
        expected = output.grad.square().sum((0, 2, 3))
        torch.testing.assert_close(one.gradients[:, 0], expected, rtol=1e-4, atol=1e-9)
        patches = torch.nn.functional.unfold(
            inputs, module.kernel_size, padding=module.padding, stride=module.stride
        ).transpose(1, 2)
        squares = patches.square().mean((0, 1)).view(module.in_channels, -1).t().reshape(-1)
        torch.testing.assert_close(one.squares, squares, rtol=1e-4, atol=1e-9)


def test_the_model_is_left_as_it_was():
    model = llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    seen_of(model, [{"input_ids": tokens()}])
    assert model.training
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_are_the_layers_of_the_outermost_stack():
    model = mixtral()
    names = [target.name for target in find_targets(model)]
    blocks = blocks_of(model, [*names, "lm_head.weight"])
    assert set(blocks.values()) == {"model.layers.0", "model.layers.1", ""}
    assert all(name.startswith(block) for name, block in blocks.items())
    assert blocks["lm_head.weight"] == ""


@pytest.mark.parametrize("scope", ["sensitivity", "owl"])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
def test_the_total_is_exact(scope, method, pattern):
    model = llama()
    config = PruningConfig(method=method, sparsity=0.45, scope=scope, pattern=pattern)
    pruned = prune(model, config, tokens(), SETTINGS)
    unit = 4 if pattern == "block:2x2" else 1
    weights = sum(mask.numel() for mask in pruned.masks.values())
    masked = {name: int((~mask).sum()) for name, mask in pruned.masks.items()}
    assert sum(masked.values()) == round(0.45 * weights / unit) * unit
    assert len({round(count / pruned.masks[name].numel(), 2) for name, count in masked.items()}) > 1
    parameters = dict(model.named_parameters())
    assert all(not bool(parameters[name][~mask].any()) for name, mask in pruned.masks.items())


def test_overrides_stand_beside_what_a_scope_divides():
    config = PruningConfig(method="wanda", sparsity=0.5, scope="sensitivity", overrides={".*down_proj.*": 0.25})
    pruned = prune(llama(), config, tokens(), SETTINGS)
    down = [mask for name, mask in pruned.masks.items() if "down_proj" in name]
    others = [mask for name, mask in pruned.masks.items() if "down_proj" not in name]
    assert all(int((~mask).sum()) == mask.numel() // 4 for mask in down)
    assert sum(int((~mask).sum()) for mask in others) == round(0.5 * sum(mask.numel() for mask in others))


def taught():
    """A small model that has learned to count in steps of five, whose last two layers do next to nothing."""
    torch.manual_seed(0)
    model = llama(num_hidden_layers=4)
    idle = [
        weight
        for layer in model.model.layers[2:]
        for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)
    ]
    with torch.no_grad():
        for weight in idle:
            weight.mul_(0.01).requires_grad_(False)
    optimizer = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=0.01)
    data = counted(64, seed=1)
    for _ in range(150):
        loss = model(input_ids=data, labels=data).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def counted(samples, seed):
    starts = torch.randint(0, VOCABULARY, (samples, 1), generator=torch.Generator().manual_seed(seed))
    return (starts + 5 * torch.arange(LENGTH)) % VOCABULARY


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_sensitivity_loses_less_than_equal_shares_where_tensors_differ(method):
    dense, data = taught(), counted(64, seed=3)
    models = {"dense": dense}
    for scope in ("layer", "sensitivity"):
        models[scope] = copy.deepcopy(dense)
        config = PruningConfig(method=method, sparsity=0.7, scope=scope)
        prune(models[scope], config, counted(16, seed=2), SETTINGS)
    with torch.no_grad():
        losses = {name: float(model(input_ids=data, labels=data).loss) for name, model in models.items()}
    assert losses["sensitivity"] - losses["dense"] < 0.7 * (losses["layer"] - losses["dense"])


class StoppedError(Exception):
    pass


def test_a_run_is_resumed_with_the_counts_that_were_decided(tmp_path):
    dense = llama()
    config = PruningConfig(method="sparsegpt", sparsity=0.5, scope="sensitivity")
    whole = copy.deepcopy(dense)
    prune(whole, config, tokens(), SETTINGS)

    def stop(number, total, layer):
        if number == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        prune(copy.deepcopy(dense), config, tokens(), SETTINGS, directory=tmp_path, progress=stop)
    counts = tmp_path / WORK_NAME / "counts.json"
    for is_there in (True, False):
        resumed = copy.deepcopy(dense)
        if not is_there:
            counts.unlink()
        prune(resumed, config, tokens(), SETTINGS, directory=tmp_path, resume=True)
        assert all(torch.equal(*both) for both in zip(whole.parameters(), resumed.parameters(), strict=True))
        assert counts.exists()
    counts.write_text("broken")
    with pytest.raises(CalibrationError, match="expected the counts of a run"):
        prune(copy.deepcopy(dense), config, tokens(), SETTINGS, directory=tmp_path, resume=True)


def test_labels_are_needed_where_the_model_does_not_predict_its_own_input():
    batches = [{"input_ids": tokens(), "attention_mask": torch.ones_like(tokens())}]
    config = PruningConfig(method="wanda", sparsity=0.5, scope="sensitivity")
    model = bert()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CalibrationError, match="expected batches with labels"):
        prune(model, config, batches, SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    batches[0]["labels"] = torch.tensor([0, 1, 0, 1, 1, 0])
    assert prune(model, config, batches, SETTINGS).sparsity == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("scope", ["sensitivity", "owl"])
def test_groups_leave_nothing_to_divide(scope):
    with pytest.raises(PruningConfigError, match="fixes the sparsity of every tensor"):
        PruningConfig(method="sparsegpt", pattern="2:4", scope=scope)
