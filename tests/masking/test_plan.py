import json
from fractions import Fraction

import pytest
import references
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import bert, gpt2, llama, mixtral, t5, vit

from hf_prune import Pruner
from hf_prune.config.pruning import PruningConfig
from hf_prune.errors import PruningConfigError, TargetError
from hf_prune.masking.groups import Window, make_groups, make_windows
from hf_prune.masking.plan import Plan, PlannedTensor, PlannedUpdate, make_plan
from hf_prune.methods.patterns import parse_pattern
from hf_prune.methods.schedules import SCHEDULES, update_steps
from hf_prune.methods.scopes import SCOPES, Pool
from hf_prune.model.layouts import Target

# Those that count without data: others need what a step has shown, or all of a tensor.
TRAINED = [name for name, scope in SCOPES.items() if not scope.sees_matrices and not scope.within_rows]

quick = settings(max_examples=40, deadline=None, derandomize=True)


def matrix(name, out, wide):
    return Target(name, (out, wide), "matrix")


def one_group(config, *targets):
    [group] = make_groups(0, config, targets)
    return group


def plan_of(configs, targets_of_each, total_steps, masked=None, all_weights=0):
    """The plan of configurations, each for its own list of targets; `masked` has what is masked now."""
    groups = [
        group
        for index, (config, targets) in enumerate(zip(configs, targets_of_each, strict=True))
        for group in make_groups(index, config, targets)
    ]
    windows = make_windows(configs, groups, total_steps)
    names = {target.name: target for targets in targets_of_each for target in targets}
    tensors = [
        PlannedTensor(name, target.shape, target.weights, (masked or {}).get(name, 0), None)
        for name, target in names.items()
    ]
    return make_plan(groups, windows, tensors, total_steps, all_weights)


# ---- Windows ----


@quick
@given(begin=st.integers(0, 30), length=st.integers(0, 30), frequency=st.integers(1, 40))
def test_a_window_is_due_at_the_update_steps_and_at_no_other(begin, length, frequency):
    window = Window(begin, begin + length, frequency)
    due = [step for step in range(begin + length + 50) if window.due(step)]
    assert due == update_steps(begin, begin + length, frequency)
    assert due == references.update_steps(begin, begin + length, frequency)


def test_windows_of_configurations_one_after_another():
    targets = [matrix("a", 4, 4)]
    first = PruningConfig(sparsity=0.5, begin=2, end=10)
    second = PruningConfig(sparsity=0.6, method="random", begin=10, end=20, frequency=5)
    groups = make_groups(0, first, targets) + make_groups(1, second, targets)
    assert make_windows([first, second], groups, 20) == [Window(2, 10, 1), Window(10, 20, 5)]


@pytest.mark.parametrize(
    ("first", "second"),
    [((2, 10), (9, 20)), ((2, 10), (2, 10)), ((10, 20), (2, 10)), ((0.1, 0.6), (0.5, 0.9))],
)
def test_two_configurations_at_work_on_one_tensor_at_a_time_are_refused(first, second):
    configs = [PruningConfig(sparsity=0.5, begin=begin, end=end) for begin, end in (first, second)]
    both = [matrix("a.b", 4, 4), matrix("only.one", 4, 4)]
    groups = make_groups(0, configs[0], both) + make_groups(1, configs[1], both[:1])
    with pytest.raises(PruningConfigError) as caught:
        make_windows(configs, groups, 20)
    [(key, problem)] = caught.value.problems
    assert key == "begin"
    assert problem.startswith("expected configuration 2 to begin at or after step ")
    assert "configuration 1" in problem
    assert "'a.b'" in problem


def test_configurations_on_different_tensors_may_work_at_the_same_time():
    configs = [PruningConfig(sparsity=0.5, begin=2, end=10), PruningConfig(sparsity=0.5, begin=5, end=8)]
    groups = make_groups(0, configs[0], [matrix("a", 4, 4)]) + make_groups(1, configs[1], [matrix("b", 4, 4)])
    assert make_windows(configs, groups, 20) == [Window(2, 10, 1), Window(5, 8, 1)]


