import itertools
import json
import logging
import struct
from fractions import Fraction

import pytest
import torch
from models import ARCHITECTURES, bert, resnet
from safetensors.torch import save_file
from torch import nn
from transformers.optimization import Adafactor

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningStateError, TargetError
from hf_prune.config.pruning import load_frozen
from hf_prune.engines.optimizers import ELEMENTWISE_OPTIMIZERS
from hf_prune.masking import selection
from hf_prune.methods.criteria import Piece, random

TOTAL_STEPS = 10
# Updates after 2, 5 and 8 of ten steps.
WINDOW = {"schedule": "linear", "begin": 2, "end": 8, "frequency": 3}
ONE_SHOT = {"schedule": "one_shot", "begin": 0}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.Linear(width, width)


class Stack(nn.Module):
    """Two square matrices, pruned under the names `layers.0.dense.weight` and `layers.1.dense.weight`."""

    def __init__(self, width=8, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, hidden):
        for layer in self.layers:
            hidden = torch.tanh(layer.dense(hidden))
        return hidden.square().sum()


FIRST, SECOND = "layers.0.dense.weight", "layers.1.dense.weight"


class Noisy(torch.optim.Optimizer):
    """Moves every weight at random, whatever its gradient, and keeps a moment that is never zero."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
                self.state[parameter]["moment"] = torch.randn_like(parameter)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "adafactor": lambda parameters: Adafactor(
        parameters, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9, weight_decay=0.1
    ),
    "noisy": Noisy,
}


def train(pruner, optimizer, loss_of, steps, after_step=None):
    """A loop of one's own, as the documentation of `Pruner` has it."""
    for _ in range(steps):
        loss_of().backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        if after_step is not None:
            after_step()


def assert_masked_weights_are_zero(pruner):
    for name, parameter in pruner.parameters.items():
        masked = parameter.detach()[~pruner.masks[name]]
        assert torch.count_nonzero(masked) == 0, name
        assert not torch.signbit(masked).any(), f"{name} has a negative zero"


def assert_moments_are_zero(pruner, optimizer):
    checked = 0
    for name, parameter in pruner.parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                assert torch.count_nonzero(value[~pruner.masks[name]]) == 0, f"{key} of {name}"
                checked += 1
    assert checked


def assert_counts_are_true(pruner):
    for name, mask in pruner.masks.items():
        assert mask.dtype == torch.bool
        assert pruner.masked[name] == int((~mask).sum()), name


def set_weights(pruner, values):
    with torch.no_grad():
        for name, value in values.items():
            pruner.parameters[name].copy_(value)


def make_sparse(model, shares):
    """Zero the first share of each named tensor."""
    with torch.no_grad():
        for name, share in shares.items():
            weight = model.get_parameter(name).view(-1)
            weight[: round(share * weight.numel())] = 0


# ---- How many ----


