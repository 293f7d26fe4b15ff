from fractions import Fraction
from itertools import pairwise

import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.methods.schedules import SCHEDULES, resolve_step, sparsity_at, update_steps

quick = settings(max_examples=60, deadline=None, derandomize=True)

gradual = [name for name in SCHEDULES if name != "one_shot"]
sparsities = st.integers(0, 999).map(lambda thousandths: thousandths / 1000)
windows = st.tuples(st.integers(0, 50), st.integers(0, 60), st.integers(1, 20)).map(
    lambda drawn: (drawn[0], drawn[0] + drawn[1], drawn[2])
)


@pytest.mark.parametrize("name", SCHEDULES)
@quick
@given(initial=sparsities, final=sparsities, steps=st.integers(1, 40))
def test_contract_of_every_schedule_in_range_and_never_falling(name, initial, final, steps):
    initial, final = sorted((initial, final))
    values = [SCHEDULES[name].sparsity(step / steps, initial, final) for step in range(steps + 1)]
    assert all(initial - 1e-12 <= value <= final + 1e-12 for value in values)
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(values))
    assert values[-1] == pytest.approx(final, abs=1e-12)
    if name != "one_shot":
        assert values[0] == pytest.approx(initial, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@quick
@given(initial=sparsities, final=sparsities, window=windows)
def test_every_schedule_is_exactly_final_at_the_end_and_initial_before_the_begin(name, initial, final, window):
    begin, end, _ = window
    initial, final = sorted((initial, final))
    assert sparsity_at(name, end, begin, end, initial, final) == final
    assert sparsity_at(name, end + 1, begin, end, initial, final) == final
    assert sparsity_at(name, begin - 1, begin, end, initial, final) == initial
    if name != "one_shot" and begin < end:
        assert sparsity_at(name, begin, begin, end, initial, final) == initial


@pytest.mark.parametrize("name", SCHEDULES)
@quick
@given(initial=sparsities, final=sparsities, window=windows)
def test_sparsity_at_agrees_with_the_reference_and_never_falls(name, initial, final, window):
    begin, end, _ = window
    before = 0.0
    for step in range(max(begin - 2, 0), end + 3):
        value = sparsity_at(name, step, begin, end, initial, final)
        expected = references.sparsity_after(name, step, begin, end, initial, final)
        assert value == pytest.approx(expected, abs=1e-12), step
        assert initial <= value <= max(initial, final)
        assert value >= before
        before = value


@pytest.mark.parametrize("name", SCHEDULES)
@quick
@given(fraction=st.floats(0, 1), initial=sparsities, final=sparsities)
def test_formulas_agree_with_the_reference(name, fraction, initial, final):
    expected = references.schedule(name, Fraction(fraction), initial, final)
    assert SCHEDULES[name].sparsity(fraction, initial, final) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "initial", "final", "halfway"),
    [
        ("one_shot", 0.0, 0.8, 0.8),
        ("linear", 0.2, 0.8, 0.5),
        ("cubic", 0.0, 0.8, 0.7),
        ("cosine", 0.2, 0.8, 0.5),
        ("exponential", 0.0, 0.75, 0.5),
    ],
)
def test_halfway_values_worked_out_by_hand(name, initial, final, halfway):
    assert SCHEDULES[name].sparsity(0.5, initial, final) == pytest.approx(halfway)


def test_cubic_prunes_early_cosine_slowly_at_both_ends():
    quarters = [0.25, 0.75]
    assert [SCHEDULES["cubic"].sparsity(at, 0.0, 0.64) for at in quarters] == pytest.approx([0.37, 0.63])
    assert [SCHEDULES["cosine"].sparsity(at, 0.0, 1.0) for at in quarters] == pytest.approx([0.1464466, 0.8535534])


def test_one_shot_prunes_everything_at_begin():
    values = [sparsity_at("one_shot", step, 3, 3, 0.1, 0.9) for step in range(6)]
    assert values == [0.1, 0.1, 0.1, 0.9, 0.9, 0.9]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("initial", "final"), [(0.9, 0.5), (0.5, 0.5), (0.5, 0.0)])
def test_a_model_sparser_than_the_target_stays_as_it_is(name, initial, final):
    assert {sparsity_at(name, step, 2, 8, initial, final) for step in range(12)} == {initial}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_window_of_one_step_is_final_at_once(name):
    assert sparsity_at(name, 5, 5, 5, 0.0, 0.7) == 0.7
    assert sparsity_at(name, 4, 5, 5, 0.0, 0.7) == 0.0


@pytest.mark.parametrize("name", SCHEDULES)
def test_sparsities_near_one_are_reached_exactly(name):
    assert sparsity_at(name, 10, 0, 10, 0.0, 0.999999) == 0.999999
    assert all(sparsity_at(name, step, 0, 10, 0.0, 0.999999) <= 0.999999 for step in range(10))


@pytest.mark.parametrize(
    ("begin", "end", "frequency", "expected"),
    [
        (2, 14, 2, [2, 4, 6, 8, 10, 12, 14]),
        (2, 13, 5, [2, 7, 12, 13]),
        (0, 10, 3, [0, 3, 6, 9, 10]),
        (4, 9, 100, [4, 9]),
        (5, 5, 1, [5]),
        (0, 0, 7, [0]),
        (3, 5, 1, [3, 4, 5]),
    ],
)
def test_updates_come_after_begin_plus_multiples_and_always_at_the_end(begin, end, frequency, expected):
    assert update_steps(begin, end, frequency) == expected


@quick
@given(window=windows)
def test_update_steps_agree_with_the_reference(window):
    assert update_steps(*window) == references.update_steps(*window)


@pytest.mark.parametrize("name", gradual)
def test_the_first_update_is_at_the_initial_sparsity_and_the_last_at_the_final(name):
    values = [sparsity_at(name, step, 2, 14, 0.1, 0.8) for step in update_steps(2, 14, 2)]
    assert values[0] == 0.1
    assert values[-1] == 0.8
    assert all(0.1 < value < 0.8 for value in values[1:-1])
    assert values == sorted(values)


@pytest.mark.parametrize(
    ("value", "total", "expected"),
    [
        (None, 100, 100),
        (0.0, 100, 0),
        (1.0, 100, 1),
        (7.0, 100, 7),
        (250.0, 100, 250),
        (0.1, 100, 10),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.575, 100, 58),
        (1.1e-05, 500_000, 6),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.25, 10, 2),
        (0.35, 10, 4),
        (0.001, 100, 0),
        (0.999999, 1000, 1000),
        (0.5, 0, 0),
    ],
)
def test_times_from_one_are_steps_and_below_one_are_shares_rounded_half_to_even(value, total, expected):
    result = resolve_step(value, total)
    assert result == expected
    assert isinstance(result, int)


@quick
@given(
    value=st.none() | st.integers(0, 9999).map(lambda part: part / 10_000) | st.integers(1, 10**6).map(float),
    total=st.integers(0, 10**6),
)
def test_resolve_step_agrees_with_the_reference(value, total):
    assert resolve_step(value, total) == references.steps_of(value, total)
