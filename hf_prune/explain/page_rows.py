"""The tables of an explanation, for its page and its Markdown: rows of texts, and places on the scale beside them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

from ..publish.card_measured import cost_rows
from ..publish.explanation import Compared, Complexity, Estimate, Explanation, FlippedSample, Slice, UnitGroup
from ..publish.explanation_words import (
    as_share,
    by_kind,
    change,
    complement,
    estimate_ends,
    figure,
    is_of_language,
    is_share,
    percent,
    slice_name,
    three_digits,
    worst_first,
)
from ..publish.record import Cost, Source
from .page_heat import layer_name

# Percent of a scale's width that is left free on both sides, for marks and the text of its ends.
_MARGIN = 6.0


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; `ticks` are (place in percent, text)."""

    low: float
    high: float
    ticks: list[tuple[float, str]]

    def at(self, value: float) -> float:
        """The place of a value, in percent of the width."""
        share = (value - self.low) / (self.high - self.low)
        return round(_MARGIN + (100 - 2 * _MARGIN) * min(max(share, 0.0), 1.0), 2)


@dataclass(frozen=True)
class Mark:
    """An estimate on a scale: its place and those of its interval's ends, in percent."""

    at: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A figure of both models: its texts, and its marks on the table's scale."""

    name: str
    samples: str
    pruned: str
    dense: str
    difference: str
    pruned_mark: Mark
    dense_mark: Mark | None
    is_worse: bool | None = None
    words: str = ""


@dataclass(frozen=True)
class Rows:
    """Figures of both models that share a scale."""

    rows: list[Row]
    scale: Scale

    @property
    def is_compared(self) -> bool:
        """Whether there is a dense model in any row."""
        return any(row.dense for row in self.rows)