SCOPES_AND_PATTERNS = [
    ("layer", "unstructured"),
    ("global", "unstructured"),
    ("erk", "unstructured"),
    ("layer", "block:2x2"),
    ("global", "block:2x2"),
    ("erk", "block:4x1"),
    ("layer", "2:4"),
    ("layer", "1:4"),
]


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_after_every_update_are_exact_and_those_of_the_plan(name, method):
    model = ARCHITECTURES[name].build()
    dense = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    for scope, pattern in SCOPES_AND_PATTERNS:
        model.load_state_dict(dense, strict=False)
        final = {"2:4": 0.5, "1:4": 0.75}.get(pattern, 0.37)
        sparsity = None if pattern in ("2:4", "1:4") else final
        config = PruningConfig(method=method, sparsity=sparsity, scope=scope, pattern=pattern, **WINDOW)
        pruner = Pruner(model, config, TOTAL_STEPS)
        plan = pruner.plan()
        assert [update.step for update in plan.updates] == [2, 5, 8]
        planned = {update.step: update.sparsity for update in plan.updates}
        weights = sum(target.weights for target in pruner.targets)
        size = {"unstructured": 1, "block:2x2": 4, "block:4x1": 4, "2:4": 4, "1:4": 4}[pattern]
        dropped_of_unit = {"2:4": 2, "1:4": 3}.get(pattern, size)
        for step in range(1, TOTAL_STEPS + 1):
            for parameter in pruner.parameters.values():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            pruner.step()
            assert_masked_weights_are_zero(pruner)
            assert_counts_are_true(pruner)
            if step in planned:
                share = Fraction(str(final * ((step - 2) / 6))) * size / dropped_of_unit
                if scope == "layer":
                    for target in pruner.targets:
                        assert pruner.masked[target.name] == round(share * (target.weights // size)) * dropped_of_unit
                else:
                    assert sum(pruner.masked.values()) == round(share * (weights // size)) * dropped_of_unit
                assert pruner.sparsity == planned[step]
        assert pruner.sparsity == plan.final_sparsity == pruner.target_sparsity
        for tensor in plan.tensors:
            assert tensor.masked == 0
            if scope == "global":
                assert tensor.final_sparsity is None
            else:
                assert tensor.final_sparsity == pruner.masked[tensor.name] / tensor.weights


@pytest.mark.parametrize("scope", ["layer", "global", "erk"])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
def test_counts_are_exact_when_all_scores_are_equal(scope, pattern):
    model = Stack(width=10)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    pruner = Pruner(model, PruningConfig(sparsity=0.45, scope=scope, pattern=pattern, **ONE_SHOT), TOTAL_STEPS)
    # 0.45 of 25 blocks is 11.25, of 50 blocks 22.5, half to even.
    expected = {"unstructured": 90, "block:2x2": 4 * 22}[pattern]
    assert sum(pruner.masked.values()) == expected
    if scope == "layer":
        first = torch.ones(100, dtype=torch.bool)
        first[:45] = False
        if pattern == "unstructured":
            assert torch.equal(pruner.masks[FIRST], first.reshape(10, 10))
    if scope == "global":
        assert pruner.masked[FIRST] == min(100, expected)


def test_counts_are_exact_in_bfloat16_where_most_scores_are_ties():
    model = ARCHITECTURES["llama"].build().bfloat16()
    pruner = Pruner(model, PruningConfig(sparsity=0.77, scope="global", **ONE_SHOT), TOTAL_STEPS)
    weights = sum(target.weights for target in pruner.targets)
    assert sum(pruner.masked.values()) == round(Fraction("0.77") * weights)
    assert_masked_weights_are_zero(pruner)


def test_an_override_sets_the_sparsity_of_its_tensors_and_the_first_match_wins():
    model = Stack(layers=4)
    overrides = {r"layers\.0\..*": 0.25, r"layers\.[01]\..*": 0.75}
    for scope in ("layer", "global", "erk"):
        config = PruningConfig(sparsity=0.5, scope=scope, overrides=overrides, **ONE_SHOT)
        masked = list(Pruner(model, config, TOTAL_STEPS).masked.values())
        assert masked[:2] == [16, 48]
        assert sum(masked[2:]) == 64
        model = Stack(layers=4)


# ---- Which ----


def naive_drop(scores, count):
    """Keys of the `count` lowest scores; equal ones in the order of their keys."""
    return set(sorted(scores, key=lambda key: (scores[key], key))[:count])


def tied_weights(shape, generator):
    """Weights that are one of 1 to 4 in magnitude: many ties, no zeros."""
    magnitude = torch.randint(1, 5, shape, generator=generator)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (magnitude * sign).float()


def with_tied_weights(model, config):
    generator = torch.Generator().manual_seed(7)
    for target in Pruner(model, config).targets:
        model.get_parameter(target.name).data = tied_weights(target.shape, generator)
    return Pruner(model, config)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "gpt_oss", "resnet"])
def test_masks_equal_a_naive_ranking(name, scope, method):
    config = PruningConfig(method=method, sparsity=0.43, scope=scope, pruning_seed=3, **ONE_SHOT)
    pruner = with_tied_weights(ARCHITECTURES[name].build(), config)
    scores = {}
    for number, target in enumerate(pruner.targets):
        flat = pruner.parameters[target.name].detach().reshape(-1)
        values = flat.abs() if method == "magnitude" else random(flat, Piece(target.name, 0, 3))
        scores[target.name] = {(number, index): value for index, value in enumerate(values.tolist())}
    if scope == "layer":
        drops = {key: naive_drop(values, round(Fraction("0.43") * len(values))) for key, values in scores.items()}
    else:
        together = {key: value for values in scores.values() for key, value in values.items()}
        dropped = naive_drop(together, round(Fraction("0.43") * len(together)))
        drops = dict.fromkeys(scores, dropped)
    pruner.start(TOTAL_STEPS)
    for name, values in scores.items():
        assert pruner.masks[name].reshape(-1).tolist() == [key not in drops[name] for key in values]


@pytest.mark.parametrize(
    ("name", "tensor", "vectors"),
    [
        # Every function lists the vectors of weights that feed one output: groups of four inputs lie along them.
        ("bert", "bert.encoder.layer.1.output.dense.weight", lambda w: list(w)),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", lambda w: list(w.t())),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", lambda w: [row for expert in w for row in expert]),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", lambda w: [row for expert in w for row in expert.t()]),
        (
            "resnet",
            "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight",
            lambda w: [w[:, :, y, x][out] for y in range(3) for x in range(3) for out in range(w.shape[0])],
        ),
    ],
)
def test_two_of_four_keeps_the_two_largest_of_every_four_inputs(name, tensor, vectors):
    pruner = with_tied_weights(ARCHITECTURES[name].build(), PruningConfig(pattern="2:4", **ONE_SHOT))
    weight = pruner.parameters[tensor].detach().clone()
    pruner.start(TOTAL_STEPS)
    for before, mask in zip(vectors(weight), vectors(pruner.masks[tensor]), strict=True):
        for start in range(0, len(before), 4):
            group = {index: abs(float(before[index])) for index in range(start, start + 4)}
            dropped = naive_drop(group, 2)
            assert mask[start : start + 4].tolist() == [index not in dropped for index in group]


@pytest.mark.parametrize(("norm", "power"), [("l1", 1), ("l2", 2)])
@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_oss"])
def test_blocks_are_ranked_by_their_norm_over_outputs_and_inputs(name, norm, power):
    config = PruningConfig(sparsity=0.3, pattern="block:4x2", block_norm=norm, **ONE_SHOT)
    pruner = with_tied_weights(ARCHITECTURES[name].build(), config)
    target = pruner.targets[-1]
    weight = pruner.parameters[target.name].detach().clone()
    if name == "gpt2":
        matrices = weight.t()[None]
    elif name == "gpt_oss":
        matrices = weight.transpose(1, 2)
    else:
        matrices = weight[None]
    scores = {}
    for batch, matrix in enumerate(matrices):
        for row in range(0, matrix.shape[0], 4):
            for column in range(0, matrix.shape[1], 2):
                block = matrix[row : row + 4, column : column + 2]
                scores[batch, row, column] = float(block.abs().pow(power).sum())
    dropped = naive_drop(scores, round(Fraction("0.3") * len(scores)))
    pruner.start(TOTAL_STEPS)
    mask = pruner.masks[target.name]
    mask = {"gpt2": lambda: mask.t()[None], "gpt_oss": lambda: mask.transpose(1, 2), "bert": lambda: mask[None]}[name]()
    for batch, row, column in scores:
        kept = mask[batch, row : row + 4, column : column + 2]
        assert kept.all() if (batch, row, column) not in dropped else not kept.any()


@pytest.mark.parametrize("held", [0, 10**9])
@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize(
    ("pattern", "scope"), [("unstructured", "layer"), ("unstructured", "global"), ("2:4", "layer")]
)
def test_masks_do_not_depend_on_how_many_weights_are_ranked_at_a_time(monkeypatch, pattern, scope, method, held):
    sparsity = 0.6 if pattern == "unstructured" else None
    config = PruningConfig(method=method, sparsity=sparsity, scope=scope, pattern=pattern, **ONE_SHOT)
    pruner = with_tied_weights(bert(), config)
    pruner.start(TOTAL_STEPS)
    monkeypatch.setattr("hf_prune.masking.local._CPU_PIECE", 37)
    monkeypatch.setattr("hf_prune.masking.ranking._KEYS_HELD", held)
    in_pieces = with_tied_weights(bert(), config)
    in_pieces.start(TOTAL_STEPS)
    assert all(torch.equal(pruner.masks[name], in_pieces.masks[name]) for name in pruner.masks)
    assert_masked_weights_are_zero(in_pieces)


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize("scope", ["layer", "global", "erk"])
@pytest.mark.parametrize("build", [bert, resnet], ids=["contiguous", "other memory layout"])
def test_a_shortlist_gives_the_masks_of_a_full_ranking(monkeypatch, method, scope, build):
    config = PruningConfig(method=method, sparsity=0.7, scope=scope, schedule="linear", begin=1, end=8, frequency=1)
    results = []
    used = []
    shortlists = selection._shortlists
    for shortlist in (shortlists, lambda pools, total: [None] * len(pools)):
        monkeypatch.setattr(
            selection,
            "_shortlists",
            lambda *arguments, shortlist=shortlist: used.extend(lists := shortlist(*arguments)) or lists,
        )
        torch.manual_seed(5)
        model = build().to(memory_format=torch.channels_last)
        pruner = Pruner(model, config, 8)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(8):
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            pruner.mask_gradients()
            optimizer.step()
            pruner.step(optimizer)
            assert_masked_weights_are_zero(pruner)
            assert_counts_are_true(pruner)
            assert_moments_are_zero(pruner, optimizer)
        results.append((pruner.masks, model.state_dict()))
    assert any(lists is not None for lists in used)
    (masks, weights), (full_masks, full_weights) = results
    assert all(torch.equal(masks[name], full_masks[name]) for name in masks)
    assert all(torch.equal(weights[name], full_weights[name]) for name in weights)


def test_the_seed_decides_what_is_random_and_nothing_else_does():
    def masks(seed):
        pruner = Pruner(Stack(), PruningConfig(method="random", sparsity=0.5, pruning_seed=seed, **ONE_SHOT), 1)
        return torch.stack(list(pruner.masks.values()))

    assert torch.equal(masks(1), masks(1))
    assert not torch.equal(masks(1), masks(2))


def test_dropped_weights_stay_dropped_however_they_score():
    """Under random scores a masked weight may score high; it is still what goes first."""
    model = Stack(width=16)
    magnitude = PruningConfig(sparsity=0.5, **ONE_SHOT)
    first = Pruner(model, magnitude, TOTAL_STEPS)
    pruner = Pruner(model, PruningConfig(method="random", sparsity=0.6, **ONE_SHOT), TOTAL_STEPS)
    for name, mask in pruner.masks.items():
        assert pruner.masked[name] == round(0.6 * 256)
        assert not (mask & ~first.masks[name]).any()


@pytest.mark.parametrize("pattern", ["2:4", "block:2x2"])
def test_units_stay_dropped_however_they_score(pattern):
    sparsity = None if pattern == "2:4" else 0.5
    config = PruningConfig(method="magnitude", sparsity=sparsity, pattern=pattern, schedule="linear", begin=0, end=4)
    model = Stack(width=16)
    pruner = Pruner(model, config, 4)
    seen = [dict(pruner.masks)]
    for _ in range(4):
        # What was small is large now, but for what is masked.
        set_weights(pruner, {name: 1 / (weight + 1e-3) for name, weight in pruner.parameters.items()})
        pruner.step()
        seen.append(dict(pruner.masks))
    for before, after in itertools.pairwise(seen):
        assert not any((after[name] & ~before[name]).any() for name in after)
    assert pruner.sparsity == 0.5


# ---- When ----


def test_masks_change_after_begin_then_every_frequency_and_at_end():
    config = PruningConfig(sparsity=0.6, initial_sparsity=0.2, schedule="linear", begin=3, end=10, frequency=4)
    pruner = Pruner(Stack(), config, 12)
    history = []
    for _ in range(12):
        pruner.step()
        history.append(pruner.sparsity)
    at_seven = round((0.2 + 0.4 * 4 / 7) * 64) / 64
    assert history == [0, 0, *[13 / 64] * 4, *[at_seven] * 3, *[38 / 64] * 3]
    assert pruner.completed_steps == 12


def test_the_schedule_is_at_its_initial_sparsity_at_begin_and_final_at_end():
    config = PruningConfig(sparsity=0.5, initial_sparsity=0.25, schedule="cubic", begin=2, end=14, frequency=2)
    pruner = Pruner(Stack(), config, 20)
    changed = {step: pruner.update(step) for step in range(1, 21)}
    assert [step for step, change in changed.items() if change][:1] == [2]
    assert set(range(2, 15, 2)) >= {step for step, change in changed.items() if change}
    assert [update.step for update in pruner.plan().updates] == [2, 4, 6, 8, 10, 12, 14]
    assert pruner.plan().updates[-1].sparsity == pruner.sparsity == 0.5


def test_one_shot_at_zero_prunes_before_the_first_step():
    pruner = Pruner(Stack(), PruningConfig(sparsity=0.5, **ONE_SHOT), TOTAL_STEPS)
    assert pruner.completed_steps == 0
    assert pruner.sparsity == pruner.target_sparsity == 0.5
    assert_masked_weights_are_zero(pruner)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"begin": 0, "end": 11}, "end"),
        ({"begin": 11, "end": 12}, "end"),
        ({"begin": 11, "schedule": "one_shot"}, "begin"),
    ],
)
def test_an_end_beyond_the_last_step_is_an_error_before_anything_is_pruned(changes, field):
    model = Stack()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(PruningConfigError, match=rf"(?m)^{field}: expected at most the last step of training \(10\)"):
        Pruner(model, PruningConfig(sparsity=0.5, **changes), TOTAL_STEPS)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    with pytest.raises(PruningConfigError, match=field):
        Pruner(model, PruningConfig(sparsity=0.5, **changes)).plan(TOTAL_STEPS)


