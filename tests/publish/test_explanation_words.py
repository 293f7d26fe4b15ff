import pytest
from explained import alone, classifier, compared, empty, estimate, language_model, slices, smaller

from hf_prune.publish.explanation import Estimate
from hf_prune.publish.explanation_words import (
    as_number,
    as_share,
    by_kind,
    change,
    complement,
    difference,
    figure,
    is_share,
    may_be_chance,
    number,
    percent,
    summary,
    three_digits,
    worst_first,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.74, "74.0%"),
        (0.0, "0.0%"),
        (1.0, "100.0%"),
        (0.0004, "0.04%"),
        (0.9997, "99.97%"),
        (0.999994, "99.999%"),
        (0.9999999, "over 99.999%"),
        (1e-7, "under 0.001%"),
        (-0.02, "−2.0%"),
    ],
)
def test_shares_are_in_percent_and_never_seem_to_be_all_or_nothing(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.4321, "0.432"), (-1.5, "−1.500"), (1234.56, "1,234.6"), (0.0, "0.000"), (0.00002, "2.0e-05")]
)
def test_other_figures_have_three_decimals(value, text):
    assert number(value) == text


def test_figures_have_their_intervals():
    assert as_share(Estimate(value=0.74, low=0.701, high=0.776)) == "74.0% (70.1 to 77.6)"
    assert as_share(Estimate(value=0.74)) == "74.0%"
    assert as_number(Estimate(value=3.412, low=3.4, high=3.42)) == "3.412 (3.400 to 3.420)"
    assert figure("accuracy", Estimate(value=0.5)) == "50.0%"
    assert figure("loss", Estimate(value=0.5)) == "0.500"
    assert figure("accuracy", None) == ""


def test_differences_of_shares_are_points():
    assert change("accuracy", 0.8, Estimate(value=-0.07, low=-0.099, high=0.0)) == "−7.0 points (−9.9 to 0.0)"
    assert change("loss", 0.8, Estimate(value=0.07, low=-0.01, high=0.15)) == "+0.070 (−0.010 to +0.150)"
    assert difference(compared("accuracy", 0.8)) == ""


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("accuracy", 0.8, True),
        ("f1_macro", 0.8, True),
        ("eval/recall", 1.0, True),
        ("f1", 80.0, False),
        ("loss", 0.4, False),
        ("perplexity", 0.9, False),
        ("matthews_correlation", 0.4, False),
    ],
)
def test_which_metrics_are_shares(name, value, expected):
    assert is_share(name, value) is expected


def test_a_complement_turns_its_interval_round():
    assert complement(Estimate(value=0.75, low=0.5, high=1.0)) == Estimate(value=0.25, low=0.0, high=0.5)
    assert complement(Estimate(value=0.75)) == Estimate(value=0.25)


def test_zero_in_the_interval_may_be_chance():
    assert may_be_chance(Estimate(value=0.1, low=0.0, high=0.2)) is True
    assert may_be_chance(Estimate(value=0.1, low=0.05, high=0.2)) is False
    assert may_be_chance(Estimate(value=0.1)) is None


def test_the_worst_slices_are_first_and_of_losses_the_highest():
    assert [one.value for one in worst_first(classifier(slices=slices()[::-1]))][:2] == ["with", "23 to 52 tokens"]
    kept = [one.model_copy(update={"is_worse": place == 7}) for place, one in enumerate(slices())]
    assert worst_first(classifier(slices=tuple(kept)))[0].value == "without"
    assert worst_first(language_model())[0].value == "the rarest tenth"
    assert worst_first(alone())[0].metric.pruned.value == min(one.metric.pruned.value for one in slices())


def test_slices_of_numbers_are_in_their_order_also_from_a_thousand_on():
    values = ["seen 3,402 to 4,861 times", "seen 909 to 2,857 times", "seen 10,698 times", "seen 7 to 17 times"]
    some = [slices()[0].model_copy(update={"by": "token frequency", "value": value}) for value in values]
    [ordered] = by_kind(classifier().model_copy(update={"slices": tuple(some)}))
    assert [one.value for one in ordered] == [values[3], values[1], values[0], values[2]]


def test_the_summary_of_a_classifier():
    assert summary(classifier()) == [
        "Of 1,500 answers 3.1% (2.2 to 4.0) changed: 1.9% from right to wrong, 1.2% from wrong to right.",
        "The pruned model is significantly worse than the dense one on 2 of 8 slices of the data. Worst accuracy: "
        "“with negations” 74.0% (dense 81.0%), “length: 23 to 52 tokens” 76.3% (dense 81.5%).",
        "Accuracy is 81.3% (79.2 to 83.4), and 83.1% (81.0 to 85.2) with the dense model, a difference of −1.8 points "
        "(−3.9 to +0.3); it may be due to chance.",
        "Confidence and accuracy differ by 6.1% (5.1 to 7.1) on average (expected calibration error); with the dense "
        "model by 3.0% (2.0 to 4.0).",
        "78.6% of the weights in 36 prunable tensors are zero; 1 of 72 heads and 20 of 9,216 neurons have only zero "
        "weights.",
    ]


def test_the_summary_says_what_is_not_known():
    told = summary(alone())
    assert told[0] == "No dense model was compared, so it is unknown which answers pruning changed."
    assert told[1] == "Lowest accuracy of 8 slices of the data: “with negations” 74.0%."
    assert told[2].startswith("Accuracy is 81.3% (79.2 to 83.4).")
    assert "On none of 8 slices of the data is the pruned model significantly worse than the dense one." in summary(
        classifier(slices=slices(is_worse=False))
    )
    assert summary(empty()) == [
        told[0],
        "Confidence and accuracy differ by 0.0% on average (expected calibration error).",
    ]


def test_the_summary_of_a_language_model_and_of_a_smaller_one():
    told = summary(language_model())
    assert told[0] == (
        "For 14.2% (13.9 to 14.5) of the tokens the most likely next token changed; KL(dense || pruned) is 0.213 "
        "(0.208 to 0.218) nats."
    )
    assert told[1].startswith(
        "The pruned model is significantly worse than the dense one on 3 of 12 slices of the data. Worst loss: “token "
        "frequency: the rarest tenth” 7.100 (dense 6.200)"
    )
    assert "due to chance" not in told[2]
    assert summary(smaller())[-1] == "50% of the neurons of each layer and 2 of 6 layers were removed."


def test_a_long_name_of_a_slice_is_shortened_in_a_sentence():
    long = classifier(slices=(slices()[0].model_copy(update={"value": "x" * 500}),))
    assert len(summary(long)[1]) < 200


def test_amounts_have_three_significant_digits():
    values = (0, 0.041234, 4.1234, 41.234, 41234.5)
    assert [three_digits(value) for value in values] == ["0", "0.0412", "4.12", "41.2", "41,200"]


def test_flips_between_wrong_answers_are_told_where_there_are_any():
    answers = classifier().answers.model_copy(update={"other": estimate(0.004, 0.002)})
    assert summary(classifier(answers=answers))[0].endswith("0.4% from one wrong answer to another.")


def test_nothing_changed_is_told_as_such():
    whole = classifier()
    alike = whole.answers.model_copy(update={"agreement": Estimate(value=1.0, low=0.94, high=1.0)})
    same = Estimate(value=0.0, low=-0.06, high=0.06)
    metric = whole.metrics[0].model_copy(update={"difference": same})
    told = summary(classifier(answers=alike, metrics=(metric,)))
    assert told[0] == "Of 1,500 answers none changed: 0.0% (0.0 to 6.0)."
    assert told[2].endswith("a difference of 0.0 points (−6.0 to +6.0).")