def scale_of(values: Iterable[float], as_percent: bool) -> Scale:
    """A scale with round numbers that has all values on it."""
    found = list(values)
    low, high = min(found), max(found)
    if high - low < 1e-9:
        pad = 0.05 if as_percent else max(abs(high), 1.0) * 0.05
        low, high = low - pad, high + pad
        if as_percent and found[0] >= 0:
            low, high = max(low, 0.0), min(high, max(1.0, found[0]))
    ticks = [float(tick) for tick in MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    scale = Scale(min(ticks[0], low), max(ticks[-1], high), [])
    texts = _tick_texts(ticks, as_percent)
    every = 1 if len(ticks) <= 5 else 2
    shown = [(scale.at(tick), text.replace("-", "−")) for tick, text in zip(ticks, texts, strict=True)]
    return Scale(scale.low, scale.high, shown[::every])


def _tick_texts(ticks: Sequence[float], as_percent: bool) -> list[str]:
    """The texts of ticks, with as few decimals as tell them apart."""
    if not as_percent:
        return [f"{tick:g}" for tick in ticks]
    exact = (places for places in range(4) if all(abs(tick - round(tick, places + 2)) < 1e-9 for tick in ticks))
    decimals = next(exact, None)
    return [f"{100 * tick:g}%" if decimals is None else f"{tick:.{decimals}%}" for tick in ticks]


def metric_tables(metrics: Sequence[Compared]) -> list[Rows]:
    """The metrics, in a table of shares and, where there are others, a table for each of those."""
    shares = [one for one in metrics if is_share(one.name, one.pruned.value)]
    others = [one for one in metrics if one not in shares]
    tables = (compared([(one.name, one, None, "") for one in some]) for some in (shares, *[[one] for one in others]))
    return [table for table in tables if table is not None]


def class_rows(explanation: Explanation) -> Rows | None:
    """The recall of each label."""
    return compared([(one.name, one, None, "") for one in explanation.answers.classes], "recall")


def slice_tables(explanation: Explanation) -> list[Rows]:
    """The slices, worst first; for language models in their order, with a table for each kind of slice."""
    if not explanation.slices:
        return []
    if not is_of_language(explanation):
        found = compared([_of_slice(one) for one in worst_first(explanation)], explanation.metric)
        return [found] if found is not None else []
    tables = [compared([_of_slice(one) for one in some], explanation.metric) for some in by_kind(explanation)]
    return [table for table in tables if table is not None]


def _of_slice(one: Slice) -> tuple[str, Compared, bool | None, str]:
    return (slice_name(one), one.metric, one.is_worse, "")


def perturbation_rows(explanation: Explanation) -> Rows | None:
    """The metric where texts were changed, after that of the unchanged texts."""
    if not explanation.perturbations:
        return None
    unchanged = [("unchanged", one, None, "") for one in explanation.metrics if one.name == explanation.metric]
    changed = []
    for one in explanation.perturbations:
        alike = _stay(one.agreement) if one.agreement is not None else ""
        changed.append((one.name, one.metric, None, "; ".join(filter(None, (one.words, alike)))))
    return compared([*unchanged, *changed], explanation.metric)


def _stay(share: Estimate) -> str:
    return f"{as_share(share)} of the pruned model's answers stay as they are on unchanged texts"


def compared(figures: Sequence[tuple[str, Compared, bool | None, str]], metric: str | None = None) -> Rows | None:
    """Rows of (name, figures, whether it is worse, more words), on a scale of their own; None without any.

    `metric` is what the figures are, where their own names are of something else.
    """
    if not figures:
        return None
    what = metric or figures[0][1].name
    as_percent = is_share(what, figures[0][1].pruned.value)
    ends = [end for _, one, _, _ in figures for of in (one.pruned, one.dense) if of for end in estimate_ends(of)]
    scale = scale_of(ends, as_percent)
    rows = []
    for name, one, is_worse, words in figures:
        rows.append(
            Row(
                name=name,
                samples=f"{one.samples:,}",
                pruned=figure(metric or one.name, one.pruned),
                dense=figure(metric or one.name, one.dense),
                difference=change(metric or one.name, one.pruned.value, one.difference) if one.difference else "",
                pruned_mark=_mark(scale, one.pruned),
                dense_mark=_mark(scale, one.dense) if one.dense is not None else None,
                is_worse=is_worse,
                words=words,
            )
        )
    return Rows(rows, scale)


def _mark(scale: Scale, estimate: Estimate) -> Mark:
    low, high = estimate_ends(estimate)
    return Mark(scale.at(estimate.value), scale.at(low), scale.at(high))


@dataclass(frozen=True)
class Spread:
    """The share of zeros over the neurons of a layer: (place, text) of lowest, quartiles and highest, in percent."""

    layer: str
    units: int
    dead: int
    places: list[float]
    median: str


def neuron_rows(units: Iterable[UnitGroup]) -> list[Spread]:
    """How zeros are spread over the neurons, and over heads of which only quantiles are known, layer by layer."""
    rows = []
    for group in units:
        if not group.zeros or (group.structure == "heads" and not group.are_quantiles):
            continue
        quantiles = np.quantile(np.asarray(group.zeros), [0, 0.25, 0.5, 0.75, 1])
        layer = layer_name(group) if group.structure == "neurons" else f"{layer_name(group)} (heads)"
        places = [round(100 * float(one), 2) for one in quantiles]
        rows.append(Spread(layer, group.units, group.dead, places, percent(float(quantiles[2]))))
    return rows


def direction_of(sample: FlippedSample) -> str:
    """Between which answers a sample flipped, in words; empty where its label is unknown."""
    if sample.label is None:
        return ""
    if sample.dense == sample.label:
        return "right to wrong"
    return "wrong to right" if sample.pruned == sample.label else "wrong to wrong"


def flip_rows(explanation: Explanation) -> list[tuple[str, Estimate]]:
    """The shares of answers that changed, by direction, and of all that did."""
    answers = explanation.answers
    if answers.agreement is None:
        return []
    rows = [("changed", complement(answers.agreement))]
    for name, share in (
        ("from right to wrong", answers.to_wrong),
        ("from wrong to right", answers.to_right),
        ("from one wrong answer to another", answers.other),
    ):
        rows += [(name, share)] if share is not None else []
    return rows


def is_smaller(complexity: Complexity) -> bool:
    """Whether the pruned model has fewer parameters than the dense one."""
    return complexity.dense_parameters is not None and complexity.parameters < complexity.dense_parameters


def complexity_rows(complexity: Complexity) -> list[tuple[str, str, str, str]]:
    """(what, dense, pruned, how they compare) of parameters, bytes, forward passes and energy."""
    rows = []
    for name, dense, pruned in (
        ("parameters", complexity.dense_parameters, complexity.parameters),
        ("non-zero parameters", complexity.dense_nonzero, complexity.nonzero),
        ("bytes of the weight files", complexity.dense_file_bytes, complexity.file_bytes),
    ):
        share = percent(pruned / dense) if dense else ""
        rows.append((name, f"{dense:,}" if dense is not None else "", f"{pruned:,}", share))
    rows += cost_rows(complexity.costs, is_smaller(complexity))
    energy = complexity.energy
    if energy is not None:
        share = percent(energy.pruned / energy.dense) if energy.dense else ""
        dense_joules = three_digits(energy.dense) if energy.dense is not None else ""
        rows.append((f"{energy.samples:,} samples: joules", dense_joules, three_digits(energy.pruned), share))
    return rows


def cost_words(costs: Sequence[Cost]) -> str:
    """How forward passes were timed; empty where none was."""
    if not costs:
        return ""
    turns = ", of both models in turns" if costs[0].dense is not None else ""
    batches = " and ".join(
        f"{cost.passes:,} passes ({', '.join(f'{name} {shape_words(shape)}' for name, shape in cost.shapes.items())})"
        for cost in costs
    )
    new = " The dense model was built for it, with the original sizes and new weights." if costs[0].dense_is_new else ""
    firsts = " and the first ".join("sample" if cost.samples == 1 else f"{cost.samples:,} samples" for cost in costs)
    return (
        f"Milliseconds: the median, with quartiles in brackets where they are known, of {batches}{turns}. The inputs "
        f"are the first {firsts} of the data of this page. The model card times inputs of its own, of the shapes that "
        f"it names, so its figures differ from these.{new}"
    )


def shape_words(shape: Sequence[int]) -> str:
    """A shape as `32×128`."""
    return "×".join(map(str, shape))


def source_words(source: Source) -> str:
    """A data set with its configuration, split and rows."""
    parts = [source.name]
    parts += [f"configuration {source.config}"] if source.config else []
    parts += [f"split {source.split}"] if source.split else []
    parts += [source.rows] if source.rows else []
    return ", ".join(parts)