def test_an_update_before_the_start_is_an_error_that_says_what_to_do():
    pruner = Pruner(Stack(), PruningConfig(sparsity=0.5))
    with pytest.raises(PruningStateError, match="total_steps"):
        pruner.step()


def test_a_plan_changes_nothing_and_needs_the_steps():
    model = Stack()
    pruner = Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT))
    with pytest.raises(PruningConfigError, match="total_steps"):
        pruner.plan()
    plan = pruner.plan(TOTAL_STEPS)
    assert plan.final_sparsity == 0.5
    assert plan.total_steps == TOTAL_STEPS
    assert plan.weights == 128
    assert plan.all_weights == 144
    assert plan.to_dict()["final_sparsity"] == 0.5
    assert pruner.sparsity == 0
    assert pruner.total_steps is None
    assert all(torch.count_nonzero(weight) == 64 for weight in pruner.parameters.values())


def test_a_plan_needs_no_weights():
    with torch.device("meta"):
        model = bert()
    plan = Pruner(model, PruningConfig(sparsity=0.9)).plan(100)
    assert len(plan.tensors) == 12
    assert plan.updates[0].step == 10
    assert plan.updates[-1].step == 50
    assert plan.final_sparsity == pytest.approx(0.9, abs=1e-3)


def test_a_second_start_begins_again_from_the_zeros_that_are_there():
    pruner = Pruner(Stack(), PruningConfig(sparsity=0.5, schedule="linear", begin=1, end=4, frequency=1), 4)
    for _ in range(4):
        pruner.step()
    masks = pruner.masks
    pruner.start(6)
    assert pruner.completed_steps == 0
    assert pruner.total_steps == 6
    for _ in range(6):
        pruner.step()
        assert pruner.sparsity == 0.5
    assert all(torch.equal(masks[name], pruner.masks[name]) for name in masks)


# ---- Weights and moments stay at zero ----


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_masked_weights_and_moments_are_zero_after_every_step(optimizer_name):
    model = bert()
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = ARCHITECTURES["bert"].batch()
    config = PruningConfig(sparsity=0.7, schedule="linear", begin=1, end=5, frequency=2)
    pruner = Pruner(model, config, 8)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())

    def check():
        assert_masked_weights_are_zero(pruner)
        assert_counts_are_true(pruner)
        if pruner.sparsity:
            assert_moments_are_zero(pruner, optimizer)

    train(pruner, optimizer, lambda: model(**batch).loss, 8, check)
    assert all(masked == round(Fraction("0.7") * pruner.masks[name].numel()) for name, masked in pruner.masked.items())
    for name, parameter in pruner.parameters.items():
        kept = pruner.masks[name]
        assert not torch.equal(parameter.detach()[kept], dense[name][kept]), f"{name} was not trained"


@pytest.mark.parametrize("name", sorted(optimizer.__name__ for optimizer in ELEMENTWISE_OPTIMIZERS))
def test_every_optimizer_in_the_table_leaves_a_zero_weight_with_a_zero_gradient_at_zero(name):
    extras = {
        "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        "RMSprop": {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
        "Adam": {"weight_decay": 0.1, "amsgrad": True},
        "AdamW": {"weight_decay": 0.1, "amsgrad": True},
        "Rprop": {},
    }.get(name, {"weight_decay": 0.1})
    model = Stack()
    inputs = torch.randn(4, 8)
    pruner = Pruner(model, PruningConfig(sparsity=0.6, schedule="linear", begin=1, end=4, frequency=1), 8)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.05, **extras)
    train(pruner, optimizer, lambda: model(inputs), 8, lambda: assert_masked_weights_are_zero(pruner))
    assert pruner.masked[FIRST] == round(0.6 * 64)


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_masked_weights_are_zero_even_where_gradients_were_not_masked(optimizer_name):
    model = Stack()
    inputs = torch.randn(4, 8)
    pruner = Pruner(model, PruningConfig(sparsity=0.6, **ONE_SHOT), 4)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    for _ in range(4):
        model(inputs).backward()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        assert_masked_weights_are_zero(pruner)
        assert_moments_are_zero(pruner, optimizer)


