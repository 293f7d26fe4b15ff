from fractions import Fraction

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.masking.selection import KeySource, find_thresholds, taken
from hf_prune.methods.keys import demote, order_keys
from hf_prune.methods.patterns import BLOCK_NORMS, PATTERNS, Pattern, count_of, parse_pattern

quick = settings(max_examples=25, deadline=None, derandomize=True)

# One or more of each entry of the table, with the shapes (batch, out, in) they are tried on.
EXAMPLES = {
    "unstructured": ["unstructured"],
    "n:m": ["1:4", "2:4", "4:8", "1:3"],
    "block": ["block:4x1", "block:1x4", "block:2x2", "block:16x16", "block:1x1"],
}
TEXTS = [text for texts in EXAMPLES.values() for text in texts]


def dropped_units(mask, text):
    pattern = parse_pattern(text)
    return PATTERNS[pattern.name].dropped(mask, pattern)


def prune(scores, mask, text, count, norm="l2"):
    """The mask with `count` units dropped in all, as `Pruner` puts the pieces together for one tensor."""
    pattern = parse_pattern(text)
    rules = PATTERNS[pattern.name]
    dropped = rules.dropped(mask, pattern)
    if count <= int(dropped.sum()):
        return mask
    keys = demote(order_keys(rules.scores(scores, mask, pattern, norm)), ~dropped).reshape(-1)
    sources = [KeySource(lambda: [(keys, None)], lambda positions: positions)]
    [drop] = taken(sources, find_thresholds([sources], [count])[0])
    return rules.drop(drop.reshape(dropped.shape), scores, mask, pattern)


def expected_mask(scores, mask, text, count, norm="l2"):
    pattern = parse_pattern(text)
    if pattern.name == "unstructured":
        return references.drop_weights(scores, mask, count)
    if pattern.name == "n:m":
        return references.drop_in_groups(scores, mask, pattern.rows, pattern.columns, count)
    return references.drop_blocks(scores, mask, pattern.rows, pattern.columns, norm, count)


def picture(mask):
    """One string a row, `#` where a weight is kept."""
    return ["".join("#" if kept else "." for kept in row) for row in mask[0].tolist()]


def dense(scores):
    return torch.ones(scores.shape, dtype=torch.bool)


