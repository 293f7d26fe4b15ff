import math

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.masking import selection
from hf_prune.masking.selection import KeyPool, KeySource, Threshold, find_thresholds, lowest, taken
from hf_prune.methods.keys import LOWEST_KEY, demote, order_keys

quick = settings(max_examples=50, deadline=None, derandomize=True)

numbers = st.floats(allow_nan=False, width=32)
few_scores = st.sampled_from([-1.5, -0.0, 0.0, 0.25, 1.0])  # many ties
ints = st.integers(-(2**31) + 1, 2**31 - 1)


def source_of(keys, kept=None, chunk=None):
    """A source of the keys, chunk by chunk."""
    pieces = keys.split(chunk) if chunk else [keys]
    flags = [None] * len(pieces) if kept is None else kept.split(chunk) if chunk else [kept]
    return KeySource(lambda: zip(pieces, flags, strict=True), lambda positions: positions)


def find_threshold(sources, count):
    [threshold] = find_thresholds([sources], [count])
    return threshold


def select(tensors, dropped, count, chunk=None):
    """Which scores of each tensor go, as `Pruner` asks for it: dropped ones first, chunk by chunk, tensor by tensor."""
    sources = []
    for scores, gone in zip(tensors, dropped, strict=True):
        sources.append(source_of(order_keys(scores), ~torch.tensor(gone, dtype=torch.bool), chunk))
    return [drop.tolist() for drop in taken(sources, find_threshold(sources, count))]


def select_one(scores, count, chunk=None):
    [drop] = select([torch.as_tensor(scores)], [[False] * len(scores)], count, chunk)
    return "".join("x" if gone else "." for gone in drop)


def test_order_keys_rise_with_the_scores():
    scores = [-math.inf, -3e38, -2.0, -1.0000001, -1.0, -1e-45, 0.0, 1e-45, 1e-38, 1.0, 1.0000001, 3e38, math.inf]
    keys = order_keys(torch.tensor(scores)).tolist()
    assert keys == sorted(set(keys))
    assert min(keys) > LOWEST_KEY


def test_negative_and_positive_zero_have_one_key():
    assert order_keys(torch.tensor([-0.0, 0.0])).tolist() == [0, 0]


@quick
@given(left=numbers, right=numbers)
def test_order_keys_compare_as_their_scores_do(left, right):
    first, second = order_keys(torch.tensor([left, right], dtype=torch.float32)).tolist()
    assert (first < second) == (left < right)
    assert (first == second) == (left == right)


@quick
@given(scores=st.lists(ints, max_size=10))
def test_order_keys_of_integers_are_the_integers(scores):
    assert order_keys(torch.tensor(scores, dtype=torch.int32)).tolist() == scores


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
def test_order_keys_are_int32_and_leave_the_scores_alone(dtype):
    scores = torch.tensor([[3, -1], [-2, 0]]).to(dtype)
    before = scores.clone()
    keys = order_keys(scores)
    assert keys.dtype == torch.int32
    assert keys.shape == scores.shape
    assert torch.equal(scores, before)


@quick
@given(pairs=st.lists(st.tuples(ints, st.booleans()), max_size=20))
def test_demote_puts_what_is_not_kept_below_every_score(pairs):
    keys = torch.tensor([key for key, _ in pairs], dtype=torch.int32)
    kept = torch.tensor([is_kept for _, is_kept in pairs], dtype=torch.bool)
    before = keys.clone()
    assert demote(keys, kept).tolist() == [key if is_kept else LOWEST_KEY for key, is_kept in pairs]
    assert torch.equal(keys, before)


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3.0, 1.0, 2.0, 4.0], 2, ".xx."),
        ([1.0, 1.0, 1.0, 1.0], 2, "xx.."),
        ([2.0, 1.0, 1.0, 0.0, 1.0], 3, ".xxx."),
        ([-1.0, -5.0, 0.0, 5.0], 2, "xx.."),
        ([0.0, -0.0, 0.0, -0.0], 2, "xx.."),
        ([1.0, -0.0, 0.0, -1.0], 2, ".x.x"),
        ([7.0], 1, "x"),
    ],
)
def test_masks_worked_out_by_hand(scores, count, expected):
    assert select_one(scores, count) == expected


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, math.inf])
@pytest.mark.parametrize("chunk", [None, 1, 7, 100])
def test_of_a_hundred_equal_scores_exactly_the_first_half_goes(value, chunk):
    assert select_one([value] * 100, 50, chunk) == "x" * 50 + "." * 50
    assert select_one([value] * 100, 29, chunk) == "x" * 29 + "." * 71