def test_gradients_masked_in_one_step_do_not_excuse_the_next():
    model = Stack()
    inputs = torch.randn(4, 8)
    pruner = Pruner(model, PruningConfig(sparsity=0.6, **ONE_SHOT), 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(pruner, optimizer, lambda: model(inputs), 1)
    model(inputs).backward()
    optimizer.step()
    pruner.step(optimizer)
    assert_masked_weights_are_zero(pruner)


def test_masking_gradients_zeroes_those_of_masked_weights_and_no_others():
    model = Stack()
    pruner = Pruner(model, PruningConfig(sparsity=0.6, **ONE_SHOT), 4)
    model(torch.randn(4, 8)).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    pruner.mask_gradients()
    for name, parameter in model.named_parameters():
        expected = before[name] * pruner.masks[name] if name in pruner.masks else before[name]
        assert torch.equal(parameter.grad, expected)
        assert torch.count_nonzero(parameter.grad)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_gradients_of_masked_weights_become_zero_even_if_they_are_not_finite(value):
    model = Stack()
    pruner = Pruner(model, PruningConfig(sparsity=0.6, **ONE_SHOT), 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for name, parameter in pruner.parameters.items():
        parameter.grad = torch.where(pruner.masks[name], 1.0, value)
    pruner.mask_gradients()
    for name, parameter in pruner.parameters.items():
        assert torch.equal(parameter.grad, pruner.masks[name].float())
    optimizer.step()
    pruner.step(optimizer)
    assert_masked_weights_are_zero(pruner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("contiguous", [True, False])
def test_weights_and_gradients_are_masked_in_every_type_and_layout_of_memory(tmp_path, dtype, contiguous):
    model = ARCHITECTURES["resnet"].build().to(dtype)
    if not contiguous:
        model = model.to(memory_format=torch.channels_last)
    pruner = Pruner(model, PruningConfig(sparsity=0.6, **ONE_SHOT), 4)
    assert all(weight.is_contiguous() for weight in pruner.parameters.values()) is contiguous
    pruner.save(tmp_path)
    for loaded in (False, True):
        if loaded:
            pruner.load(tmp_path)
        before = {}
        for name, parameter in pruner.parameters.items():
            parameter.grad = torch.randn_like(parameter)
            before[name] = parameter.grad.clone()
            parameter.data.copy_(before[name])
        pruner.mask_gradients()
        pruner.mask_weights()
        assert_masked_weights_are_zero(pruner)
        for name, parameter in pruner.parameters.items():
            expected = before[name].masked_fill(~pruner.masks[name], 0)
            assert torch.equal(parameter.grad, expected)
            assert torch.equal(parameter.detach(), expected)


def test_hooks_mask_what_backward_accumulates_until_they_are_removed():
    model = Stack()
    inputs = torch.randn(4, 8)
    pruner = Pruner(model, PruningConfig(sparsity=0.6, **ONE_SHOT), 4)
    model(inputs).backward()
    expected = {name: 2 * parameter.grad * pruner.masks[name] for name, parameter in pruner.parameters.items()}
    model.zero_grad()
    hooks = pruner.mask_gradients_in_backward()
    for _ in range(2):
        model(inputs).backward()
    for name, parameter in pruner.parameters.items():
        assert torch.equal(parameter.grad, expected[name])
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    model(inputs).backward()
    assert torch.count_nonzero(pruner.parameters[FIRST].grad[~pruner.masks[FIRST]])


def test_hooks_follow_masks_that_change():
    model = Stack()
    inputs = torch.randn(4, 8)
    pruner = Pruner(model, PruningConfig(sparsity=0.6, schedule="one_shot", begin=1), 4)
    pruner.mask_gradients_in_backward()
    pruner.step()
    model(inputs).backward()
    for name, parameter in pruner.parameters.items():
        assert torch.count_nonzero(parameter.grad[~pruner.masks[name]]) == 0


def test_frozen_weights_are_left_alone_and_told_once(caplog, tmp_path):
    model = Stack()
    model.layers[0].requires_grad_(False)
    with caplog.at_level(logging.WARNING, "hf_prune"):
        pruner = Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT), 4)
    assert pruner.masked == {SECOND: 32}
    assert pruner.left_out == {FIRST: "frozen"}
    [told] = [record.getMessage() for record in caplog.records]
    assert told == f"Not pruned by default (frozen): {FIRST}; name tensors in targets to prune them."
    pruner.save(tmp_path)
    assert load_frozen(tmp_path) == [FIRST]


def test_weights_that_are_frozen_before_the_start_are_told_then(caplog):
    model = Stack()
    pruner = Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT))
    model.layers[0].requires_grad_(False)
    with caplog.at_level(logging.WARNING, "hf_prune"):
        pruner.start(4)
    assert pruner.masked == {SECOND: 32}
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"Not pruned by default (frozen): {FIRST}"
    ]


def test_a_tensor_that_is_trained_from_zero_is_not_taken_for_sparse(caplog):
    model = Stack()
    nn.init.zeros_(model.layers[0].dense.weight)
    model.layers[1].dense.weight.data[:2] = 0
    with caplog.at_level(logging.WARNING, "hf_prune"):
        pruner = Pruner(model, PruningConfig(sparsity=0.5, begin=2, end=4), 4)
    assert pruner.masked == {FIRST: 0, SECOND: 16}
    assert any(record.getMessage().startswith(f"{FIRST}: all weights are zero") for record in caplog.records)
    assert Pruner(model, PruningConfig(method="keep"), 4).masked == {FIRST: 64, SECOND: 16}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_an_expert_that_is_trained_from_zero_is_not_taken_for_sparse(name, caplog):
    model = ARCHITECTURES[name].build()
    experts, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
    weights = dict(model.named_parameters())
    weights[experts].data[1] = 0
    weights[experts].data[2, :3] = 0
    weights[down].data.zero_()
    weights["model.layers.1.mlp.experts.gate_up_proj"].data[0, 0] = 0
    zeros = {name: int((weight == 0).sum()) for name, weight in weights.items()}
    with caplog.at_level(logging.WARNING, "hf_prune"):
        pruner = Pruner(model, PruningConfig(sparsity=0.5, begin=2, end=4), 4)
    assert pruner.masked[experts] == zeros[experts] - weights[experts][1].numel() == int((~pruner.masks[experts]).sum())
    assert bool(pruner.masks[experts][1].all())
    assert not pruner.masks[experts][2, :3].any()
    assert pruner.masked[down] == 0
    assert pruner.masked["model.layers.1.mlp.experts.gate_up_proj"] == weights[experts][0, 0].numel()
    told = [record.getMessage() for record in caplog.records if "all weights are zero" in record.getMessage()]
    assert told[0].startswith(f"{experts} (expert 1) and 1 more: all weights are zero")
    before = weights[experts][1].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    weights[experts].grad = torch.ones_like(weights[experts])
    pruner.mask_gradients()
    optimizer.step()
    pruner.step(optimizer)
    assert bool((weights[experts][1] != before).all())


