"""Numbers for each layer: the least change of all choices, compared with trying every one."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.structure.layer_search import Option, layered_candidates, least_changes, shares_of_all
from hf_prune.structure.search import Curve, LayerTable, Tables, Target, choose, dense_candidate

SHARES = {"neurons": [0.0, 0.5, 0.75], "heads": [0.0, 0.5], "layers": [0.0, 0.5]}
POINTS = {"neurons": (0.0, 0.5, 0.75), "heads": (0.0, 0.5)}


# Layers cost 1,250 seconds and parameters each, of which 5,000 parts are exact for so many layers.
PATHS = [["a.0"], ["a.0", "a.1"], ["a.0", "b.0"], ["a.0", "a.1", "b.0", "b.1"], ["a.0", "a.1", "a.2", "a.3"]]


@st.composite
def layers(draw, path):
    """A layer, some of whose costs are those of its units."""

    def curves(most):
        found = {}
        for name, shares in POINTS.items():
            rises = [0, *(draw(st.integers(0, most // 4)) for _ in shares[1:])]
            found[name] = Curve(shares, tuple(map(float, itertools.accumulate(rises))))
        return found

    removal = draw(st.one_of(st.none(), st.integers(0, 40).map(float)))
    return LayerTable(path, 1250.0, 1250, curves(1250), curves(1250), curves(40), removal)


@st.composite
def tables(draw):
    return Tables(tuple(draw(layers(path)) for path in draw(st.sampled_from(PATHS))), 100.0, 200)


def all_choices(some):
    """Seconds, parameters and change of every choice for the layers of which one of each stack stays."""
    rows = []
    for layer in some.layers:
        within = [
            tuple(
                sum(curves[name].at(share) for name, share in zip(POINTS, taken, strict=True))
                for curves in (layer.seconds_saved, layer.parameters_saved, layer.change)
            )
            for taken in itertools.product(*(SHARES[name] for name in POINTS))
        ]
        gone = [(layer.seconds, layer.parameters, layer.removal)] if layer.removal is not None else []
        rows.append([(one, True) for one in within] + [(one, False) for one in gone])
    stacks = [layer.stack for layer in some.layers]
    dense = dense_candidate(some)
    for choice in itertools.product(*rows):
        if {stack for stack, (_, stays) in zip(stacks, choice, strict=True) if stays} == set(stacks):
            saved, fewer, change = (sum(one[place] for one, _ in choice) for place in range(3))
            yield dense.seconds - saved, dense.parameters - fewer, change


def units_of(some):
    return {layer.path: {"neurons": 8, "heads": 4, "layers": 1} for layer in some.layers}


@settings(deadline=None, max_examples=60)
@given(tables(), st.sampled_from(["target_speedup", "target_parameters"]), st.integers(1, 99))
def test_the_least_change_of_all_choices_is_found(some, name, percent):
    dense = dense_candidate(some)
    target = Target(name, 100 / percent if name == "target_speedup" else percent / 100)
    found = choose(layered_candidates(some, SHARES, units_of(some), target), dense, target)
    cost, limit = (0, dense.seconds) if name == "target_speedup" else (1, dense.parameters)
    reaching = [choice[2] for choice in all_choices(some) if choice[cost] <= limit * percent / 100 + 1e-9]
    assert (found is None) == (not reaching)
    if found is not None:
        assert found.change == pytest.approx(min(reaching))
        assert target.reached_by(found, dense)


@settings(deadline=None, max_examples=20)
@given(tables())
def test_what_is_said_of_a_candidate_is_that_of_its_layers(some):
    units = units_of(some)
    for one in layered_candidates(some, SHARES, units, Target("target_speedup", 2.0)):
        assert list(one.layers) == [layer.path for layer in some.layers]
        seconds = parameters = change = 0.0
        for layer in some.layers:
            shares = one.layers[layer.path]
            if shares is None:
                change += layer.removal
                continue
            seconds += layer.seconds - sum(layer.seconds_saved[name].at(share) for name, share in shares.items())
            parameters += layer.parameters
            parameters -= sum(layer.parameters_saved[name].at(share) for name, share in shares.items())
            change += sum(layer.change[name].at(share) for name, share in shares.items())
        assert one.seconds == pytest.approx(100 + seconds)
        assert one.parameters == pytest.approx(200 + parameters, abs=0.5)
        assert one.change == pytest.approx(change)
        assert one.sparsities == shares_of_all(one.layers, units)


def test_one_layer_of_each_stack_stays_even_where_removing_costs_nothing():
    free, dear = Option(None, 4, 4.0, 4, 0.0), Option({}, 0, 0.0, 0, 1.0)
    [best] = least_changes(["a", "a", "b"], [[dear, free], [dear, free], [dear, free]])
    assert [option is free for option in best] in ([True, False, False], [False, True, False])


def test_costs_are_rounded_but_what_is_predicted_is_not():
    curve, nothing = Curve((0.0, 0.5), (0.0, 1 / 3)), Curve((0.0, 0.5), (0.0, 0.0))
    layer = LayerTable("one.0", 1.0, 3, {"neurons": curve}, {"neurons": nothing}, {"neurons": curve}, None)
    some = Tables((layer, layer), 0.5, 1)
    shares = {"neurons": [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]}
    found = layered_candidates(some, shares, {"one.0": {"neurons": 10}}, Target("target_speedup", 2.0))
    assert found[0].seconds == 0.5 + 2 * (1 - 1 / 3)
    assert [round(15 * one.change) for one in found] == list(range(10, -1, -1))


def test_shares_of_all_count_the_units_of_layers_that_are_removed():
    units = {"a.0": {"neurons": 8, "layers": 1}, "a.1": {"neurons": 4, "layers": 1}, "a.2": {"layers": 1}}
    assert shares_of_all({"a.0": {"neurons": 0.25}, "a.1": None}, units) == {
        "neurons": 0.5,
        "layers": round(1 / 3, 9),
    }
    assert shares_of_all({}, units) == {}