@st.composite
def pruning_cases(draw, texts, scores=None):
    """A pattern, scores of a shape that it fits, and a mask that may have been pruned before."""
    text = draw(st.sampled_from(texts))
    pattern = parse_pattern(text)
    tall, wide = (pattern.rows, pattern.columns) if pattern.name == "block" else (1, pattern.columns)
    shape = (
        draw(st.integers(1, 2)),
        tall * draw(st.integers(1, max(1, 4 // tall))),
        wide * draw(st.integers(1, max(1, 8 // wide))),
    )
    size = shape[0] * shape[1] * shape[2]
    element = scores or draw(
        st.sampled_from(
            [
                st.sampled_from([0.0, 0.5, 1.0]),
                st.floats(0, 2.0**49, width=32),
                st.integers(0, 3),
                st.integers(0, 2**31 - 1),
            ]
        )
    )
    values = draw(st.lists(element, min_size=size, max_size=size))
    mask = draw(
        st.just([True] * size)
        | st.lists(st.booleans(), min_size=size, max_size=size)
        | st.lists(st.sampled_from([False, False, False, True]), min_size=size, max_size=size)
    )
    dtype = torch.int32 if isinstance(values[0], int) else torch.float32
    tensor = torch.tensor(values, dtype=dtype).reshape(shape)
    return text, tensor, torch.tensor(mask).reshape(shape)


# ---- Counts ----


@pytest.mark.parametrize(
    ("sparsity", "units", "expected"),
    [
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.575, 100, 58),
        (0.5, 100, 50),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.25, 10, 2),
        (0.35, 10, 4),
        (0.0, 100, 0),
        (0.999999, 10, 10),
        (0.999999, 1_000_000, 999_999),
        (0.999999, 500_000, 500_000),
        (0.8, 0, 0),
        (0.5, 1, 0),
        (0.51, 1, 1),
        (1e-07, 10_000_000, 1),
        (0.1, 3 * 10**17, 3 * 10**16),
        (Fraction(1, 3), 3, 1),
        (Fraction(1, 6), 9, 2),
    ],
)
def test_counts_are_exact_and_round_half_to_even(sparsity, units, expected):
    assert count_of(sparsity, units) == expected


@settings(quick, max_examples=200)
@given(
    sparsity=st.integers(0, 999_999).map(lambda part: part / 10**6) | st.floats(0, 1, exclude_max=True),
    units=st.integers(0, 10**12),
)
def test_counts_agree_with_the_reference(sparsity, units):
    count = count_of(sparsity, units)
    assert count == references.count(sparsity, units)
    assert 0 <= count <= units


# ---- Names ----


@pytest.mark.parametrize(
    ("text", "expected", "unit_size", "unit_sparsity"),
    [
        ("unstructured", Pattern("unstructured", 1, 1), 1, 1),
        ("1:4", Pattern("n:m", 1, 4), 4, Fraction(3, 4)),
        ("2:4", Pattern("n:m", 2, 4), 4, Fraction(1, 2)),
        ("4:8", Pattern("n:m", 4, 8), 8, Fraction(1, 2)),
        ("1:3", Pattern("n:m", 1, 3), 3, Fraction(2, 3)),
        ("block:4x1", Pattern("block", 4, 1), 4, 1),
        ("block:1x4", Pattern("block", 1, 4), 4, 1),
        ("block:16x16", Pattern("block", 16, 16), 256, 1),
    ],
)
def test_patterns_are_read_from_their_names(text, expected, unit_size, unit_sparsity):
    pattern = parse_pattern(text)
    assert pattern == expected
    assert pattern.unit_size == unit_size
    assert pattern.unit_sparsity == unit_sparsity


@pytest.mark.parametrize(
    "text",
    [
        *["", "structured", "Unstructured", "block", "block:", "block:4", "block:4:4", "block:4X4", "block:4x4x4"],
        *["block:0x4", "block:4x0", "block:-1x4"],
        *["4:4", "5:4", "0:4", "2:0", "-1:4", "2:4 ", "2:4\n", "2:4:8", "2.0:4"],
    ],
)
def test_other_names_are_refused_with_what_is_allowed(text):
    with pytest.raises(ValueError, match=r"'unstructured', 'n:m' with 0 < n < m .* 'block:RxC'"):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "shape", "words"),
    [
        ("2:4", (1, 3, 6), ["6", "4"]),
        ("4:8", (2, 8, 4), ["4", "8"]),
        ("block:4x1", (1, 6, 8), ["6x8", "4x1"]),
        ("block:1x4", (1, 8, 6), ["8x6", "1x4"]),
        ("block:16x16", (1, 16, 8), ["16x8", "16x16"]),
        ("block:16x16", (3, 8, 16), ["8x16", "16x16"]),
    ],
)
def test_shapes_that_do_not_fit_are_told_with_their_sizes(text, shape, words):
    why = parse_pattern(text).misfit(shape)
    assert why is not None
    assert all(word in why for word in words)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("unstructured", (1, 3, 7)),
        ("2:4", (1, 3, 8)),
        ("2:4", (5, 1, 4)),
        ("block:4x1", (1, 8, 3)),
        ("block:1x4", (1, 3, 8)),
        ("block:16x16", (2, 32, 16)),
        ("block:2x2", (1, 0, 4)),
    ],
)
def test_shapes_that_fit_have_no_complaint(text, shape):
    assert parse_pattern(text).misfit(shape) is None


# ---- Masks worked out by hand ----


def test_single_weights_by_hand():
    scores = torch.tensor([[[0.1, 0.9, 0.3], [0.3, 0.2, 0.8]]])
    assert picture(prune(scores, dense(scores), "unstructured", 3)) == [
        ".#.",
        "#.#",
    ]


def test_two_of_four_by_hand():
    scores = torch.tensor([[[4.0, 1.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0], [0.0, 9.0, 0.0, 8.0, 1.0, 1.0, 2.0, 1.0]]])
    # What it costs to drop two of each group: 1+2, 5+5; 0+0, 1+1.
    assert picture(prune(scores, dense(scores), "2:4", 4)) == [
        "#.#...##",
        ".#.#..##",
    ]
    assert picture(prune(scores, dense(scores), "2:4", 3)) == [
        "#.#.####",
        ".#.#..##",
    ]
    assert picture(prune(scores, dense(scores), "2:4", 1)) == [
        "########",
        ".#.#####",
    ]


def test_one_of_four_and_four_of_eight_by_hand():
    scores = torch.tensor([[[4.0, 1.0, 3.0, 2.0, 7.0, 8.0, 8.0, 6.0]]])
    assert picture(prune(scores, dense(scores), "1:4", 2)) == ["#.....#."]
    assert picture(prune(scores, dense(scores), "4:8", 1)) == ["....####"]