@pytest.mark.parametrize("pattern", ["2:4", "block:2x2"])
def test_groups_and_blocks_of_zeros_are_kept_as_an_earlier_pruning_left_them(pattern, caplog):
    model = Stack()
    model.layers[0].dense.weight.data[:2, :4] = 0
    with caplog.at_level(logging.INFO, "hf_prune"):
        pruner = Pruner(model, PruningConfig(sparsity=0.5, pattern=pattern, begin=2, end=4), 4)
    assert pruner.masked == {FIRST: 8, SECOND: 0}
    assert not pruner.masks[FIRST][:2, :4].any()
    assert "8 prunable weights are already zero; they are masked and stay zero, also whole groups and blocks." in [
        record.getMessage() for record in caplog.records
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(4, 8)
    train(pruner, optimizer, lambda: model(inputs), 4, lambda: assert_masked_weights_are_zero(pruner))
    assert not model.layers[0].dense.weight[:2, :4].any()
    assert pruner.sparsity == (0.5 if pattern != "2:4" else (32 + 4 + 32) / 128)


def test_frozen_weights_that_are_named_are_pruned_and_need_no_gradient():
    model = Stack()
    model.layers[0].requires_grad_(False)
    config = PruningConfig(sparsity=0.5, schedule="one_shot", begin=1, targets=[r"layers\..*weight"])
    pruner = Pruner(model, config, 4)
    hooks = pruner.mask_gradients_in_backward()
    assert len(hooks) == 1
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    inputs = torch.randn(4, 8)
    train(pruner, optimizer, lambda: model(inputs), 2, lambda: assert_masked_weights_are_zero(pruner))
    assert pruner.masked == {FIRST: 32, SECOND: 32}


def test_a_tied_weight_is_pruned_once_and_is_sparse_under_both_names():
    model = Stack()
    model.layers[1].dense.weight = model.layers[0].dense.weight
    pruner = Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT), 4)
    assert pruner.masked == {FIRST: 32}
    assert pruner.plan().weights == 64
    assert torch.count_nonzero(model.layers[1].dense.weight) == 32


def test_layers_that_albert_shares_are_pruned_once_and_train_sparse():
    model = ARCHITECTURES["albert"].build()
    batch = ARCHITECTURES["albert"].batch()
    pruner = Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT), 4)
    assert len(pruner.masks) == 6
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(pruner, optimizer, lambda: model(**batch).loss, 4, lambda: assert_masked_weights_are_zero(pruner))


def test_neither_names_nor_classes_of_a_model_change():
    model = bert()
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    pruner = Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT), 4)
    pruner.step()
    assert list(model.state_dict()) == keys
    assert [type(module) for module in model.modules()] == classes


# ---- What cannot be ranked ----


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_a_weight_that_is_not_finite_is_an_error_by_name_and_nothing_changes(value, method):
    model = Stack()
    pruner = Pruner(model, PruningConfig(method=method, sparsity=0.5, **WINDOW), TOTAL_STEPS)
    for _ in range(4):
        pruner.step()
    with torch.no_grad():
        pruner.parameters[SECOND][3, 3] = value
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    with pytest.raises(PruningStateError, match=rf"^{SECOND}: expected finite weights, got NaN or infinite"):
        pruner.step()
    assert all(torch.equal(weights[name].nan_to_num(), w.nan_to_num()) for name, w in model.state_dict().items())
    assert all(torch.equal(masks[name], mask) for name, mask in pruner.masks.items())
    assert pruner.completed_steps == 4
    assert_counts_are_true(pruner)


def test_the_error_about_a_weight_that_is_not_finite_says_after_which_step():
    pruner = Pruner(Stack(), PruningConfig(sparsity=0.5, schedule="one_shot", begin=3), TOTAL_STEPS)
    pruner.step()
    pruner.step()
    pruner.parameters[FIRST].data.fill_(float("nan"))
    with pytest.raises(PruningStateError, match="after 3 optimizer steps"):
        pruner.step()


def test_a_weight_that_is_not_finite_keeps_other_configurations_from_pruning_at_that_step():
    model = Stack()
    configs = [PruningConfig(sparsity=0.5, targets=[name], schedule="one_shot", begin=1) for name in (FIRST, SECOND)]
    pruner = Pruner(model, configs, TOTAL_STEPS)
    pruner.parameters[SECOND].data[0, 0] = float("nan")
    with pytest.raises(PruningStateError, match=SECOND):
        pruner.step()
    assert pruner.masked == {FIRST: 0, SECOND: 0}
    assert torch.count_nonzero(pruner.parameters[FIRST]) == 64


@pytest.mark.parametrize(
    ("scope", "pattern"),
    [("layer", "2:4"), *itertools.product(["layer", "global", "erk"], ["unstructured", "block:2x2"])],
)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0)])
def test_empty_tensors_are_pruned_to_nothing(tmp_path, shape, scope, pattern):
    model = Stack()
    model.layers[0].dense.weight = nn.Parameter(torch.empty(shape))
    sparsity = None if pattern == "2:4" else 0.5
    config = PruningConfig(sparsity=sparsity, scope=scope, pattern=pattern, **ONE_SHOT)
    pruner = Pruner(model, config, TOTAL_STEPS)
    assert pruner.masked == {FIRST: 0, SECOND: 32}
    pruner.step()
    pruner.save(tmp_path)
    pruner.load(tmp_path)
    assert pruner.masked == {FIRST: 0, SECOND: 32}
    assert tuple(pruner.masks[FIRST].shape) == shape


def test_nothing_to_prune_is_a_warning_and_the_rest_works(caplog):
    model = nn.Linear(4, 4)
    with caplog.at_level(logging.WARNING, logger="hf_prune"):
        pruner = Pruner(model, PruningConfig(sparsity=0.5), TOTAL_STEPS)
    assert "Nothing to prune" in caplog.text
    pruner.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert pruner.sparsity == 0
    assert pruner.plan().updates == []


@pytest.mark.parametrize("config", [[], {"sparsity": 0.5}, [PruningConfig(sparsity=0.5), "magnitude"], None])
def test_what_is_no_configuration_is_a_type_error(config):
    with pytest.raises(TypeError):
        Pruner(Stack(), config)


# ---- Zeros that are there ----


def test_keep_holds_exactly_the_zeros_that_are_there():
    model = bert()
    name = "bert.encoder.layer.0.output.dense.weight"
    make_sparse(model, {name: 0.6})
    zeros = {key: parameter.detach() != 0 for key, parameter in model.named_parameters()}
    batch = ARCHITECTURES["bert"].batch()
    pruner = Pruner(model, PruningConfig(method="keep"), 4)
    assert pruner.target_sparsity == pruner.sparsity > 0
    assert pruner.plan().updates == []
    optimizer = OPTIMIZERS["noisy"](model.parameters())

    def check():
        assert_masked_weights_are_zero(pruner)
        assert all(torch.equal(mask, zeros[key]) for key, mask in pruner.masks.items())

    train(pruner, optimizer, lambda: model(**batch).loss, 4, check)
    assert pruner.masked[name] == round(0.6 * 384)


def test_zeros_that_are_there_are_held_during_the_dense_warm_up():
    model = Stack()
    make_sparse(model, {FIRST: 0.25})
    pruner = Pruner(model, PruningConfig(sparsity=0.5, schedule="one_shot", begin=5), TOTAL_STEPS)
    inputs = torch.randn(4, 8)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    for _ in range(4):
        train(pruner, optimizer, lambda: model(inputs), 1)
        assert pruner.masked == {FIRST: 16, SECOND: 0}
        assert_masked_weights_are_zero(pruner)
        assert torch.count_nonzero(pruner.parameters[FIRST]) == 48
    train(pruner, optimizer, lambda: model(inputs), 1)
    assert pruner.masked == {FIRST: 32, SECOND: 32}


