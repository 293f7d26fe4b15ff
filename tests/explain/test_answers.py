"""Flips, KL, recall, F1 and calibration of two classifiers, counted by hand."""

import numpy as np
import pytest
import torch
from models import bert, bert_examples
from transformers import default_data_collator

from hf_prune.explain.answers import Asked, ask, shortened
from hf_prune.explain.calibration import calibration_of
from hf_prune.explain.resampling import Bootstrap
from hf_prune.explain.samples import Reader, Samples
from hf_prune.recipe.metrics import F1

LABELS = np.array([0, 0, 1, 1, 2, 2])
DENSE = np.log([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])
PRUNED = np.log([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])


@pytest.fixture
def asked():
    return Asked(LABELS, PRUNED, DENSE, Bootstrap(6, 200))


def test_flips_are_counted_by_what_they_do(asked):
    answers = asked.answers(["a", "b", "c"], [f"text {index}" for index in range(6)])
    shares = (answers.agreement, answers.to_wrong, answers.to_right, answers.other)
    assert [share.value for share in shares] == pytest.approx([3 / 6, 1 / 6, 1 / 6, 1 / 6])
    assert [one.index for one in answers.flipped] == [1, 3, 4]  # the one that was right first
    first = answers.flipped[0]
    assert (first.text, first.label, first.dense, first.pruned) == ("text 1", "a", "a", "b")
    assert (first.dense_confidence, first.pruned_confidence) == pytest.approx((0.7, 0.7))


def test_texts_are_only_shown_where_they_are_given(asked):
    assert {one.text for one in asked.answers(["a", "b", "c"], None).flipped} == {None}
    assert shortened("a  b\n" * 200) == f"{'a b ' * 74}a b…"[:299] + "…"


def test_the_divergence_is_kl_from_dense(asked):
    expected = torch.nn.functional.kl_div(
        torch.tensor(PRUNED), torch.tensor(DENSE), reduction="batchmean", log_target=True
    )
    assert asked.answers(["a", "b", "c"], None).divergence.value == pytest.approx(float(expected))


def test_metrics_are_those_of_recipes(asked):
    found = {one.name: one for one in asked.metrics()}
    answers = PRUNED.argmax(1)
    assert found["accuracy"].pruned.value == pytest.approx(4 / 6)
    assert found["accuracy"].difference.value == pytest.approx(0)
    assert found["f1"].pruned.value == pytest.approx(F1().compute(predictions=answers, references=LABELS)["f1"])
    expected = torch.nn.functional.cross_entropy(torch.tensor(PRUNED), torch.tensor(LABELS))
    assert found["loss"].pruned.value == pytest.approx(float(expected))
    recalls = [one.pruned.value for one in asked.answers(["a", "b", "c"], None).classes]
    assert recalls == [0.5, 1.0, 0.5]


def test_without_a_dense_model_nothing_is_compared():
    answers = Asked(LABELS, PRUNED, None, Bootstrap(6, 100)).answers(["a", "b", "c"], None)
    assert answers.agreement is None
    assert answers.flipped == ()
    assert answers.dense_calibration is None


def test_calibration_is_the_mean_distance_of_accuracy_and_confidence():
    confidence = np.array([0.55, 0.55, 0.9, 0.9, 0.9, 0.9])
    is_right = np.array([True, False, True, True, True, False])
    found = calibration_of(np.log([confidence, 1 - confidence]).T, is_right, Bootstrap(6, 100))
    assert found.error.value == pytest.approx((2 * abs(0.5 - 0.55) + 4 * abs(0.75 - 0.9)) / 6)
    assert [(one.samples, one.accuracy) for one in found.bins] == [(2, 0.5), (4, 0.75)]
    assert all(one.low <= one.confidence < one.high for one in found.bins)


def test_a_model_is_asked_in_batches_and_left_as_it_was():
    model = bert()
    model.train()
    model.bert.encoder.layer[1].eval()
    modes = [module.training for module in model.modules()]
    examples = bert_examples(7)
    rows = [{name: value.tolist() for name, value in example.items()} for example in examples]
    found = ask(Reader(model, default_data_collator), Samples(rows=rows), batch_size=3)
    assert [module.training for module in model.modules()] == modes
    batch = default_data_collator(examples)
    with torch.no_grad():
        expected = model.eval()(input_ids=batch["input_ids"]).logits.double().log_softmax(-1)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)
