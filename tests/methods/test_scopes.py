from fractions import Fraction

import pytest
import references
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.methods.scopes import SCOPES, Pool, Prunable, erk, global_, layer

quick = settings(max_examples=60, deadline=None, derandomize=True)

sparsities = st.sampled_from([0.0, 0.5, 0.29, 0.999999]) | st.integers(0, 999).map(lambda part: part / 1000)


def matrix(out, wide, dropped=0):
    return Prunable(out * wide, dropped, (out, wide))


def experts(number, out, wide, dropped=0):
    return Prunable(number * out * wide, dropped, (out, wide))


def convolution(out, wide, kernel, dropped=0):
    """A convolution over one dimension."""
    return Prunable(out * wide * kernel, dropped, (out, wide, kernel))


@st.composite
def many_tensors(draw, least=1):
    tensors = []
    for _ in range(draw(st.integers(least, 5))):
        out, wide = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        kind = draw(st.sampled_from([matrix, experts, convolution]))
        if kind is matrix:
            made = matrix(out, wide)
        elif kind is experts:
            made = experts(draw(st.integers(1, 4)), out, wide)
        else:
            made = convolution(out, wide, draw(st.integers(2, 5)))
        dropped = draw(st.just(0) | st.integers(0, made.units))
        tensors.append(Prunable(made.units, dropped, made.sides))
    return tensors


def counts(pools, tensors):
    """What each tensor drops, where each stands alone."""
    assert [pool.members for pool in pools] == [(index,) for index in range(len(tensors))]
    return [pool.count for pool in pools]


def units_and_dropped(tensors):
    return [tensor.units for tensor in tensors], [tensor.dropped for tensor in tensors]


@quick
@given(tensors=many_tensors(), sparsity=sparsities)
def test_layer_agrees_with_the_reference(tensors, sparsity):
    expected = references.layer_counts(*units_and_dropped(tensors), sparsity)
    assert counts(layer(tensors, Fraction(str(sparsity))), tensors) == expected


@quick
@given(tensors=many_tensors(), sparsity=sparsities)
def test_global_agrees_with_the_reference(tensors, sparsity):
    expected = references.global_count(*units_and_dropped(tensors), sparsity)
    assert global_(tensors, Fraction(str(sparsity))) == [Pool(tuple(range(len(tensors))), expected)]


@settings(quick, max_examples=200)
@given(tensors=many_tensors(), sparsity=sparsities)
def test_erk_agrees_with_the_reference(tensors, sparsity):
    expected = references.erk_counts(*units_and_dropped(tensors), [tensor.sides for tensor in tensors], sparsity)
    assert counts(erk(tensors, Fraction(str(sparsity))), tensors) == expected


def test_layer_rounds_each_tensor_half_to_even():
    tensors = [matrix(1, 100), matrix(1, 5), matrix(1, 7), matrix(1, 1)]
    assert counts(layer(tensors, Fraction("0.5")), tensors) == [50, 2, 4, 0]
    assert counts(layer(tensors, Fraction("0.29")), tensors) == [29, 1, 2, 0]


def test_global_rounds_once_for_all():
    tensors = [matrix(1, 1), matrix(1, 1), matrix(1, 1)]
    assert global_(tensors, Fraction("0.5")) == [Pool((0, 1, 2), 2)]
    assert counts(layer(tensors, Fraction("0.5")), tensors) == [0, 0, 0]


def test_erk_by_hand():
    # Of 80 weights 40 are kept, in the ratio 4+4 : 8+8, which is 13.33 : 26.67, so 13 : 27.
    tensors = [matrix(4, 4), matrix(8, 8)]
    assert counts(erk(tensors, Fraction("0.5")), tensors) == [16 - 13, 64 - 27]


def test_erk_keeps_all_of_a_tensor_that_would_need_more_than_all():
    # Of 80 weights 60 are kept; 8 : 16 would be 20 : 40, but the first has only 16, so the second keeps 44.
    tensors = [matrix(4, 4), matrix(8, 8)]
    assert counts(erk(tensors, Fraction("0.25")), tensors) == [0, 20]


def test_erk_solves_again_until_no_tensor_saturates():
    # Kept: 130 of 4 + 32 + 200 weights in the ratio 4 : 12 : 30. Shares of 130: 11.3, 33.9, 84.8: the first two are
    # full, and the third keeps 94.
    tensors = [matrix(2, 2), matrix(4, 8), matrix(10, 20)]
    assert counts(erk(tensors, Fraction(106, 236)), tensors) == [0, 0, 106]
    # Kept: 112. Shares 9.7, 29.2, 73.0: the first is full, and then 108 go 12 : 30, which is 30.86 : 77.14, so 31 : 77.
    assert counts(erk(tensors, Fraction(124, 236)), tensors) == [0, 1, 123]
    # Kept: 119. Shares 10.3, 31.04, 77.6: the first is full; of 115 the second would keep 32.86, so it is full too.
    assert counts(erk(tensors, Fraction(117, 236)), tensors) == [0, 0, 117]


