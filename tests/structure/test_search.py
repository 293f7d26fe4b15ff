"""The search for a structure, on tables of numbers: what is predicted, which candidates are best, and the choice."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shrunk import chosen_of

from hf_prune import PruningConfig
from hf_prune.structure.search import (
    Candidate,
    Curve,
    LayerTable,
    Tables,
    Target,
    choose,
    correction_from,
    dense_candidate,
    frontier,
    thinned,
    uniform_candidates,
)


def layer(removal, stack="layers", change=1.0):
    """A layer of 10 seconds and 100 parameters; half of its neurons are 4 seconds and 40 parameters."""
    shares = (0.0, 0.5, 1.0)
    return LayerTable(
        f"{stack}.0",
        10.0,
        100,
        {"neurons": Curve(shares, (0.0, 4.0, 6.0))},
        {"neurons": Curve(shares, (0.0, 40.0, 80.0))},
        {"neurons": Curve(shares, (0.0, 0.1 * change, 1.0 * change))},
        removal,
    )


TABLES = Tables((layer(3.0), layer(1.0), layer(2.0)), rest_seconds=5.0, rest_parameters=50)


def test_a_curve_goes_straight_between_what_was_measured_and_on_beyond_it():
    curve = Curve((0.0, 0.5, 0.75), (0.0, 4.0, 6.0))
    assert [curve.at(share) for share in (0.0, 0.25, 0.5, 0.625, 0.75, 1.0)] == [0.0, 2.0, 4.0, 5.0, 6.0, 8.0]


def test_what_is_predicted_is_added_up_over_the_layers_that_are_kept():
    shares = {"neurons": [0.0, 0.5], "layers": [0.0, 1 / 3, 2 / 3]}
    found = {tuple(one.sparsities.items()): one for one in uniform_candidates(TABLES, shares)}
    assert len(found) == 6
    assert found[()] == dense_candidate(TABLES) == Candidate({}, 35.0, 350, 0.0)
    halves = found[("neurons", 0.5),]
    assert (halves.seconds, halves.parameters) == (35.0 - 12.0, 350 - 120)
    assert halves.change == pytest.approx(0.3)
    both = found[("neurons", 0.5), ("layers", 2 / 3)]
    assert (both.seconds, both.parameters) == (5.0 + 6.0, 50 + 60)
    assert both.change == pytest.approx(0.1 + 1.0 + 2.0)  # the layers without which least changes


def test_a_layer_that_cannot_be_removed_stays_and_one_of_each_stack_does():
    fixed = Tables((layer(None), layer(3.0), layer(1.0)), 5.0, 50)
    [_, all_gone] = uniform_candidates(fixed, {"layers": [0.0, 0.999999]})
    assert (all_gone.seconds, all_gone.change) == (15.0, 4.0)
    stacks = Tables((layer(1.0, "encoder"), layer(2.0, "encoder"), layer(4.0, "decoder")), 5.0, 50)
    [_, one_each] = uniform_candidates(stacks, {"layers": [0.0, 0.999999]})
    assert (one_each.seconds, one_each.change) == (25.0, 1.0)


candidates = st.lists(
    st.builds(Candidate, st.just({}), st.integers(1, 9).map(float), st.integers(1, 9), st.integers(0, 9).map(float)),
    min_size=1,
    max_size=12,
)


@given(candidates)
def test_the_frontier_is_what_nothing_else_beats(some):
    def beats(one, other):
        as_good = one.seconds <= other.seconds and one.change <= other.change
        return as_good and (one.seconds < other.seconds or one.change < other.change)

    best = {(one.seconds, one.change) for one in some if not any(beats(other, one) for other in some)}
    found = [(one.seconds, one.change) for one in frontier(some)]
    assert set(found) == best
    assert len(found) == len(best)
    assert found == sorted(found, reverse=True)


@given(candidates, st.sampled_from(["target_speedup", "target_latency", "target_parameters"]), st.integers(1, 9))
def test_the_choice_reaches_the_target_and_changes_least(some, name, wanted):
    dense = Candidate({}, 9.0, 9, 0.0)
    limit = wanted + 0.5  # between two costs, so that rounding does not matter
    target = Target(name, {"target_speedup": 9.0 / limit, "target_latency": 1000.0 * limit}.get(name, limit))
    cost = {"target_parameters": lambda one: one.parameters}.get(name, lambda one: one.seconds)
    reaching = [one.change for one in some if cost(one) <= limit]
    found = choose(some, dense, target)
    assert (found is None) == (not reaching)
    if found is not None:
        assert target.reached_by(found, dense)
        assert found.change == min(reaching)


def test_parameters_below_one_are_a_share():
    dense = Candidate({}, 1.0, 1000, 0.0)
    assert Target("target_parameters", 0.25).number_of_parameters(1000) == 250
    assert Target("target_parameters", 0.25).reached_by(Candidate({}, 1.0, 250, 0.0), dense)
    assert not Target("target_parameters", 249).reached_by(Candidate({}, 1.0, 250, 0.0), dense)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"target_speedup": 2}, "2.40 times the speed"),
        ({"target_latency": 6}, "5 ms and 2.40 times the speed"),
        ({"target_parameters": 0.6}, "3,000 of 5,000 parameters (60.0%) and 2.40 times the speed"),
    ],
)
def test_what_was_reached_is_said_as_it_was_asked_for(asked, words):
    chosen = chosen_of(config=PruningConfig(**asked))
    assert chosen.reached_words == words
    assert ("with 3,000 of 5,000 parameters (60.0%), were predicted" in chosen.told()) == ("target_parameters" in asked)


def test_a_correction_gives_what_was_measured_and_leaves_the_dense_model():
    dense, one = Candidate({}, 10.0, 9, 0.0), Candidate({"neurons": 0.5}, 5.0, 5, 1.0)
    correction = correction_from(one, dense, seconds=12.0, dense_seconds=20.0)
    assert correction.of(one, dense).seconds == pytest.approx(12.0)
    assert correction.of(dense, dense).seconds == pytest.approx(20.0)
    less = Candidate({"neurons": 0.25}, 7.5, 7, 0.5)
    assert correction.of(less, dense).seconds == pytest.approx(16.0)  # 0.8 of the saving that was predicted


@pytest.mark.parametrize(("rows", "most"), list(itertools.product([1, 2, 5, 100], [2, 5, 12])))
def test_rows_are_thinned_evenly(rows, most):
    found = list(thinned(range(rows), most))
    assert len(found) == len(set(found)) == min(rows, most)
    assert (found[0], found[-1]) == (0, rows - 1)
