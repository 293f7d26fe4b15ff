from fractions import Fraction

import evaluate
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_prune.publish.record import lower_is_better, recovery
from hf_prune.recipe.metrics import METRICS, load_metric

quick = settings(max_examples=25, deadline=None, derandomize=True)

answers = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def compute(name, pairs):
    guesses, truth = ([pair[side] for pair in pairs] for side in (0, 1))
    return load_metric(name).compute(predictions=guesses, references=truth)


def macro_f1(pairs):
    """From precision and recall, as they are defined: the mean over all labels that are guessed or true."""
    scores = []
    for label in {label for pair in pairs for label in pair}:
        hits = pairs.count((label, label))
        guessed = sum(guess == label for guess, _ in pairs)
        actual = sum(truth == label for _, truth in pairs)
        precision = Fraction(hits, guessed) if guessed else 0
        recall = Fraction(hits, actual) if actual else 0
        scores.append(2 * precision * recall / (precision + recall) if hits else 0)
    return sum(scores) / Fraction(len(scores))


@quick
@given(answers)
@example([(1, 1)])
@example([(0, 1)])
def test_accuracy_is_the_share_of_right_answers(pairs):
    right = sum(guess == truth for guess, truth in pairs)
    assert compute("accuracy", pairs) == {"accuracy": right / len(pairs)}


@quick
@given(answers)
@example([(0, 1)])
@example([(3, 3)])
def test_f1_is_the_mean_of_that_of_every_label(pairs):
    assert compute("f1", pairs) == {"f1": pytest.approx(float(macro_f1(pairs)), abs=1e-12)}


def test_a_case_worked_by_hand():
    # Label 0: precision 2/3, recall 2/2, F1 4/5. Label 1: precision 1/1, recall 1/3, F1 1/2. Label 2: 0 of 1 guessed.
    pairs = [(0, 0), (0, 0), (0, 1), (1, 1), (2, 1)]
    assert compute("accuracy", pairs) == {"accuracy": 3 / 5}
    assert compute("f1", pairs) == {"f1": pytest.approx((4 / 5 + 1 / 2 + 0) / 3)}


# What compares labels; `rouge` compares texts.
OF_LABELS = ["accuracy", "f1"]


def test_the_metrics_are_those_of_labels_and_texts():
    assert sorted(METRICS) == sorted([*OF_LABELS, "rouge"])


def test_rouge_counts_words_pairs_and_common_runs():
    values = load_metric("rouge").compute(predictions=["the cat sat", "a"], references=["the cat ran home", "b"])
    assert values == {
        "rouge1": pytest.approx((2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)) / 2),
        "rouge2": pytest.approx((2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)) / 2),
        "rougeL": pytest.approx((2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)) / 2),
    }


def test_rouge_without_its_package_is_told_with_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install rouge-score"):
        load_metric("rouge")


@pytest.mark.parametrize("name", OF_LABELS)
def test_contract_of_every_metric_through_evaluate(name):
    metric = load_metric(name)
    assert isinstance(metric, evaluate.Metric)
    guesses, truth = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0])
    at_once = metric.compute(predictions=guesses, references=truth)
    assert list(at_once) == [name]
    assert type(at_once[name]) is float
    assert 0 < at_once[name] < 1
    metric.add_batch(predictions=guesses[:3], references=truth[:3])
    metric.add_batch(predictions=guesses[3:], references=truth[3:])
    assert metric.compute() == at_once
    perfect = metric.compute(predictions=truth, references=truth)
    assert perfect == {name: 1.0}
    assert metric.description


@pytest.mark.parametrize("name", OF_LABELS)
def test_metrics_of_ours_are_never_looked_up_elsewhere(name, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("evaluate.load was called")

    monkeypatch.setattr(evaluate, "load", refuse)
    assert load_metric(name).compute(predictions=[1], references=[1]) == {name: 1.0}


def test_two_metrics_of_one_name_do_not_mix_their_answers():
    first, second = load_metric("accuracy"), load_metric("accuracy")
    first.add_batch(predictions=[1, 1], references=[1, 1])
    second.add_batch(predictions=[1, 1], references=[0, 0])
    assert (first.compute(), second.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.0})


SCRIPT = """
import datasets
import evaluate


class Misses(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})
        return evaluate.MetricInfo(description="Wrong answers.", citation="", features=features)

    def _compute(self, predictions, references):
        return {"misses": sum(guess != truth for guess, truth in zip(predictions, references))}
"""


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_metric_of_ones_own_is_loaded_from_a_path(tmp_path, as_folder):
    folder = tmp_path / "misses"
    folder.mkdir()
    (folder / "misses.py").write_text(SCRIPT, encoding="utf-8")
    metric = load_metric(str(folder if as_folder else folder / "misses.py"))
    assert metric.compute(predictions=[0, 1, 1], references=[1, 1, 0]) == {"misses": 2}


def test_an_unknown_metric_without_a_network_is_an_error():
    with pytest.raises((FileNotFoundError, OSError)):
        load_metric("no_such_metric")


# ---- Recovery ----


@pytest.mark.parametrize("name", ["loss", "mlm_loss", "perplexity", "wer", "cer", "mae", "mse", "rmse"])
def test_of_errors_lower_is_better(name):
    assert lower_is_better(name)


@pytest.mark.parametrize("name", ["accuracy", "f1", "bleu", "loss_reduction", "lossless", "answer", "", "Loss of f1"])
def test_of_other_metrics_higher_is_better(name):
    assert not lower_is_better(name)


@pytest.mark.parametrize(
    ("name", "dense", "pruned", "kept"),
    [
        ("accuracy", 0.8, 0.6, 0.75),
        ("accuracy", 0.5, 0.6, 1.2),
        ("accuracy", 0.5, 0.0, 0.0),
        ("loss", 0.5, 0.625, 0.8),
        ("perplexity", 20.0, 10.0, 2.0),
        ("eval_loss", 1.0, 2.0, 0.5),
    ],
)
def test_recovery_is_the_share_of_the_better_direction(name, dense, pruned, kept):
    assert recovery(name, dense, pruned) == pytest.approx(kept)


@pytest.mark.parametrize(
    ("name", "dense", "pruned"),
    [
        *[("f1", 0.0, 0.5), ("f1", -0.5, 0.5), ("f1", 0.5, -0.5), ("f1", 0.0, 0.0), ("loss", 0.0, 0.5)],
        *[("loss", 0.5, 0.0), ("loss", 0.5, float("inf")), ("loss", float("nan"), 0.5)],
    ],
)
def test_where_a_quotient_says_nothing_there_is_no_recovery(name, dense, pruned):
    assert recovery(name, dense, pruned) is None


@quick
@given(st.sampled_from(["f1", "loss"]), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_recovery_is_above_one_where_the_pruned_model_is_better(name, dense, pruned):
    better = pruned < dense if name == "loss" else pruned > dense
    assert (recovery(name, dense, pruned) > 1) == (better and recovery(name, dense, pruned) != 1)
    assert recovery(name, dense, dense) == 1
