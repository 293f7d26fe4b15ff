"""Metrics as `evaluate` metrics; the common ones need no network."""

import importlib.util
from collections.abc import Sequence

import datasets
import evaluate

_TEXTS = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})

_FEATURES = datasets.Features({"predictions": datasets.Value("int32"), "references": datasets.Value("int32")})


class Accuracy(evaluate.Metric):
    """The share of predictions that equal their references."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=_FEATURES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        correct = sum(int(guess == truth) for guess, truth in zip(predictions, references, strict=True))
        return {"accuracy": correct / len(references)}


class F1(evaluate.Metric):
    """The unweighted mean over all classes of `2 * precision * recall / (precision + recall)` (macro F1)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=self.__doc__, citation="", features=_FEATURES)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        scores = []
        for label in sorted(set(references) | set(predictions)):
            hits = sum(int(guess == truth == label) for guess, truth in zip(predictions, references, strict=True))
            guessed = sum(int(guess == label) for guess in predictions)
            actual = sum(int(truth == label) for truth in references)
            scores.append(2 * hits / (guessed + actual))
        return {"f1": sum(scores) / len(scores)}


class Rouge(evaluate.Metric):
    """The mean F1 of stemmed words (`rouge1`), pairs of words (`rouge2`) and longest common sequence (`rougeL`).

    Computed by the package `rouge-score` (Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=_TEXTS)

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        kinds = ["rouge1", "rouge2", "rougeL"]
        scorer = RougeScorer(kinds, use_stemmer=True)
        scores = [scorer.score(truth, guess) for guess, truth in zip(predictions, references, strict=True)]
        return {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}


METRICS: dict[str, type[evaluate.Metric]] = {"accuracy": Accuracy, "f1": F1, "rouge": Rouge}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """A metric of the table above, or by `evaluate.load` a local path or (with a network) a Hub name.

    Raises ImportError if a metric needs a package that is not installed.
    """
    if name == "rouge" and importlib.util.find_spec("rouge_score") is None:
        raise ImportError("it needs the package rouge-score; pip install rouge-score")
    return METRICS[name]() if name in METRICS else evaluate.load(name)