@pytest.mark.parametrize("scope", ["layer", "global", "erk"])
def test_zeros_above_the_target_are_kept_and_are_no_error(scope):
    model = Stack()
    make_sparse(model, {FIRST: 0.75, SECOND: 0.75})
    zeros = {name: model.get_parameter(name).detach() != 0 for name in (FIRST, SECOND)}
    pruner = Pruner(model, PruningConfig(sparsity=0.5, scope=scope, **WINDOW), TOTAL_STEPS)
    for _ in range(TOTAL_STEPS):
        pruner.step()
        assert pruner.sparsity == pruner.target_sparsity == 0.75
    assert all(torch.equal(zeros[name], mask) for name, mask in pruner.masks.items())


def test_only_the_tensor_above_the_target_keeps_its_zeros():
    model = Stack()
    make_sparse(model, {FIRST: 0.75})
    pruner = Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT), TOTAL_STEPS)
    assert pruner.masked == {FIRST: 48, SECOND: 32}
    assert pruner.plan().final_sparsity == pruner.sparsity == 80 / 128


def test_zeros_above_the_target_are_logged(caplog):
    model = Stack()
    make_sparse(model, {FIRST: 0.75})
    with caplog.at_level(logging.INFO, logger="hf_prune"):
        Pruner(model, PruningConfig(sparsity=0.5, **ONE_SHOT), TOTAL_STEPS)
    assert FIRST in caplog.text
    assert SECOND not in caplog.text


def test_a_target_that_was_reached_by_rounding_up_is_not_called_exceeded(caplog):
    """0.7 of 64 weights is 44.8: 45 of them, 70.3%, are the target and not above it."""
    pruner = Pruner(Stack(), PruningConfig(sparsity=0.7, **ONE_SHOT), TOTAL_STEPS)
    assert pruner.masked == {FIRST: 45, SECOND: 45}
    with caplog.at_level(logging.INFO, logger="hf_prune"):
        pruner.start(TOTAL_STEPS)
    assert "above the target" not in caplog.text


def test_zeros_that_are_there_lose_the_moments_that_they_have():
    """Where a training goes on that was dense so far: weights that are zero by chance must not move again."""
    model = Stack()
    inputs = torch.randn(4, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(inputs).backward()
    optimizer.step()
    with torch.no_grad():
        model.get_parameter(FIRST)[0] = 0
    pruner = Pruner(model, PruningConfig(sparsity=0.6, begin=3, end=4, frequency=1))
    pruner.start(4, completed_steps=1, optimizer=optimizer)
    assert pruner.masked[FIRST] == 8
    assert_moments_are_zero(pruner, optimizer)
    train(pruner, optimizer, lambda: model(inputs), 1)
    assert_masked_weights_are_zero(pruner)


def test_a_sparse_model_is_continued_from_its_own_sparsity():
    model = Stack(width=10)
    make_sparse(model, {FIRST: 0.2, SECOND: 0.2})
    zeros = {name: model.get_parameter(name).detach() != 0 for name in (FIRST, SECOND)}
    pruner = Pruner(model, PruningConfig(sparsity=0.6, **WINDOW), TOTAL_STEPS)
    history = []
    for _ in range(TOTAL_STEPS):
        pruner.step()
        history.append(pruner.sparsity)
    assert history == [*[0.2] * 4, *[0.4] * 3, *[0.6] * 3]
    assert [update.sparsity for update in pruner.plan().updates] == [0.6] * 3
    assert not any((mask & ~zeros[name]).any() for name, mask in pruner.masks.items())


def test_zeros_within_blocks_do_not_make_a_block_dropped():
    model = Stack()
    make_sparse(model, {FIRST: 1 / 64})
    pruner = Pruner(model, PruningConfig(sparsity=0.5, pattern="block:2x2", **ONE_SHOT), TOTAL_STEPS)
    blocks = pruner.masks[FIRST].reshape(4, 2, 4, 2).any(3).any(1)
    assert int(blocks.sum()) == 8
    assert pruner.masked[SECOND] == 32


# ---- Several configurations ----


def test_configurations_together_each_prune_their_own_targets_at_their_own_times():
    configs = [
        PruningConfig(sparsity=0.5, targets=[FIRST], schedule="one_shot", begin=1),
        PruningConfig(method="random", pattern="2:4", targets=[SECOND], schedule="one_shot", begin=3),
    ]
    pruner = Pruner(Stack(), configs, TOTAL_STEPS)
    history = []
    for _ in range(3):
        pruner.step()
        history.append(dict(pruner.masked))
    assert history == [{FIRST: 32, SECOND: 0}, {FIRST: 32, SECOND: 0}, {FIRST: 32, SECOND: 32}]
    assert (pruner.masks[SECOND].reshape(-1, 4).sum(1) == 2).all()
    assert [update.step for update in pruner.plan().updates] == [1, 3]


def test_configurations_in_sequence_go_on_from_each_other():
    """Magnitude to 50%, then random to 60%: what the second adds is what its random numbers rank lowest."""
    configs = [
        PruningConfig(sparsity=0.5, schedule="linear", begin=1, end=4, frequency=1),
        PruningConfig(method="random", sparsity=0.6, schedule="linear", begin=4, end=8, frequency=2, pruning_seed=5),
    ]
    model = Stack(width=10)
    pruner = Pruner(model, configs, TOTAL_STEPS)
    weights = {name: weight.detach().clone() for name, weight in pruner.parameters.items()}
    plan = pruner.plan()
    assert [update.step for update in plan.updates] == [1, 2, 3, 4, 6, 8]
    assert [round(update.sparsity, 4) for update in plan.updates] == [0, 0.17, 0.33, 0.5, 0.55, 0.6]
    for step in range(1, TOTAL_STEPS + 1):
        pruner.step()
        planned = [update.sparsity for update in plan.updates if update.step <= step]
        assert pruner.sparsity == planned[-1]
        assert_counts_are_true(pruner)
        if step in (4, 5):
            for name, weight in weights.items():
                scores = dict(enumerate(weight.abs().reshape(-1).tolist()))
                dropped = naive_drop(scores, 50)
                assert pruner.masks[name].reshape(-1).tolist() == [index not in dropped for index in scores]
            after_magnitude = {name: mask.clone() for name, mask in pruner.masks.items()}
    for name, mask in pruner.masks.items():
        hashes = random(weights[name].reshape(-1), Piece(name, 0, 5)).tolist()
        kept = {index: hashes[index] for index in after_magnitude[name].reshape(-1).nonzero().squeeze(1).tolist()}
        gone = (after_magnitude[name] & ~mask).reshape(-1).nonzero().squeeze(1).tolist()
        assert set(gone) == naive_drop(kept, 10)


@pytest.mark.parametrize("begins", [(1, 3), (4, 1)])
def test_configurations_that_overlap_in_time_on_a_tensor_are_refused(begins):
    configs = [
        PruningConfig(sparsity=0.5, begin=begins[0], end=begins[0] + 3),
        PruningConfig(method="random", sparsity=0.6, begin=begins[1], end=begins[1] + 3),
    ]
    with pytest.raises(
        PruningConfigError, match=r"configuration 2 to begin at or after step .*layers\.0\.dense\.weight"
    ):
        Pruner(Stack(), configs, TOTAL_STEPS)


def test_configurations_that_overlap_in_time_on_different_tensors_are_fine():
    configs = [PruningConfig(sparsity=0.5, targets=[name], begin=1, end=5) for name in (FIRST, SECOND)]
    pruner = Pruner(Stack(), configs, TOTAL_STEPS)
    for _ in range(5):
        pruner.step()
    assert pruner.sparsity == 0.5


def test_a_configuration_that_does_not_fit_the_model_is_refused_before_training():
    with pytest.raises(TargetError, match="matches no parameter name"):
        Pruner(Stack(), [PruningConfig(sparsity=0.5), PruningConfig(sparsity=0.5, targets=["nothing"])])


# ---- Files ----


def saved(tmp_path, width=5, config=None):
    """A pruner stopped in the middle of its schedule, and the folder it was saved into."""
    torch.manual_seed(1)
    config = config or PruningConfig(sparsity=0.7, **WINDOW)
    pruner = Pruner(Stack(width), config, TOTAL_STEPS)
    for _ in range(6):
        pruner.step()
    pruner.save(tmp_path)
    return pruner


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "gpt_oss", "resnet"])
def test_masks_are_saved_and_loaded_bit_for_bit(tmp_path, name):
    config = PruningConfig(sparsity=0.37, scope="global", **WINDOW)
    pruner = Pruner(ARCHITECTURES[name].build(), config, TOTAL_STEPS)
    for _ in range(6):
        pruner.step()
    pruner.save(tmp_path / "new" / "folder")
    other = Pruner(ARCHITECTURES[name].build(), config)
    other.resume(TOTAL_STEPS, tmp_path / "new" / "folder")
    assert list(other.masks) == list(pruner.masks)
    assert all(torch.equal(mask, other.masks[key]) for key, mask in pruner.masks.items())
    assert other.masked == pruner.masked
    assert other.completed_steps == 6
    assert other.total_steps == TOTAL_STEPS
    assert other.target_sparsity == pruner.target_sparsity
    assert_masked_weights_are_zero(other)


