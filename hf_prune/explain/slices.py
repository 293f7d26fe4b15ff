"""Samples that have something in common, and on which of them the pruned model is worse: the worst first."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..publish.explanation import Compared, Slice
from .resampling import Bootstrap, compared, ratio
from .samples import Samples
from .significance import holm, paired_test, sign_test

# Of smaller slices nothing is said; of a column, this many values at most have slices, the most frequent ones.
LEAST_SAMPLES, MOST_VALUES = 10, 20

# Name -> what texts of the slice have somewhere, in upper or lower case.
EXPRESSIONS: dict[str, str] = {
    "negations": r"\b(?:not|no|never|none|nobody|nothing|nowhere|neither|nor|cannot|without|hardly|barely|scarcely)\b"
    r"|n['\u2019]t\b",
}


@dataclass(frozen=True)
class Group:
    """The samples of a slice: `by` and `value` are those of `Slice`, `inside` says which samples (bool)."""

    by: str
    value: str
    inside: np.ndarray


def groups_of_values(by: str, values: Sequence[object]) -> list[Group]:
    """The samples with each value of a column; of numbers with many values, quarters."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    counts = Counter(str(value) for value in values)
    if len(numbers) == len(values) and len(counts) > MOST_VALUES:
        return quarters(by, np.array(numbers))
    texts = np.array([str(value) for value in values])
    return [Group(by, value, texts == value) for value, _ in counts.most_common(MOST_VALUES)]


def quarters(by: str, numbers: np.ndarray, unit: str = "") -> list[Group]:
    """The samples in each quarter of a number's values; fewer groups where many values are equal."""
    ends = np.unique(np.quantile(numbers, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    found, low = [], numbers.min()
    for place, high in enumerate(ends):
        inside = (numbers <= high) & (numbers > ends[place - 1] if place else True)
        low = numbers[inside].min()
        words = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
        found.append(Group(by, f"{words}{unit}", inside))
    return found


def groups_of_rarity(rows: Sequence[Sequence[int]], counts: Mapping[int, int]) -> list[Group]:
    """The samples in quarters of the rarity of their tokens: the mean of -log2 of each one's share of all tokens.

    `counts` says how often each token occurs; one that does not occur counts as half a token.
    """
    total = max(sum(counts.values()), 1)
    of_tokens = {token: -np.log2(max(counts.get(token, 0), 0.5) / total) for row in rows for token in row}
    rarity = np.array([np.mean([of_tokens[token] for token in row]) if len(row) else 0.0 for row in rows])
    names = ("commonest quarter", "commoner quarter", "rarer quarter", "rarest quarter")
    found = quarters("rarity", rarity)
    if len(found) != len(names):
        return found
    return [Group("rarity", name, group.inside) for name, group in zip(names, found, strict=True)]


def counted_in(training: Samples | None) -> str:
    """Where it is counted how often each token occurs."""
    return "the training texts" if training is not None else "the texts themselves, as no training data were given"


def groups_of_expressions(texts: Sequence[str], expressions: Mapping[str, str]) -> Iterator[Group]:
    """The samples whose text has each expression somewhere, and those whose text does not."""
    for name, expression in expressions.items():
        search = re.compile(expression, re.IGNORECASE).search
        inside = np.array([search(text) is not None for text in texts], dtype=bool)
        yield Group(name, "with", inside)
        yield Group(name, "without", ~inside)


def groups_of_lengths(lengths: np.ndarray, cut_at: int | None) -> list[Group]:
    """The samples in quarters of their numbers of tokens; the last one says so where it has texts that may be cut."""
    found = quarters("length", lengths, " tokens")
    if not found or lengths.max() != cut_at:
        return found
    low = int(lengths[found[-1].inside].min())
    cut = f"{low} or more tokens (cut{f' at {cut_at}' if low != cut_at else ''})"
    return [*found[:-1], Group("length", cut, found[-1].inside)]


def groups_of_samples(
    samples: Samples, lengths: np.ndarray, expressions: Mapping[str, str], cut_at: int | None = None
) -> list[Group]:
    """The samples by their number of tokens, by the values of each column, and by what their texts have.

    Texts are cut at `cut_at` tokens.
    """
    found = groups_of_lengths(lengths, cut_at)
    for name, values in samples.columns.items():
        found += groups_of_values(name, values)
    if samples.texts is not None:
        found += groups_of_expressions(samples.texts, EXPRESSIONS | dict(expressions))
    return [group for group in found if not group.inside.all()]


def words_of_left_out(slices: int) -> list[str]:
    """A note about slices that are too small."""
    number = f"{slices:,} slice{' is' if slices == 1 else 's are'} not shown, with fewer than {LEAST_SAMPLES} samples."
    return [number] if slices else []


@dataclass(frozen=True)
class Measured:
    """A slice's sums for each sample (float64): the metric's, of the pruned and the dense model, and what it is of.

    For classifiers `of` is one for each sample of the slice; for language models the number of tokens.
    """

    by: str
    value: str
    of: np.ndarray
    pruned: np.ndarray
    dense: np.ndarray | None


def compare_slices(
    metric: str, measured: Sequence[Measured], bootstrap: Bootstrap, is_share: bool
) -> tuple[list[Slice], int]:
    """The metric on slices, those first where the pruned model is worst; and how many had too few samples.

    Worst is by the difference to the dense model, or without one by the pruned model's own value. A slice `is_worse`
    where the difference is to the worse and Holm's method rejects, over all slices, that there is none: by McNemar's
    exact test for right answers, otherwise by a paired t test.
    """
    large = [one for one in measured if (one.of > 0).sum() >= LEAST_SAMPLES]
    if not large:
        return [], len(measured)
    columns = [sums for one in large for sums in (one.of, one.pruned, one.dense if one.dense is not None else one.of)]
    sums = bootstrap.sums(np.stack(columns, axis=1))
    found: list[tuple[Measured, Compared]] = []
    for place, one in enumerate(large):
        of, pruned, dense = sums[:, 3 * place : 3 * place + 3].T
        values = [ratio(pruned, of), *([ratio(dense, of)] if one.dense is not None else [])]
        figure = compared(metric, int(one.of.sum()), values, is_share=is_share)
        found.append((one, figure))
    sign = 1 if is_share else -1  # of a loss, less is better
    rejected = holm([_p_value(one, is_share) for one in large]) if all(one.dense is not None for one in large) else None
    slices = []
    for place, (one, figure) in enumerate(found):
        is_worse = None
        if rejected is not None and figure.difference is not None:
            is_worse = rejected[place] and sign * figure.difference.value < 0
        slices.append(Slice(by=one.by, value=one.value, metric=figure, is_worse=is_worse))
    slices.sort(key=lambda one: sign * (one.metric.difference or one.metric.pruned).value)
    return slices, len(measured) - len(large)


def _p_value(one: Measured, is_share: bool) -> float:
    assert one.dense is not None
    there = one.of > 0
    differences = (one.pruned - one.dense)[there]
    if is_share:
        return sign_test(int((differences < 0).sum()), int((differences > 0).sum()))
    return paired_test(differences, one.of[there])