def test_ties_across_tensors_go_to_the_earlier_tensor():
    tensors = [torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0])]
    dense = [[False] * 2, [False] * 2, [False]]
    assert select(tensors, dense, 1) == [[False, False], [False, True], [False]]
    assert select(tensors, dense, 2) == [[False, True], [False, True], [False]]
    assert select(tensors, dense, 3) == [[False, True], [True, True], [False]]
    assert select(tensors, dense, 4) == [[False, True], [True, True], [True]]
    assert select(tensors, dense, 5) == [[True, True], [True, True], [True]]


def test_what_is_dropped_already_goes_first_whatever_its_score():
    tensors = [torch.tensor([-9.0, 5.0, 0.0]), torch.tensor([9.0, 1.0])]
    dropped = [[False, True, False], [True, False]]
    assert select(tensors, dropped, 2) == [[False, True, False], [True, False]]
    assert select(tensors, dropped, 3) == [[True, True, False], [True, False]]
    assert select(tensors, dropped, 4) == [[True, True, True], [True, False]]


@quick
@given(
    tensors=st.lists(st.lists(few_scores, max_size=8) | st.lists(numbers, max_size=8), min_size=1, max_size=4),
    chunk=st.none() | st.integers(1, 5),
    data=st.data(),
)
def test_exactly_the_lowest_of_many_tensors_go_as_the_reference_says(tensors, chunk, data):
    total = sum(map(len, tensors))
    if total == 0:
        return
    dropped = [data.draw(st.lists(st.booleans(), min_size=len(tensor), max_size=len(tensor))) for tensor in tensors]
    count = data.draw(st.integers(max(sum(map(sum, dropped)), 1), total), label="count")
    drop = select([torch.tensor(tensor, dtype=torch.float32) for tensor in tensors], dropped, count, chunk)
    assert drop == references.lowest_of_many(tensors, dropped, count)
    assert sum(map(sum, drop)) == count


@quick
@given(scores=st.lists(ints | st.integers(0, 3), min_size=1, max_size=30), data=st.data())
def test_integer_scores_are_ranked_without_rounding(scores, data):
    count = data.draw(st.integers(1, len(scores)))
    [drop] = select([torch.tensor(scores, dtype=torch.int32)], [[False] * len(scores)], count)
    gone = references.lowest(scores, [False] * len(scores), count)
    assert drop == [index in gone for index in range(len(scores))]


def test_scores_that_differ_in_either_half_of_their_bits_are_told_apart():
    scores = torch.tensor([0x20001, 0x20000, 0x1FFFF, 0x10000, -1, -0x10000, -0x10001, 0], dtype=torch.int32)
    order = [6, 5, 4, 7, 3, 2, 1, 0]
    for count in range(1, 9):
        [drop] = select([scores], [[False] * 8], count)
        assert {index for index, gone in enumerate(drop) if gone} == set(order[:count])


@pytest.mark.parametrize("chunk", [1, 999, 4096, 30_000])
def test_chunks_do_not_change_the_choice(chunk):
    scores = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).round(decimals=2)
    whole = select([scores], [[False] * 20_000], 9_999)
    assert select([scores], [[False] * 20_000], 9_999, max(chunk, 50)) == whole
    assert sum(whole[0]) == 9_999
    gone = references.lowest(scores.tolist(), [False] * 20_000, 9_999)
    assert whole[0] == [index in gone for index in range(20_000)]


def test_a_tensor_split_over_sources_is_chosen_from_as_a_whole():
    scores = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    [whole] = select([scores], [[False] * 7], 5)
    parts = select([scores[:3], scores[3:4], scores[4:]], [[False] * 3, [False], [False] * 3], 5)
    assert parts[0] + parts[1] + parts[2] == whole


def test_one_of_a_million_is_kept_and_one_of_a_million_goes():
    scores = torch.zeros(1_000_000)
    scores[123_456] = 1.0
    scores[654_321] = -1.0
    sources = [source_of(order_keys(scores))]
    [drop] = taken(sources, find_threshold(sources, 999_999))
    assert (~drop).nonzero().flatten().tolist() == [123_456]
    [drop] = taken(sources, find_threshold(sources, 1))
    assert drop.nonzero().flatten().tolist() == [654_321]


