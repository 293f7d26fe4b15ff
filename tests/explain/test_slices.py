"""Which samples are in a slice, and on which of them a pruned model is worse."""

import numpy as np
import pytest

from hf_prune.explain.resampling import Bootstrap
from hf_prune.explain.slices import (
    EXPRESSIONS,
    Measured,
    compare_slices,
    groups_of_expressions,
    groups_of_lengths,
    groups_of_rarity,
    groups_of_values,
    quarters,
    words_of_left_out,
)


def test_negations_are_found_as_people_write_them():
    texts = ["it is n't good", "isn\u2019t it", "NOTHING here", "a knot in notes", "all is well", "cannot"]
    inside = next(groups_of_expressions(texts, EXPRESSIONS)).inside
    assert inside.tolist() == [True, True, True, False, False, True]


def test_quarters_hold_every_sample_once_also_where_many_are_equal():
    for numbers in (np.arange(10), np.array([1] * 8 + [5, 9])):
        found = quarters("length", numbers, " tokens")
        assert np.stack([group.inside for group in found]).sum(axis=0).tolist() == [1] * 10
    assert [group.value for group in found] == ["1 tokens", "5 to 9 tokens"]


def test_the_longest_slice_says_where_texts_are_cut():
    lengths = np.array([3, 4, 5, 6, 7, 9, 12, 16])
    assert [group.value for group in groups_of_lengths(lengths, 16)][-1] == "12 or more tokens (cut at 16)"
    assert [group.value for group in groups_of_lengths(lengths, 32)][-1] == "12 to 16 tokens"
    assert [group.value for group in groups_of_lengths(lengths, None)][-1] == "12 to 16 tokens"
    many = groups_of_lengths(np.array([3, 4, 16, 16, 16, 16]), 16)
    assert many[-1].value == "16 or more tokens (cut)"
    assert many[-1].inside.sum() == 4


def test_columns_of_numbers_are_divided_and_those_of_names_are_not():
    assert len(groups_of_values("year", list(range(1900, 2000)))) == 4
    assert [group.value for group in groups_of_values("source", ["b", "a", "b"])] == ["b", "a"]


def test_texts_of_rare_tokens_are_in_the_last_quarter():
    rows = [[1, 1], [1, 2], [2, 3], [9, 9]]
    found = groups_of_rarity(rows, {1: 100, 2: 10, 3: 2})
    assert [group.inside.tolist().index(True) for group in found] == [0, 1, 2, 3]
    assert found[-1].value == "rarest quarter"


def measured(name, before, after):
    ones = np.ones(len(before))
    return Measured("kind", name, of=ones, pruned=np.array(after, float), dense=np.array(before, float))


def test_only_what_is_sure_is_worse_and_the_worst_comes_first():
    right = [1] * 30
    parts = [
        measured("same", right, right),
        measured("worse", right, [1] * 15 + [0] * 15),
        measured("better", [0] * 30, right),
        measured("few", [1] * 9, [0] * 9),
        measured("unsure", right, [1] * 27 + [0] * 3),
    ]
    whole = [np.zeros(30 * len(parts)) for _ in parts]
    padded = []
    for place, one in enumerate(parts):
        fields = {}
        for field in ("of", "pruned", "dense"):
            column = np.zeros(len(whole) * 30)
            values = getattr(one, field)
            column[place * 30 : place * 30 + len(values)] = values
            fields[field] = column
        padded.append(Measured(one.by, one.value, **fields))
    slices, left_out = compare_slices("accuracy", padded, Bootstrap(len(padded[0].of), 200), is_share=True)
    assert left_out == 1
    assert [one.value for one in slices] == ["worse", "unsure", "same", "better"]
    assert [one.is_worse for one in slices] == [True, False, False, False]
    assert slices[0].metric.samples == 30
    assert slices[0].metric.difference.value == -0.5
    assert slices[2].metric.difference.high == pytest.approx(0.1135, abs=1e-3)


def test_of_a_loss_more_is_worse():
    generator = np.random.default_rng(0)
    before = generator.normal(3, 1, 40)
    parts = [measured("a", before, before + 0.5 + generator.normal(0, 0.1, 40)), measured("b", before, before - 0.5)]
    slices, _ = compare_slices("loss", parts, Bootstrap(40, 200), is_share=False)
    assert [(one.value, one.is_worse) for one in slices] == [("a", True), ("b", False)]


def test_one_slice_that_is_too_small_is_one_slice():
    assert words_of_left_out(0) == []
    assert words_of_left_out(1) == ["1 slice is not shown, with fewer than 10 samples."]
    assert words_of_left_out(2) == ["2 slices are not shown, with fewer than 10 samples."]
