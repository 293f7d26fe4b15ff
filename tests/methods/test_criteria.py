import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_contract import check_criterion, check_scores, check_solver

from hf_prune.methods.criteria import CRITERIA, Piece, magnitude, random
from hf_prune.methods.solvers import SOLVERS

quick = settings(max_examples=40, deadline=None, derandomize=True)

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
names = st.sampled_from(["w", "layers.0.weight", "layers.1.weight", "é"])


@pytest.mark.parametrize("name", CRITERIA)
def test_contract_of_every_criterion(name):
    check_criterion(CRITERIA[name])


@pytest.mark.parametrize("name", CRITERIA)
@quick
@given(
    weights=st.lists(finite, max_size=30), cuts=st.lists(st.integers(0, 30), max_size=4), offset=st.integers(0, 2**40)
)
def test_contract_of_every_criterion_slices_give_what_the_whole_gives(name, weights, cuts, offset):
    check_scores(CRITERIA[name], torch.tensor(weights, dtype=torch.float32), offset, cuts)


@pytest.mark.parametrize("name", SOLVERS)
def test_contract_of_every_solver(name):
    check_solver(SOLVERS[name])


def test_movement_is_the_sum_of_weights_times_gradients_with_the_sign_turned():
    # Hand-written: a weight of 2 pushed down by a gradient of 0.5 moves towards zero, by -0.5 away from it.
    weight = torch.tensor([2.0, 2.0, -1.0, 0.0])
    gradient = torch.tensor([0.5, -0.5, 3.0, 7.0])
    before = torch.tensor([0.25, 0.0, 1.0, 0.0])
    movement = CRITERIA["movement"]
    piece = Piece("w", statistic=gradient, memory={"importance": before})
    assert movement.remember(weight, piece)["importance"].tolist() == [-0.75, 1.0, 4.0, 0.0]
    assert movement.score(weight, piece).tolist() == before.tolist()


@quick
@given(weights=st.lists(finite, max_size=30))
def test_magnitude_agrees_with_the_reference(weights):
    assert magnitude(torch.tensor(weights, dtype=torch.float32), Piece("w")).tolist() == references.magnitude(weights)


def test_magnitude_is_the_distance_from_zero_in_float32():
    assert magnitude(torch.tensor([-2.0, -0.0, 0.5, 3.0]), Piece("w")).tolist() == [2.0, 0.0, 0.5, 3.0]
    assert magnitude(torch.tensor([-0.1], dtype=torch.float64), Piece("w")).item() == references.float32(0.1)
    assert magnitude(torch.tensor([-0.1], dtype=torch.bfloat16), Piece("w")).item() == 0.10009765625


def test_reference_hash_has_the_published_values():
    # MurmurHash3_x86_32 of no bytes is fmix32 of its seed; CRC-32's check value is that of "123456789".
    assert references.fmix32(0) == 0
    assert references.fmix32(1) == 0x514E28B7
    assert references.fmix32(0xFFFFFFFF) == 0x81F16F39
    assert references.crc32(b"123456789") == 0xCBF43926


@quick
@given(
    size=st.integers(0, 20),
    offset=st.integers(0, 2**20) | st.integers(2**32 - 10, 2**32 + 10) | st.integers(2**33, 2**50),
    seed=st.integers(-(2**40), 2**40),
    name=names,
)
def test_random_agrees_with_the_reference(size, offset, seed, name):
    scores = random(torch.zeros(size), Piece(name, offset, seed)).tolist()
    assert scores == [references.random_score(seed, name, offset + index) for index in range(size)]


def test_random_numbers_never_change_between_versions():
    scores = random(torch.zeros(4), Piece("model.layers.0.weight", seed=42)).tolist()
    assert scores == [227869312, 347357430, 319575747, 915556811]


def test_random_does_not_look_at_the_weights():
    piece = Piece("w", 5, 1)
    assert torch.equal(random(torch.zeros(50), piece), random(torch.randn(50, dtype=torch.float64), piece))


def test_random_is_the_same_for_one_seed_and_name_and_differs_for_others():
    def scores(name, seed):
        return random(torch.zeros(100), Piece(name, 0, seed))

    assert torch.equal(scores("a", 0), scores("a", 0))
    others = [scores("b", 0), scores("a", 1), scores("a", -1)]
    assert all((scores("a", 0) == other).sum() < 3 for other in others)


def test_random_at_a_higher_sparsity_drops_what_it_dropped_and_more():
    order = random(torch.zeros(1000), Piece("w")).argsort(stable=True).tolist()
    scores = random(torch.zeros(1000), Piece("w")).tolist()
    dropped_before = set()
    for count in (0, 10, 300, 301, 999):
        dropped = references.lowest(scores, [False] * 1000, count)
        assert dropped == set(order[:count])
        assert dropped >= dropped_before
        dropped_before = dropped


def test_random_scores_are_spread_evenly_over_31_bits():
    scores = random(torch.zeros(20_000), Piece("w"))
    assert scores.min() >= 0
    eighths = torch.bincount((scores >> 28).long(), minlength=8)
    assert eighths.min() > 2300  # 2,500 expected, a standard deviation of 47
    assert eighths.max() < 2700
    neighbours = torch.corrcoef(torch.stack([scores[:-1].double(), scores[1:].double()]))[0, 1]
    assert abs(neighbours) < 0.03