def test_blocks_by_hand():
    scores = torch.tensor(
        [
            [
                [3.0, 0.0, 2.0, 2.0],
                [0.0, 0.0, 1.0, 0.0],
                [1.0, 1.0, 0.0, 4.0],
                [1.0, 1.0, 0.0, 0.0],
            ]
        ]
    )
    # L1 norms are 3, 5; 4, 4 and squared L2 norms 9, 9; 4, 16.
    assert picture(prune(scores, dense(scores), "block:2x2", 1, "l1")) == ["..##", "..##", "####", "####"]
    assert picture(prune(scores, dense(scores), "block:2x2", 1, "l2")) == ["####", "####", "..##", "..##"]
    assert picture(prune(scores, dense(scores), "block:2x2", 2, "l1")) == ["..##", "..##", "..##", "..##"]
    assert picture(prune(scores, dense(scores), "block:2x2", 3, "l2")) == ["....", "....", "..##", "..##"]
    # Columns of four: 5, 2, 3, 6. Rows of four: 7, 1, 6, 2.
    assert picture(prune(scores, dense(scores), "block:4x1", 2, "l1")) == ["#..#", "#..#", "#..#", "#..#"]
    assert picture(prune(scores, dense(scores), "block:1x4", 2, "l1")) == ["####", "....", "####", "...."]


def test_what_is_masked_already_goes_first_within_a_group_by_hand():
    scores = torch.tensor([[[9.0, 1.0, 2.0, 3.0]]])
    mask = torch.tensor([[[False, True, True, True]]])
    assert picture(prune(scores, mask, "2:4", 1)) == ["..##"]
    assert picture(prune(scores, mask, "1:4", 1)) == ["...#"]


def test_a_group_with_one_zero_too_many_counts_as_dropped_and_is_left_alone():
    scores = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0]]])
    mask = torch.tensor([[[True, True, True, True, False, False, False, True]]])
    assert dropped_units(mask, "2:4").tolist() == [[[False, True]]]
    assert picture(prune(scores, mask, "2:4", 1)) == ["####...#"]
    assert picture(prune(scores, mask, "2:4", 2)) == ["..##...#"]


@pytest.mark.parametrize(
    ("text", "row"),
    [("1:4", "...#...#"), ("2:4", "..##..##"), ("4:8", "....####"), ("1:2", ".#.#.#.#")],
)
def test_equal_scores_in_a_group_go_by_index(text, row):
    scores = torch.full((2, 3, 8), 0.25)
    units = dropped_units(dense(scores), text).numel()
    assert picture(prune(scores, dense(scores), text, units)) == [row] * 3


# ---- Against the reference ----


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("norm", BLOCK_NORMS)
@quick
@given(data=st.data())
def test_masks_agree_with_the_reference(text, norm, data):
    _, scores, mask = data.draw(pruning_cases([text]))
    dropped = dropped_units(mask, text)
    count = data.draw(st.integers(int(dropped.sum()), dropped.numel()))
    result = prune(scores, mask, text, count, norm)
    assert result.dtype == torch.bool
    if count > int(dropped.sum()):
        assert result.tolist() == expected_mask(scores.tolist(), mask.tolist(), text, count, norm)
    else:
        assert torch.equal(result, mask)


@pytest.mark.parametrize("norm", BLOCK_NORMS)
def test_blocks_of_16x16_agree_with_the_reference(norm):
    scores = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(2)).abs()
    for count in (0, 1, 5, 11, 12):
        result = prune(scores, dense(scores), "block:16x16", count, norm)
        expected = expected_mask(scores.tolist(), dense(scores).tolist(), "block:16x16", count, norm)
        assert result.tolist() == expected
        assert int((~result).sum()) == count * 256


@pytest.mark.parametrize("text", ["block:4x4", "2:4"])
def test_scores_of_units_do_not_depend_on_the_layout_in_memory(text):
    pattern = parse_pattern(text)
    rules = PATTERNS[pattern.name]
    scores = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(3)).abs()
    elsewhere = scores.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert elsewhere.stride() != scores.stride()
    for norm in BLOCK_NORMS:
        first = rules.scores(scores, dense(scores), pattern, norm)
        second = rules.scores(elsewhere, dense(scores), pattern, norm)
        assert torch.equal(first, second)
    drop = torch.rand(first.shape) < 0.5
    assert torch.equal(
        rules.drop(drop, scores, dense(scores), pattern), rules.drop(drop, elsewhere, dense(scores), pattern)
    )