def test_a_window_beyond_training_is_refused():
    config = PruningConfig(sparsity=0.5, begin=2, end=30)
    with pytest.raises(PruningConfigError, match="end: expected at most the last step of training"):
        make_windows([config], make_groups(0, config, [matrix("a", 4, 4)]), 20)


# ---- Groups ----


def test_in_the_scope_layer_every_tensor_stands_alone():
    targets = [matrix("a", 4, 4), matrix("b", 4, 4)]
    groups = make_groups(3, PruningConfig(sparsity=0.5), targets)
    assert [group.members for group in groups] == [(targets[0],), (targets[1],)]
    assert {(group.config_index, group.scope, group.final) for group in groups} == {(3, "layer", 0.5)}


@pytest.mark.parametrize("scope", ["global", "erk"])
def test_overridden_tensors_stand_alone_and_the_first_match_wins(scope):
    targets = [matrix(name, 4, 4) for name in ("a.q", "a.k", "b.q", "b.k")]
    config = PruningConfig(sparsity=0.5, scope=scope, overrides={r"a\..*": 0.1, r".*\.q": 0.2})
    groups = make_groups(0, config, targets)
    assert [(tuple(target.name for target in group.members), group.scope, group.final) for group in groups] == [
        (("a.q",), "layer", 0.1),
        (("a.k",), "layer", 0.1),
        (("b.q",), "layer", 0.2),
        (("b.k",), scope, 0.5),
    ]


@pytest.mark.parametrize("scope", SCOPES)
def test_an_override_of_zero_is_one(scope):
    config = PruningConfig(sparsity=0.5, scope=scope, overrides={"a": 0})
    group = one_group(config, matrix("a", 4, 4))
    assert group.final == 0
    assert group.scope == "layer"


def test_an_override_matches_whole_names():
    config = PruningConfig(sparsity=0.5, overrides={"a": 0.1})
    groups = make_groups(0, config, [matrix("a", 4, 4), matrix("aa", 4, 4)])
    assert [group.final for group in groups] == [0.1, 0.5]


def test_an_override_that_matches_none_of_the_targets_is_refused():
    config = PruningConfig(sparsity=0.5, overrides={"layer.0": 0.1})
    with pytest.raises(TargetError, match=r"overrides: 'layer\.0' matches no .*'layers\.0'"):
        make_groups(0, config, [matrix("layers.0", 4, 4)])


def test_keep_and_no_targets_make_no_groups():
    assert make_groups(0, PruningConfig(method="keep"), [matrix("a", 4, 4)]) == []
    assert make_groups(0, PruningConfig(sparsity=0.5), []) == []