def test_a_threshold_says_how_many_equal_keys_it_takes():
    sources = [source_of(torch.tensor([5, 3, 5, 5], dtype=torch.int32))]
    assert find_threshold(sources, 3) == Threshold(key=5, ties=2, all_ties=False)
    assert find_threshold(sources, 4) == Threshold(key=5, ties=3, all_ties=True)
    assert find_threshold(sources, 1) == Threshold(key=3, ties=1, all_ties=True)


def test_ties_go_in_order_or_up_to_the_last_by_its_index():
    sources = [source_of(torch.tensor([5, 3, 5, 5], dtype=torch.int32))]
    [drop] = taken(sources, Threshold(5, ties=2, all_ties=False))
    assert drop.tolist() == [True, True, True, False]
    [drop] = taken(sources, Threshold(5, ties=9, all_ties=False, last=0))
    assert drop.tolist() == [True, True, False, False]


@pytest.mark.parametrize("chunks", [[torch.zeros(0, dtype=torch.int32)], []], ids=["one empty chunk", "no chunk"])
def test_an_empty_tensor_among_others_loses_nothing(chunks):
    empty = KeySource(lambda: [(keys, None) for keys in chunks], lambda positions: positions)
    sources = [empty, source_of(torch.tensor([2, 1], dtype=torch.int32))]
    assert [drop.tolist() for drop in taken(sources, find_threshold(sources, 1))] == [[], [False, True]]


# ---- A small share of many ----


def shortlisted(tensors, masks, count, chunk=1000):
    """What `lowest` takes of each tensor where a shortlist serves, as sets of flat indices, or None."""
    sources = [source_of(order_keys(scores), mask, chunk) for scores, mask in zip(tensors, masks, strict=True)]
    kept = sum(len(scores) if mask is None else int(mask.sum()) for scores, mask in zip(tensors, masks, strict=True))
    drops = list(lowest([KeyPool(sources, count, kept, sum(map(len, tensors)))]))
    assert len({drop.dtype for drop in drops}) == 1
    return None if drops[0].dtype == torch.bool else [set(indices.tolist()) for indices in drops]


@pytest.mark.parametrize("decimals", [1, 2, 6])  # many ties, some, hardly any
@pytest.mark.parametrize("count", [1, 60, 700, 1400])
@pytest.mark.parametrize("chunk", [313, 10_000])
def test_a_small_share_is_the_one_that_a_full_ranking_drops(decimals, count, chunk):
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(size, generator=generator).round(decimals=decimals) for size in (5000, 3000, 1)]
    masks = [torch.rand(5000, generator=generator) < 0.7, None, torch.tensor([True])]
    gone = [~mask if mask is not None else torch.zeros(3000, dtype=torch.bool) for mask in masks]
    dropped = [tensor.tolist() for tensor in gone]
    full = select(tensors, dropped, sum(map(sum, dropped)) + count)
    newly = [
        {index for index, goes in enumerate(row) if goes and not gone_before[index]}
        for row, gone_before in zip(full, dropped, strict=True)
    ]
    assert sum(map(len, newly)) == count
    assert shortlisted(tensors, masks, count, chunk) == newly


@pytest.mark.parametrize(
    "setting",
    [{"_SAMPLE": 1}, {"_SHORTLIST": 499}, {"_SHORTLIST": 505}, {"count": 2001}],
    ids=["sample", "count", "listed", "share"],
)
def test_where_a_shortlist_does_not_serve_nothing_is_chosen(monkeypatch, setting):
    setting = dict(setting)
    count = setting.pop("count", 500)
    for name, value in setting.items():
        monkeypatch.setattr(selection, name, value)
    assert shortlisted([torch.arange(8000.0)], [None], count, chunk=10_000) is None


def test_a_sample_that_misleads_is_noticed(monkeypatch):
    """Every third key is sampled, and those are the lowest by far: their bound lies below most of the others."""
    scores = torch.arange(9000.0)
    scores[::3] -= 1e6
    monkeypatch.setattr(selection, "_SAMPLE", 4096)
    assert shortlisted([scores], [None], 2200) is None
    assert shortlisted([scores.flip(0)], [None], 2200) is None
