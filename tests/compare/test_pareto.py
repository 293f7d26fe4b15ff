"""The front of points that no other beats, by brute force; and the best model within limits."""

import math

import pytest
from compared_models import HARDWARE, cost, evaluation
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_prune.compare.charts import charts_of
from hf_prune.compare.comparison import compare_models
from hf_prune.compare.models import ComparedModel
from hf_prune.compare.pareto import Limits, axes_of, pareto_front
from hf_prune.errors import CompareError

FEW = st.integers(0, 4).map(float)  # so that there are ties


def model(name, value, sparsity=0.5, megabytes=2.0, milliseconds=4.0, **changes):
    fields = {
        "name": name,
        "folder": None,
        "is_pruned": True,
        "sparsity": sparsity,
        "file_bytes": round(1e6 * megabytes),
        "evaluations": (evaluation(value),),
        "costs": (cost(milliseconds), cost(10 * milliseconds, 16)),
        "hardware": HARDWARE,
    }
    return ComparedModel(**fields | changes)


@settings(deadline=None)
@given(points=st.lists(st.tuples(FEW, FEW)), lower_x=st.booleans(), lower_y=st.booleans())
def test_the_front_has_the_points_that_no_other_beats(points, lower_x, lower_y):
    def is_better(x, other, lower):
        return x < other if lower else x > other

    def beats(one, other):
        is_worse = is_better(other[0], one[0], lower_x) or is_better(other[1], one[1], lower_y)
        return one != other and not is_worse

    unbeaten = [at for at, point in enumerate(points) if not any(beats(other, point) for other in points)]
    front = pareto_front(points, lower_x, lower_y)
    assert sorted(front) == unbeaten
    xs = [points[at][0] for at in front]
    assert xs == sorted(xs, reverse=not lower_x)


def test_the_front_of_an_axis_follows_what_is_better_there_and_in_the_metric():
    models = [model("slow", 0.9, milliseconds=8), model("fast", 0.8), model("worst", 0.7, milliseconds=9)]
    comparison = compare_models(models)
    axes = {axis.key: [one.name for one in comparison.front(axis)] for axis in comparison.axes}
    assert axes == {
        "sparsity": ["slow"],
        "megabytes": ["slow"],
        "milliseconds_1": ["fast", "slow"],
        "milliseconds_16": ["fast", "slow"],
    }
    lower = [
        model(name, 0, evaluations=(evaluation(value, metric="perplexity"),), sparsity=sparsity)
        for name, value, sparsity in (("a", 30, 0.5), ("b", 40, 0.7), ("c", 50, 0.6))
    ]
    comparison = compare_models(lower)
    assert [one.name for one in comparison.front(comparison.axes[0])] == ["b", "a"]
    assert comparison.choice.best.name == "a"


def test_an_axis_that_no_model_has_a_value_on_is_left_out():
    assert [axis.key for axis in axes_of([model("a", 0.9, costs=(), file_bytes=None)])] == ["sparsity"]


def test_the_time_of_several_samples_is_that_which_most_models_have():
    models = [model("a", 0.9, costs=(cost(1), cost(9, 8))), model("b", 0.9), model("c", 0.8)]
    assert [axis.key for axis in axes_of(models)][-1] == "milliseconds_16"


def test_times_of_numbers_of_samples_that_no_two_models_share_are_left_out():
    models = [model(str(count), 0.9, costs=(cost(1), cost(9, count))) for count in (9, 24, 11)]
    assert [axis.key for axis in axes_of(models)][-1] == "milliseconds_1"
    assert [axis.key for axis in axes_of(models[:1])][-1] == "milliseconds_9"


# ---- The best within limits ----


def chosen(models, **limits):
    return compare_models(models, limits=Limits(**limits)).choice


MODELS = [
    model("good", 0.9, sparsity=0.5, megabytes=4, milliseconds=10),
    model("middle", 0.8, sparsity=0.7, megabytes=3, milliseconds=6),
    model("small", 0.7, sparsity=0.9, megabytes=1, milliseconds=2),
    model("dense", 0.95, sparsity=0.0, megabytes=5, milliseconds=1, is_pruned=False),
]