def test_vectors_and_scalars_are_saved_and_loaded(tmp_path):
    model = Stack()
    model.scale = nn.Parameter(torch.ones(()))
    config = PruningConfig(sparsity=0.5, targets=["layers.0.dense.bias", "scale"], **ONE_SHOT)
    pruner = Pruner(model, config, TOTAL_STEPS)
    pruner.save(tmp_path)
    masks = pruner.masks
    pruner.load(tmp_path)
    assert pruner.masked == {"scale": 0, "layers.0.dense.bias": 4}
    assert all(torch.equal(masks[name], mask) for name, mask in pruner.masks.items())


def test_a_resumed_schedule_goes_on_as_if_it_had_not_stopped(tmp_path):
    """From a sparse start: the schedule's own start is saved, and is not the sparsity at the time of saving."""

    def sparse_stack():
        torch.manual_seed(1)
        model = Stack(width=10)
        make_sparse(model, {FIRST: 0.3, SECOND: 0.3})
        return model

    config = PruningConfig(sparsity=0.8, **WINDOW)
    whole = Pruner(sparse_stack(), config, TOTAL_STEPS)
    for _ in range(6):
        whole.step()
    whole.save(tmp_path)
    resumed = Pruner(sparse_stack(), config)
    resumed.resume(TOTAL_STEPS, tmp_path)
    for step in range(7, TOTAL_STEPS + 1):
        whole.update(step)
        resumed.update(step)
        assert all(torch.equal(mask, resumed.masks[name]) for name, mask in whole.masks.items())
    config = PruningConfig(sparsity=0.8, schedule="linear", begin=2, end=10, frequency=2)
    whole, resumed = Pruner(sparse_stack(), config, 10), Pruner(sparse_stack(), config)
    for _ in range(4):
        whole.step()
    whole.save(tmp_path)
    resumed.resume(10, tmp_path)
    for _ in range(2):
        whole.step()
        resumed.step()
    assert whole.sparsity == resumed.sparsity == 0.55