def test_erk_counts_each_expert_as_a_matrix_and_a_kernel_with_its_length():
    # Four experts of 8x8 pull with 4 * (8 + 8) = 64, one matrix of 8x8 with 16: of 320 weights 160 are kept.
    tensors = [experts(4, 8, 8), matrix(8, 8)]
    assert counts(erk(tensors, Fraction("0.5")), tensors) == [128, 32]
    # A kernel of length 3 over 4x4 pulls with 4 + 4 + 3 = 11, a matrix of 5x6 with 11: of 78 weights 39 are kept.
    tensors = [convolution(4, 4, 3), matrix(5, 6)]
    assert counts(erk(tensors, Fraction("0.5")), tensors) == [48 - 20, 30 - 19]


def test_erk_gives_left_over_units_to_the_earlier_of_equals():
    tensors = [matrix(3, 3), matrix(3, 3), matrix(3, 3)]
    assert counts(erk(tensors, Fraction(16, 27)), tensors) == [5, 5, 6]


def test_erk_never_takes_back_what_is_dropped():
    # Kept: 40 of 80. The first has only 6 left of the 13 that it would keep, so the second keeps 34.
    tensors = [matrix(4, 4, dropped=10), matrix(8, 8)]
    assert counts(erk(tensors, Fraction("0.5")), tensors) == [10, 30]


@pytest.mark.parametrize("name", SCOPES)
@quick
@given(tensors=many_tensors(), sparsity=sparsities)
def test_contract_of_every_scope_each_tensor_once_and_counts_that_can_be_had(name, tensors, sparsity):
    pools = SCOPES[name].pools(tensors, Fraction(str(sparsity)))
    assert sorted(member for pool in pools for member in pool.members) == list(range(len(tensors)))
    for pool in pools:
        least = sum(tensors[member].dropped for member in pool.members)
        assert least <= pool.count <= sum(tensors[member].units for member in pool.members)


@pytest.mark.parametrize("name", SCOPES)
@quick
@given(tensors=many_tensors(), sparsity=sparsities)
def test_contract_of_every_scope_totals_are_exact_for_dense_tensors(name, tensors, sparsity):
    tensors = [Prunable(tensor.units, 0, tensor.sides) for tensor in tensors]
    total = sum(pool.count for pool in SCOPES[name].pools(tensors, Fraction(str(sparsity))))
    if name in ("layer", "row"):
        assert total == sum(references.count(sparsity, tensor.units) for tensor in tensors)
    else:
        assert total == references.count(sparsity, sum(tensor.units for tensor in tensors))


@pytest.mark.parametrize("name", SCOPES)
@quick
@given(tensors=many_tensors(), sparsity=sparsities)
def test_contract_of_every_scope_zeros_above_the_target_are_kept(name, tensors, sparsity):
    tensors = [Prunable(tensor.units, tensor.units, tensor.sides) for tensor in tensors]
    pools = SCOPES[name].pools(tensors, Fraction(str(sparsity)))
    assert sum(pool.count for pool in pools) == sum(tensor.units for tensor in tensors)


@pytest.mark.parametrize("name", ["layer", "erk"])
@quick
@given(tensors=many_tensors(), steps=st.lists(sparsities, min_size=2, max_size=5).map(sorted))
def test_rising_sparsity_only_ever_drops_more_of_each_tensor_and_stays_exact(name, tensors, steps):
    tensors = [Prunable(tensor.units, 0, tensor.sides) for tensor in tensors]
    units = sum(tensor.units for tensor in tensors)
    for sparsity in steps:
        now = counts(SCOPES[name].pools(tensors, Fraction(str(sparsity))), tensors)
        assert all(count >= tensor.dropped for count, tensor in zip(now, tensors, strict=True))
        if name == "erk":
            assert sum(now) == references.count(sparsity, units)
        tensors = [Prunable(tensor.units, count, tensor.sides) for tensor, count in zip(tensors, now, strict=True)]


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize("sparsity", [Fraction(0), Fraction("0.5"), Fraction("0.999999")])
def test_tensors_without_weights_and_of_one_weight(name, sparsity):
    empty = Prunable(0, 0, (0, 4))
    one = Prunable(1, 0, (1, 1))
    expected = round(sparsity)
    assert sum(pool.count for pool in SCOPES[name].pools([empty, one, empty], sparsity)) == expected
    assert sum(pool.count for pool in SCOPES[name].pools([empty], sparsity)) == 0


@pytest.mark.parametrize("name", SCOPES)
@pytest.mark.parametrize(("sparsity", "expected"), [(Fraction(0), 0), (Fraction("0.2"), 1), (Fraction("0.999999"), 5)])
def test_a_parameter_of_no_dimension_can_be_among_the_tensors(name, sparsity, expected):
    pools = SCOPES[name].pools([matrix(2, 2), Prunable(1, 0, ())], sparsity)
    assert sum(pool.count for pool in pools) == expected


@pytest.mark.parametrize("name", SCOPES)
def test_sparsity_zero_drops_nothing_and_near_one_nearly_all(name):
    tensors = [matrix(100, 100), matrix(1000, 999), matrix(1, 1000)]
    assert sum(pool.count for pool in SCOPES[name].pools(tensors, Fraction(0))) == 0
    pools = SCOPES[name].pools(tensors, Fraction("0.999999"))
    assert sum(pool.count for pool in pools) == 1_010_000 - 1