@pytest.mark.parametrize(
    ("limits", "name", "candidates"),
    [
        ({}, "good", 3),
        ({"latency_ms": 10}, "good", 3),
        ({"latency_ms": 6}, "middle", 2),
        ({"latency_ms": 5.9}, "small", 1),
        ({"max_mb": 3.5}, "middle", 2),
        ({"min_sparsity": 0.7}, "middle", 2),
        ({"min_sparsity": 0.6, "latency_ms": 3}, "small", 1),
    ],
)
def test_the_best_is_the_pruned_model_with_the_best_metric_within_the_limits(limits, name, candidates):
    choice = chosen(MODELS, **limits)
    assert (choice.best.name, choice.closest, choice.candidates) == (name, None, candidates)


def test_without_a_model_within_the_limits_the_closest_is_named():
    choice = chosen(MODELS, latency_ms=1.9)
    assert (choice.best, choice.closest.name) == (None, "small")
    comparison = compare_models(MODELS, limits=Limits(max_mb=0.5, min_sparsity=0.95))
    assert comparison.verdict[0].startswith(
        "No model has at most 0.5 MB and at least 95% sparsity. The closest is small, accuracy 0.7000 on 400 samples"
    )
    assert comparison.push_command() is None


def test_what_a_limit_is_about_must_have_been_measured():
    models = [model("untimed", 0.9, costs=()), model("timed", 0.8)]
    assert chosen(models, latency_ms=5).best.name == "timed"
    only = compare_models(models[:1], limits=Limits(latency_ms=5))
    assert only.verdict == [
        "No model is known to have at most 5 ms for one sample: it was not measured with these weights."
    ]


def test_of_equal_metrics_the_smaller_model_is_best_then_the_sparser_and_then_the_faster():
    assert chosen([model("large", 0.9, megabytes=3), model("small", 0.9)]).best.name == "small"
    assert chosen([model("fast", 0.9, milliseconds=1), model("sparse", 0.9, sparsity=0.6)]).best.name == "sparse"
    assert chosen([model("slow", 0.9, milliseconds=9), model("fast", 0.9)]).best.name == "fast"


def test_the_verdict_says_what_stands_against_it():
    models = [model("a", 0.9), model("b", 0.89), model("c", 0.5)]
    error = math.sqrt(0.9 * 0.1 / 400)
    assert compare_models(models).verdict[1:] == [
        "It was chosen among 3 by the same data that its metric is from, so the metric is a little better than it will "
        "be on new data.",
        f"The standard error of this accuracy is {100 * error:.1f} points; b is within it.",
    ]


def test_models_beyond_the_limits_are_not_told_as_nearly_as_good():
    models = [model("a", 0.9, sparsity=0.8), model("b", 0.89, sparsity=0.8), model("c", 0.9, sparsity=0.5)]
    assert compare_models(models, limits=Limits(min_sparsity=0.7)).verdict[-1].endswith("points; b is within it.")


@pytest.mark.parametrize(
    ("times", "labels"),
    [
        ((4.001, 4.004), ["4.0006", "4.0012", "4.0018", "4.0024", "4.0030", "4.0036", "4.0042"]),
        ((1, 9), ["0.0", "1.5", "3.0", "4.5", "6.0", "7.5", "9.0", "10.5"]),
        ((1e9, 9e9), ["0", "1.5e+09", "3e+09", "4.5e+09", "6e+09", "7.5e+09", "9e+09", "1.05e+10"]),
    ],
)
def test_ticks_of_charts_have_the_decimals_that_tell_them_apart(times, labels):
    models = [model(str(milliseconds), 0.9, milliseconds=milliseconds) for milliseconds in times]
    chart = next(one for one in charts_of(compare_models(models)) if "1 sample" in one.title)
    assert [label for _, label in chart.x_ticks] == labels


def test_ticks_of_shares_are_in_percent():
    models = [model("a", 0.9, sparsity=0.5), model("b", 0.9, sparsity=0.5012)]
    labels = [label for _, label in charts_of(compare_models(models))[0].x_ticks]
    assert labels[:2] == ["49.975%", "50.000%"]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    ("limits", "key"),
    [
        ({"latency_ms": 0.0}, "--latency-ms"),
        ({"max_mb": math.nan}, "--max-mb"),
        ({"min_sparsity": 1.5}, "--min-sparsity"),
    ],
)
def test_limits_that_mean_nothing_are_refused(limits, key):
    with pytest.raises(CompareError, match=rf"^{key}: expected "):
        Limits(**limits)