def test_the_packed_format_is_what_its_documentation_says(tmp_path):
    """Read with nothing but the safetensors layout: a length, a JSON header, bytes."""
    pruner = saved(tmp_path, width=13)
    content = (tmp_path / "pruning_masks.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    metadata = header.pop("__metadata__")
    assert metadata["format_version"] == "1"
    assert json.loads(metadata["shapes"]) == {FIRST: [13, 13], SECOND: [13, 13]}
    assert set(header) == {FIRST, SECOND}
    for name, entry in header.items():
        assert entry["dtype"] == "U8"
        assert entry["shape"] == [13, 2]
        start, end = entry["data_offsets"]
        packed = data[start:end]
        for row in range(13):
            bits = [packed[2 * row + column // 8] >> column % 8 & 1 for column in range(16)]
            assert bits == [int(kept) for kept in pruner.masks[name][row]] + [0, 0, 0]


def test_rows_of_a_packed_mask_are_those_of_the_first_dimension(tmp_path):
    pruner = Pruner(ARCHITECTURES["resnet"].build(), PruningConfig(sparsity=0.5, **ONE_SHOT), TOTAL_STEPS)
    pruner.save(tmp_path)
    content = (tmp_path / "pruning_masks.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    name = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
    assert pruner.masks[name].shape == (16, 8, 3, 3)
    assert header[name]["shape"] == [16, 9]


def test_configuration_and_state_are_saved_as_json_with_a_version(tmp_path):
    pruner = saved(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pruning_config.json",
        "pruning_masks.safetensors",
        "pruning_state.json",
    ]
    config = json.loads((tmp_path / "pruning_config.json").read_text())
    state = json.loads((tmp_path / "pruning_state.json").read_text())
    assert config["format_version"] == state["format_version"] == 1
    assert config["configs"] == [pruner.configs[0].to_dict()]
    assert state["completed_steps"] == 6
    assert state["total_steps"] == TOTAL_STEPS
    assert state["sparsity"] == pruner.sparsity


def cut(path, length):
    path.write_bytes(path.read_bytes()[:length])


def rewrite_json(path, **changes):
    content = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content))


def rewrite_header(path, change):
    """Change the JSON header of a safetensors file and leave its data as it is."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def transposed_in_file(header):
    for name in (FIRST, SECOND):
        header[name]["shape"].reverse()


def rewrite_metadata(path, **changes):
    """Change the metadata of a mask file: values that are not text become JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    rewrite_header(path, lambda header: header["__metadata__"].update(texts))


def flip(path, position, bit=1):
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def make_folder(path):
    path.unlink()
    path.mkdir()


MASKS, STATE, CONFIG = "pruning_masks.safetensors", "pruning_state.json", "pruning_config.json"
DAMAGE = {
    "masks with another bit": (MASKS, lambda path: flip(path, -1)),
    "masks with a bit beyond the row": (MASKS, lambda path: flip(path, -1, bit=128)),
    "masks that are a folder": (MASKS, make_folder),
    "masks that are a pickle": (MASKS, lambda path: torch.save({"a": torch.ones(2)}, path)),
    "masks that are weights": (MASKS, lambda path: save_file(Stack(5).state_dict(), path)),
    "masks with text for shapes": (MASKS, lambda path: rewrite_metadata(path, shapes={FIRST: "55", SECOND: [5, 5]})),
    "masks of negative shapes": (MASKS, lambda path: rewrite_metadata(path, shapes={FIRST: [-5, -5], SECOND: [5, 5]})),
    "masks with booleans for shapes": (MASKS, lambda path: rewrite_metadata(path, shapes={FIRST: [True, 5]})),
    "masks of parts beyond the tensor": (MASKS, lambda path: rewrite_metadata(path, parts={FIRST: [[3, 0], [5, 5]]})),
    "masks of parts of another tensor": (MASKS, lambda path: rewrite_metadata(path, parts={"x": [[0], [5]]})),
    "masks of a deep list": (MASKS, lambda path: rewrite_metadata(path, shapes="[" * 5000)),
    "masks of digests that are text": (MASKS, lambda path: rewrite_metadata(path, digests="a")),
    "state of other steps": (STATE, lambda path: rewrite_json(path, completed_steps=7)),
    "state of other starts": (STATE, lambda path: rewrite_json(path, starts={"0": 0.1})),
    "state of negative steps": (STATE, lambda path: rewrite_json(path, completed_steps=-1)),
    "state of steps in halves": (STATE, lambda path: rewrite_json(path, completed_steps=6.5)),
    "state of a deep list": (STATE, lambda path: path.write_text("[" * 100_000)),
    "state of endless steps": (STATE, lambda path: path.write_text(f'{{"completed_steps": {"9" * 5000}}}')),
    "state that is a folder": (STATE, make_folder),
    "configuration that is a folder": (CONFIG, make_folder),
    "configuration of a deep list": (CONFIG, lambda path: path.write_text("[" * 100_000)),
    "masks missing": (MASKS, lambda path: path.unlink()),
    "masks empty": (MASKS, lambda path: cut(path, 0)),
    "masks cut in the length": (MASKS, lambda path: cut(path, 5)),
    "masks cut in the header": (MASKS, lambda path: cut(path, 40)),
    "masks cut in the data": (MASKS, lambda path: cut(path, -3)),
    "masks of random bytes": (MASKS, lambda path: path.write_bytes(bytes(range(256)) * 4)),
    "masks without metadata": (MASKS, lambda path: rewrite_header(path, lambda header: header.pop("__metadata__"))),
    "masks of a future version": (
        MASKS,
        lambda path: rewrite_header(path, lambda header: header["__metadata__"].update(format_version="2")),
    ),
    "masks of broken shapes": (
        MASKS,
        lambda path: rewrite_header(path, lambda header: header["__metadata__"].update(shapes="{")),
    ),
    "masks of fewer tensors": (
        MASKS,
        lambda path: rewrite_header(
            path, lambda header: header["__metadata__"].update(shapes=json.dumps({FIRST: [5, 5]}))
        ),
    ),
    "masks of another type": (
        MASKS,
        lambda path: rewrite_header(path, lambda header: header[SECOND].update(dtype="I8")),
    ),
    "masks of other widths": (MASKS, lambda path: rewrite_header(path, transposed_in_file)),
    "state missing": (STATE, lambda path: path.unlink()),
    "state empty": (STATE, lambda path: cut(path, 0)),
    "state cut": (STATE, lambda path: cut(path, 30)),
    "state of random bytes": (STATE, lambda path: path.write_bytes(bytes(range(256)))),
    "state that is a list": (STATE, lambda path: path.write_text("[1]")),
    "state of a future version": (STATE, lambda path: rewrite_json(path, format_version=2)),
    "state without a version": (STATE, lambda path: rewrite_json(path, format_version=None)),
    "state without its steps": (STATE, lambda path: rewrite_json(path, completed_steps=None)),
    "state without its starts": (STATE, lambda path: rewrite_json(path, starts=None)),
    "configuration missing": (CONFIG, lambda path: path.unlink()),
    "configuration cut": (CONFIG, lambda path: cut(path, 30)),
    "configuration of random bytes": (CONFIG, lambda path: path.write_bytes(bytes(range(256)))),
    "configuration of a future version": (CONFIG, lambda path: rewrite_json(path, format_version=2)),
    "configuration without configurations": (CONFIG, lambda path: rewrite_json(path, configs=None)),
    "another configuration": (CONFIG, lambda path: path.write_text(path.read_text().replace("0.7", "0.8"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_used_is_an_error_that_names_it_and_nothing_changes(tmp_path, damage):
    pruner = saved(tmp_path)
    for _ in range(2):
        pruner.step()
    weights = {name: weight.clone() for name, weight in pruner.model.state_dict().items()}
    masks, starts = dict(pruner.masks), dict(pruner._state.starts)
    file, destroy = DAMAGE[damage]
    destroy(tmp_path / file)
    with pytest.raises(PruningStateError) as error:
        pruner.load(tmp_path)
    assert str(tmp_path / file) in str(error.value)
    assert all(torch.equal(weights[name], weight) for name, weight in pruner.model.state_dict().items())
    assert all(pruner.masks[name] is mask for name, mask in masks.items())
    assert pruner.completed_steps == 8
    assert pruner._state.starts == starts


def test_masks_of_another_checkpoint_are_refused_though_they_are_as_many(tmp_path):
    pruner = saved(tmp_path / "a")
    other = Pruner(Stack(5), pruner.configs, TOTAL_STEPS)
    for _ in range(6):
        other.step()
    other.save(tmp_path / "b")
    assert other.sparsity == pruner.sparsity
    (tmp_path / "b" / MASKS).replace(tmp_path / "a" / MASKS)
    with pytest.raises(
        PruningStateError, match=f"a/{MASKS}: expected the masks that were saved with the pruning state"
    ):
        pruner.load(tmp_path / "a")


def without_digests(folder):
    """Files as earlier versions wrote them."""
    rewrite_header(folder / MASKS, lambda header: header["__metadata__"].pop("digests"))
    rewrite_json(folder / STATE, digest=None, mask_files=None)


def test_files_of_earlier_versions_without_digests_are_read_and_counts_compared(tmp_path):
    pruner = saved(tmp_path)
    without_digests(tmp_path)
    other = Pruner(Stack(5), pruner.configs, TOTAL_STEPS)
    other.load(tmp_path)
    assert all(torch.equal(other.masks[name], mask) for name, mask in pruner.masks.items())
    rewrite_json(tmp_path / STATE, sparsity=0.5)
    with pytest.raises(PruningStateError, match=rf"{STATE}: expected a sparsity of 0\.36, that of the masks beside it"):
        other.load(tmp_path)
    rewrite_json(tmp_path / STATE, sparsity=pruner.sparsity, starts={"7": 0.0})
    with pytest.raises(PruningStateError, match=f"{STATE}: expected groups of tensors below 2, got 7"):
        other.load(tmp_path)
    flip(tmp_path / MASKS, -1, bit=128)
    with pytest.raises(PruningStateError, match=f"{MASKS}: the mask of .* has changed since it was saved"):
        other.load(tmp_path)


def test_masks_of_another_model_are_refused_with_the_tensor_that_differs(tmp_path):
    saved(tmp_path, width=5)
    config = PruningConfig(sparsity=0.7, **WINDOW)
    wider = Pruner(Stack(width=6), config)
    with pytest.raises(PruningStateError, match=rf"{MASKS}: .*{FIRST}.*\(5, 5\) in the file, \(6, 6\) in the model"):
        wider.load(tmp_path)
    deeper = Pruner(Stack(width=5, layers=3), config)
    with pytest.raises(PruningStateError, match=rf"{MASKS}: .*layers\.2\.dense\.weight.*None in the file"):
        deeper.load(tmp_path)


def test_masks_of_another_configuration_are_refused_with_the_field_that_differs(tmp_path):
    saved(tmp_path)
    other = Pruner(Stack(width=5), PruningConfig(sparsity=0.7, method="random", **WINDOW))
    with pytest.raises(PruningStateError, match="method: 'magnitude' was saved, 'random' is configured"):
        other.load(tmp_path)
    several = Pruner(Stack(width=5), [PruningConfig(sparsity=0.7, **WINDOW), PruningConfig(method="keep")])
    with pytest.raises(PruningStateError, match="1 configurations were saved, 2 are configured"):
        several.load(tmp_path)