@pytest.mark.parametrize(
    ("pattern", "target", "why"),
    [
        ("2:4", matrix("the.name", 4, 6), "6 is not a multiple of 4"),
        ("2:4", Target("the.name", (6, 4), "transposed"), "6 is not a multiple of 4"),
        ("2:4", Target("the.name", (8, 3, 4, 4), "convolution"), "3 is not a multiple of 4"),
        ("2:4", Target("the.name", (2, 6, 4), "experts_transposed"), "6 is not a multiple of 4"),
        ("block:4x1", matrix("the.name", 6, 4), "6x4"),
        ("block:1x4", Target("the.name", (6, 4), "transposed"), "4x6"),
        ("block:1x1", Target("the.name", (8,), "flat"), "not known"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused_by_the_tensors_name(pattern, target, why):
    config = PruningConfig(pattern=pattern, sparsity=0.5)
    with pytest.raises(TargetError) as caught:
        make_groups(0, config, [matrix("fits", 16, 16), target])
    text = str(caught.value)
    assert text.startswith("the.name: ")
    assert f"'{pattern}'" in text
    assert str(target.shape) in text
    assert why in text


@pytest.mark.parametrize(
    ("pattern", "target"),
    [
        ("2:4", Target("a", (4, 6), "transposed")),
        ("2:4", Target("a", (3, 4, 5, 5), "convolution")),
        ("2:4", Target("a", (2, 4, 6), "experts_transposed")),
        ("unstructured", Target("a", (7,), "flat")),
    ],
)
def test_a_pattern_fits_along_the_input_dimension(pattern, target):
    assert one_group(PruningConfig(pattern=pattern, sparsity=0.5), target).members == (target,)


@pytest.mark.parametrize(
    ("pattern", "units", "half"),
    [("unstructured", 512, 0.5), ("2:4", 128, 0.25), ("4:8", 64, 0.25), ("1:4", 128, 0.375), ("block:16x16", 2, 0.5)],
)
def test_units_of_a_tensor_and_the_sparsity_that_dropped_ones_come_to(pattern, units, half):
    config = PruningConfig(pattern=pattern, sparsity=None if parse_pattern(pattern).name == "n:m" else 0.5)
    group = one_group(config, matrix("a", 16, 32))
    assert group.units_of(group.members[0]) == units
    assert group.share_dropped([0]) == 0
    assert group.share_dropped([units // 2]) == half
    assert group.share_dropped([units]) == 2 * half


# ---- Counts at a step ----


def test_counts_begin_at_the_initial_sparsity_and_end_at_the_final():
    config = PruningConfig(sparsity=0.8, initial_sparsity=0.2, schedule="linear", begin=2, end=14, frequency=2)
    group = one_group(config, matrix("a", 10, 10))
    window = Window(2, 14, 2)
    counts = [group.pools(window, step, 0.0, [0])[0].count for step in update_steps(2, 14, 2)]
    assert counts == [20, 30, 40, 50, 60, 70, 80]


def test_zeros_that_are_there_are_counted_first_and_kept():
    config = PruningConfig(sparsity=0.5, initial_sparsity=0.1, schedule="linear", begin=0, end=10)
    group = one_group(config, matrix("a", 10, 10))
    window = Window(0, 10, 1)
    assert [group.pools(window, step, 0.3, [30])[0].count for step in (0, 5, 10)] == [30, 40, 50]
    assert [group.pools(window, step, 0.7, [70])[0].count for step in (0, 5, 10)] == [70, 70, 70]
    assert [group.pools(window, step, 0.0, [55])[0].count for step in (0, 10)] == [55, 55]


def test_an_override_is_final_even_below_the_initial_sparsity():
    config = PruningConfig(sparsity=0.8, initial_sparsity=0.3, begin=0, end=10, overrides={"a": 0.1, "b": 0})
    groups = make_groups(0, config, [matrix("a", 10, 10), matrix("b", 10, 10)])
    window = Window(0, 10, 1)
    assert [group.pools(window, 10, 0.0, [0])[0].count for group in groups] == [10, 0]


@pytest.mark.parametrize(
    ("pattern", "counts"), [("2:4", [0, 64, 128]), ("1:4", [0, 64, 128]), ("block:16x16", [0, 1, 2])]
)
def test_the_schedule_gives_the_share_of_units(pattern, counts):
    sparsity = 0.8 if pattern.startswith("block") else None
    config = PruningConfig(pattern=pattern, sparsity=sparsity, schedule="linear", begin=0, end=10)
    group = one_group(config, matrix("a", 16, 32))
    assert [group.pools(Window(0, 10, 5), step, 0.0, [0])[0].count for step in (0, 5, 10)] == counts


@pytest.mark.parametrize("pattern", ["1:3", "1:4", "2:4", "3:7", "4:8"])
def test_in_the_end_all_groups_of_n_of_m_are_pruned_whatever_the_fraction(pattern):
    config = PruningConfig(pattern=pattern, begin=0, end=10)
    group = one_group(config, matrix("a", 1000, 3 * 4 * 7 * 2))
    units = group.units_of(group.members[0])
    assert group.pools(Window(0, 10, 1), 10, 0.0, [0]) == [Pool((0,), units)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@quick
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    initial=st.none() | st.integers(0, 50).map(lambda part: part / 100),
    final=st.integers(50, 99).map(lambda part: part / 100) | st.just(0.999999),
    already=st.floats(0, 1),
)
def test_counts_at_every_step_agree_with_the_reference(schedule, rows, columns, initial, final, already):
    config = PruningConfig(sparsity=final, initial_sparsity=initial, schedule=schedule, begin=2, end=None, frequency=3)
    units = rows * columns
    dropped = int(already * units)
    group = one_group(config, matrix("a", rows, columns))
    begin, end, frequency = config.window(13)
    start = group.share_dropped([dropped])
    assert start == dropped / units
    for step in references.update_steps(begin, end, frequency):
        sparsity = references.sparsity_after(schedule, step, begin, end, max(start, initial or 0.0), final)
        if abs(Fraction(sparsity) * units % 1 - Fraction(1, 2)) < 1e-9 and step != end:
            continue  # within the last bit of a float from a half
        [pool] = group.pools(Window(begin, end, frequency), step, start, [dropped])
        expected = max(references.count(sparsity, units), dropped)
        assert pool == Pool((0,), expected)
        assert pool.count >= dropped
        dropped = pool.count


SHAPES = [
    Target("matrix", (6, 10), "matrix"),
    Target("transposed", (10, 6), "transposed"),
    Target("experts", (3, 4, 6), "experts"),
    Target("experts_transposed", (3, 6, 4), "experts_transposed"),
    Target("conv1d", (5, 4, 3), "convolution"),
    Target("conv2d", (5, 4, 3, 3), "convolution"),
    Target("pointwise", (8, 4, 1, 1), "convolution"),
]


@pytest.mark.parametrize("kernel", ["conv1d", "conv2d", "pointwise", "none"])
@quick
@given(sparsity=st.integers(0, 99).map(lambda part: part / 100), data=st.data())
def test_erk_adds_and_multiplies_the_sides_of_each_kind_of_tensor(kernel, sparsity, data):
    # Evci et al., arXiv 1911.11134, section 3 (1): (in + out + width + height) / (in * out * width * height).
    targets = [target for target in SHAPES if target.layout != "convolution" or target.name == kernel]
    sides = [target.shape[1:] if target.layout.startswith("experts") else target.shape for target in targets]
    dropped = [data.draw(st.just(0) | st.integers(0, target.weights)) for target in targets]
    group = one_group(PruningConfig(sparsity=sparsity, scope="erk", begin=0, end=10), *targets)
    pools = group.pools(Window(0, 10, 1), 10, 0.0, dropped)
    expected = references.erk_counts([target.weights for target in targets], dropped, sides, sparsity)
    assert [pool.count for pool in pools] == expected


# ---- Plans ----


def test_a_plan_by_hand():
    config = PruningConfig(sparsity=0.8, schedule="linear", begin=2, end=10, frequency=4, overrides={"b": 0.5})
    plan = plan_of([config], [[matrix("a", 10, 10), matrix("b", 10, 10)]], 20, all_weights=1000)
    assert plan == Plan(
        tensors=[PlannedTensor("a", (10, 10), 100, 0, 0.8), PlannedTensor("b", (10, 10), 100, 0, 0.5)],
        updates=[PlannedUpdate(2, 0.0), PlannedUpdate(6, 65 / 200), PlannedUpdate(10, 130 / 200)],
        total_steps=20,
        weights=200,
        all_weights=1000,
    )
    assert plan.final_sparsity == 0.65


@pytest.mark.parametrize("scope", TRAINED)
def test_a_plan_of_every_scope_is_exact_in_total(scope):
    targets = [matrix("a", 10, 10), matrix("b", 20, 10), matrix("c", 3, 1)]
    plan = plan_of([PruningConfig(sparsity=0.8, scope=scope, begin=0, end=5)], [targets], 10)
    assert [update.step for update in plan.updates] == [0, 1, 2, 3, 4, 5]
    total = 80 + 160 + 2 if scope == "layer" else references.count(0.8, 303)
    assert plan.final_sparsity == pytest.approx(total / 303, abs=1e-12)
    shares = [tensor.final_sparsity for tensor in plan.tensors]
    if scope == "layer":
        assert shares == [0.8, 0.8, 2 / 3]
    elif scope == "global":
        assert shares == [None, None, None]
    else:
        counts = references.erk_counts([100, 200, 3], [0, 0, 0], [(10, 10), (20, 10), (3, 1)], 0.8)
        assert shares == [count / target.weights for count, target in zip(counts, targets, strict=True)]


def test_a_plan_of_a_sparse_model_keeps_its_zeros():
    targets = [matrix("a", 10, 10), matrix("b", 10, 10)]
    config = PruningConfig(sparsity=0.5, schedule="linear", begin=0, end=4, frequency=2)
    plan = plan_of([config], [targets], 4, masked={"a": 70, "b": 10})
    assert [tensor.masked for tensor in plan.tensors] == [70, 10]
    assert [tensor.final_sparsity for tensor in plan.tensors] == [0.7, 0.5]
    assert [update.sparsity for update in plan.updates] == [80 / 200, 100 / 200, 120 / 200]


def test_a_plan_never_counts_fewer_zeros_than_there_are_even_if_they_fill_no_unit():
    config = PruningConfig(pattern="block:4x1", sparsity=0.5, schedule="linear", begin=0, end=4, frequency=2)
    plan = plan_of([config], [[matrix("a", 4, 4)]], 4, masked={"a": 3})
    assert [update.sparsity for update in plan.updates] == [3 / 16, 4 / 16, 8 / 16]


def test_a_plan_of_keep_alone_has_no_updates():
    config = PruningConfig(method="keep")
    plan = plan_of([config], [[matrix("a", 10, 10)]], 20, masked={"a": 37})
    assert plan.updates == []
    assert plan.final_sparsity == 0.37
    assert plan.tensors == [PlannedTensor("a", (10, 10), 100, 37, 0.37)]


def test_a_plan_of_one_configuration_after_another_counts_what_the_first_masked():
    first = PruningConfig(sparsity=0.5, schedule="linear", begin=0, end=10, frequency=5)
    second = PruningConfig(sparsity=0.6, schedule="linear", method="random", begin=10, end=20, frequency=5)
    targets = [matrix("a", 10, 10)]
    plan = plan_of([first, second], [targets, targets], 20)
    assert [(update.step, update.sparsity) for update in plan.updates] == [
        (0, 0.0),
        (5, 0.25),
        (10, 0.5),
        (15, 0.55),
        (20, 0.6),
    ]


def test_a_plan_of_two_configurations_side_by_side_has_the_steps_of_both():
    configs = [
        PruningConfig(sparsity=0.5, schedule="one_shot", begin=3),
        PruningConfig(pattern="2:4", schedule="linear", begin=2, end=6, frequency=3),
    ]
    plan = plan_of(configs, [[matrix("a", 10, 10)], [matrix("b", 5, 20)]], 20)
    assert [(update.step, update.sparsity) for update in plan.updates] == [
        (2, 0.0),
        (3, 50 / 200),
        (5, (50 + 38) / 200),
        (6, 100 / 200),
    ]


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "block:4x1", "block:16x16"])
def test_a_plan_of_a_pattern_counts_whole_units(pattern):
    sparsity = 0.29 if pattern.startswith("block") else None
    config = PruningConfig(pattern=pattern, sparsity=sparsity, begin=0, end=4)
    target = matrix("a", 32, 32)
    parsed = parse_pattern(pattern)
    units = references.count(Fraction(str(config.sparsity)) / parsed.unit_sparsity, 1024 // parsed.unit_size)
    expected = units * parsed.unit_size * parsed.unit_sparsity / 1024
    assert plan_of([config], [[target]], 4).tensors[0].final_sparsity == float(expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@quick
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    sparsity=st.integers(0, 99).map(lambda part: part / 100),
    scope=st.sampled_from(TRAINED),
    data=st.data(),
)
def test_plans_never_fall_and_end_exact(schedule, sizes, sparsity, scope, data):
    targets = [matrix(f"t{index}", 2, size) for index, size in enumerate(sizes)]
    masked = {target.name: data.draw(st.just(0) | st.integers(0, target.weights)) for target in targets}
    config = PruningConfig(sparsity=sparsity, scope=scope, schedule=schedule, begin=1, end=9, frequency=3)
    plan = plan_of([config], [targets], 10, masked=masked)
    shares = [update.sparsity for update in plan.updates]
    assert shares == sorted(shares)
    assert [update.step for update in plan.updates] == ([1] if schedule == "one_shot" else [1, 4, 7, 9])
    weights = sum(target.weights for target in targets)
    if scope == "layer":
        expected = sum(max(references.count(sparsity, t.weights), masked[t.name]) for t in targets)
    else:
        expected = max(references.count(sparsity, weights), sum(masked.values()))
    assert plan.final_sparsity == expected / weights


def test_a_plan_can_be_written_as_json():
    plan = plan_of([PruningConfig(sparsity=0.5, begin=0, end=1)], [[matrix("a", 2, 2)]], 2, all_weights=9)
    assert json.loads(json.dumps(plan.to_dict())) == {
        "tensors": [
            {"name": "a", "shape": [2, 2], "weights": 4, "masked": 0, "final_sparsity": 0.5, "decided_at": None}
            | {"counted": True}
        ],
        "updates": [{"step": 0, "sparsity": 0.0}, {"step": 1, "sparsity": 0.5}],
        "total_steps": 2,
        "weights": 4,
        "all_weights": 9,
        "left_out": {},
        "units": [],
        "weights_left": None,
        "sparsity_left": None,
        "shared_values": {},
        "shared_from": None,
        "shared_as": [],
        "final_sparsity": 0.5,
    }


# ---- Units of structures ----

NEURONS = PruningConfig(structure="neurons", sparsity=0.75, begin=2, end=6, frequency=2)
LAYERS = PruningConfig(structure="layers", sparsity=0.5, begin=4, end=8, frequency=2)


def plan_and_small_model(model, configs):
    """The plan for a model, and the pruner when all is cut out as planned."""
    pruner = Pruner(model, configs, 10)
    plan = pruner.plan().of_model(model)
    for _ in range(10):
        pruner.step()
    masked = pruner.sparsity
    pruner.shrink()
    return plan, pruner, masked


@pytest.mark.parametrize("configs", [[NEURONS], [LAYERS], [NEURONS, LAYERS], [LAYERS, NEURONS]])
def test_a_plan_has_the_units_that_training_removes_and_the_parameters_it_leaves(configs):
    model = bert(num_hidden_layers=4)
    dense = sum(parameter.numel() for parameter in model.parameters())
    plan, pruner, masked = plan_and_small_model(model, configs)
    assert (plan.all_weights, plan.weights_left) == tuple(pruner.removed["parameters"])
    assert plan.all_weights == dense
    assert plan.final_sparsity == pytest.approx(masked, abs=1e-12)
    units = {(one.structure, one.path): (one.of, one.left) for one in plan.units}
    expected = {}
    if NEURONS in configs:
        expected |= {("neurons", f"bert.encoder.layer.{index}"): (24, 6) for index in range(4)}
    if LAYERS in configs:
        expected["layers", "bert.encoder.layer"] = (4, 2)
    assert units == expected


def together(structure, sparsity, **fields):
    times = {"begin": 2, "end": 6, "frequency": 2, "scope": "global"}
    return PruningConfig(structure=structure, sparsity=sparsity, **times, **fields)


@pytest.mark.widths_per_layer
@pytest.mark.parametrize(
    "units",
    [
        [together("neurons", 0.6)],
        [together("neurons", 0.6, round_to=8)],
        [together("heads", 0.5)],
        [together("neurons", 0.6), together("heads", 0.5)],
    ],
)
@pytest.mark.parametrize("layers_first", [False, True])
def test_units_of_layers_that_leave_are_among_those_that_a_ranking_of_all_layers_removes(units, layers_first):
    layers = PruningConfig(structure="layers", sparsity=0.25, begin=2, end=6, frequency=2)
    model = bert(num_hidden_layers=4, num_attention_heads=4)
    plan, pruner, masked = plan_and_small_model(model, [layers, *units] if layers_first else [*units, layers])
    if layers_first:
        assert plan.weights_left == pruner.removed["parameters"][1]
        assert plan.final_sparsity == pytest.approx(masked, abs=1e-12)
    else:  # a layer leaves when other layers have lost nearly as many units as will leave in the end
        assert plan.weights_left is None
        assert plan.final_sparsity <= masked


def mixtral_one_by_one():
    """Experts that are computed one after another, and may have any number of neurons."""
    return transformers.MixtralForCausalLM._from_config(mixtral().config, experts_implementation="eager")


@pytest.mark.parametrize("build", [llama, gpt2, mixtral_one_by_one, t5, vit])
def test_the_parameters_that_are_left_are_those_of_the_model_that_is_left(build):
    model = build()
    plan, _, _ = plan_and_small_model(model, [NEURONS])
    assert plan.weights_left == sum(parameter.numel() for parameter in model.parameters()) < plan.all_weights


def test_layers_that_cannot_be_removed_are_counted_among_those_that_are_left():
    model = t5(num_layers=3, num_decoder_layers=5)  # the first of each has the position biases of all
    plan, pruner, _ = plan_and_small_model(model, [LAYERS])
    assert [(one.path, one.of, one.left) for one in plan.units] == [("encoder.block", 3, 1), ("decoder.block", 5, 3)]
    assert (model.config.num_layers, model.config.num_decoder_layers) == (1, 3)  # without round(n / 2)
    assert plan.weights_left == pruner.removed["parameters"][1]


def test_neurons_that_are_zero_already_are_counted_as_removed():
    model = bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[:20] = 0
            layer.intermediate.dense.bias[:20] = 0
            layer.output.dense.weight[:, :20] = 0
    plan, pruner, _ = plan_and_small_model(model, [NEURONS])
    assert [one.removed for one in plan.units] == [20, 20]
    assert plan.weights_left == pruner.removed["parameters"][1]


def test_what_depends_on_the_layers_that_go_is_not_foretold():
    model = bert(num_hidden_layers=4)
    pruner = Pruner(model, LAYERS)
    model.bert.encoder.layer[0].more = torch.nn.Linear(3, 3)
    plan = pruner.plan(10).of_model(model)
    assert plan.weights_left is None
    assert [one.left for one in plan.units] == [2]


def test_a_plan_without_structures_leaves_the_model_its_size():
    model = bert()
    plan = Pruner(model, PruningConfig(sparsity=0.5)).plan(10).of_model(model)
    assert (plan.units, plan.weights_left) == ([], None)


def test_the_units_of_a_plan_can_be_written_as_json():
    model = bert()
    content = json.loads(json.dumps(Pruner(model, LAYERS).plan(10).of_model(model).to_dict()))
    assert content["units"] == [{"structure": "layers", "path": "bert.encoder.layer", "of": 2, "removed": 1}]
    assert 0 < content["weights_left"] < content["all_weights"]
    assert "_groups" not in content