@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1.0, 1e15, 1e25])
def test_blocks_are_ordered_by_their_l2_norm_at_every_scale_of_weights(scale):
    scores = torch.tensor([[[3.0, 3.0, 1.0, 1.0, 2.0, 2.0]]]) * scale
    assert picture(prune(scores, dense(scores), "block:1x2", 1, "l2")) == ["##..##"]


def test_sums_of_a_unit_are_not_rounded_on_the_way():
    # In float32 2^24 + 1 is 2^24: added one by one both blocks, and both groups, would seem equal.
    big = 2.0**24
    scores = torch.tensor([[[big, 1.0, 1.0, big, 0.0, 0.0]]])
    assert picture(prune(scores, dense(scores), "block:1x3", 1, "l1")) == ["###..."]
    scores = torch.tensor([[[big, 1.0, 1.0, 2 * big, big, 0.0, 0.0, 2 * big]]])
    assert picture(prune(scores, dense(scores), "1:4", 1)) == ["####...#"]


# ---- The contract of every entry ----


def test_every_pattern_has_examples_here():
    assert set(EXAMPLES) == set(PATTERNS)


@pytest.mark.parametrize("name", PATTERNS)
@quick
@given(data=st.data())
def test_contract_of_every_pattern_counts_are_exact_and_masks_only_grow(name, data):
    text, scores, mask = data.draw(pruning_cases(EXAMPLES[name]))
    pattern = parse_pattern(text)
    rules = PATTERNS[name]
    dropped = rules.dropped(mask, pattern)
    assert dropped.dtype == torch.bool
    assert dropped.numel() == mask.numel() // pattern.unit_size

    before = scores.clone(), mask.clone()
    unit_scores = rules.scores(scores, mask, pattern, "l2")
    assert unit_scores.shape == dropped.shape
    assert unit_scores.dtype == scores.dtype
    assert torch.equal(rules.drop(torch.zeros_like(dropped), scores, mask, pattern), mask)

    counts = sorted({int(dropped.sum()), *data.draw(st.lists(st.integers(0, dropped.numel()), max_size=3))})
    for count in counts:
        after = prune(scores, mask, text, count)
        assert not (after & ~mask).any(), "a masked weight came back"
        now = rules.dropped(after, pattern)
        assert int(now.sum()) == max(count, int(dropped.sum()))
        assert not (dropped & ~now).any()
        untouched = rules.drop(torch.zeros_like(now), scores, mask, pattern)
        mask, dropped = after, now
        assert untouched.shape == after.shape
    assert torch.equal(scores, before[0])


@pytest.mark.parametrize("text", TEXTS)
def test_contract_of_every_pattern_dropping_all_units_of_a_dense_tensor_leaves_its_share(text):
    scores = torch.rand(2, 16, 48, generator=torch.Generator().manual_seed(4))
    pattern = parse_pattern(text)
    for count in (0, 1, 2 * 16 * 48 // pattern.unit_size):
        mask = prune(scores, dense(scores), text, count)
        assert int((~mask).sum()) == count * pattern.unit_size * pattern.unit_sparsity


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", [(0, 16, 48), (1, 0, 48), (1, 16, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_contract_of_every_pattern_tensors_without_weights_stay_so(text, shape, dtype):
    pattern = parse_pattern(text)
    rules = PATTERNS[pattern.name]
    scores = torch.zeros(shape, dtype=dtype)
    dropped = rules.dropped(dense(scores), pattern)
    assert dropped.numel() == 0
    assert rules.scores(scores, dense(scores), pattern, "l1").shape == dropped.shape
    assert rules.drop(dropped, scores, dense(scores), pattern).shape == shape


def test_a_tensor_of_one_weight_is_kept_or_dropped():
    scores = torch.tensor([[[0.5]]])
    for text in ("unstructured", "block:1x1"):
        assert picture(prune(scores, dense(scores), text, 0)) == ["#"]
        assert picture(prune(scores, dense(scores), text, 1)) == ["."]


def test_negative_and_signed_zero_scores_of_single_weights_are_ordered_as_numbers():
    scores = torch.tensor([[[0.0, -0.0, -1.0, 1.0, -2.0]]])
    assert picture(prune(scores, dense(scores), "unstructured", 2)) == ["##.#."]
    assert picture(prune(scores, dense(scores), "unstructured", 3)) == [".#.#."]
    assert picture(prune(scores, dense(scores), "unstructured", 4)) == ["...#."]


def test_a_hundred_equal_scores_at_half_leave_fifty():
    scores = torch.ones(1, 10, 10)
    mask = prune(scores, dense(scores), "unstructured", count_of(0.5, 100))
    assert picture(mask) == ["." * 10] * 5 + ["#" * 10] * 5
