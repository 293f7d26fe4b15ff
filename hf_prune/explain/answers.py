"""How the answers of a classifier differ from those of another one, on the same samples."""

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import ExplainError
from ..publish.explanation import Answers, Compared, FlippedSample
from .calibration import calibration_of
from .resampling import Bootstrap, compared, estimate, ratio
from .samples import Reader, Samples, asked, batches_of, lengths_of

# How many samples are listed that both models answer differently, and how many characters of their texts are shown.
MOST_FLIPPED, MOST_CHARACTERS = 100, 300


def ask(reader: Reader, samples: Samples, batch_size: int) -> np.ndarray:
    """The log-probabilities (samples, labels), float64, that a classifier gives to its labels, in one pass."""
    rows = reader.rows(samples)
    found: np.ndarray | None = None
    with asked(reader.model):
        for indices in batches_of(lengths_of(rows), batch_size):
            logits = reader.model(**reader.inputs(rows, indices)).logits
            answers = torch.log_softmax(logits.double(), dim=-1).cpu().numpy()
            if found is None:
                found = np.empty((len(rows), answers.shape[1]))
            found[indices] = answers
    assert found is not None  # there are samples
    if not np.isfinite(found).all():
        raise ExplainError("model", "expected finite logits, got NaN or infinite ones; its training may have diverged")
    return found


class Asked:
    """The answers of one model or of two on the same samples, and the figures of them on all samples and resamples.

    Args:
        labels: the index of the right label of each sample.
        pruned: log-probabilities (samples, labels).
        dense: those of the dense model, or None.
        bootstrap: the resamples of these samples.
    """

    def __init__(self, labels: np.ndarray, pruned: np.ndarray, dense: np.ndarray | None, bootstrap: Bootstrap):
        self.labels, self.bootstrap = labels, bootstrap
        self.pruned, self.dense = pruned, dense
        self.models = [pruned] if dense is None else [pruned, dense]
        self.is_right = [answers.argmax(axis=1) == labels for answers in self.models]
        self.losses = [-answers[np.arange(len(labels)), labels] for answers in self.models]

    def metrics(self) -> list[Compared]:
        """Accuracy, F1 (the unweighted mean over the labels that occur) and the loss, in nats."""
        number = len(self.labels)
        return [
            compared("accuracy", number, self._means(self.is_right), is_share=True),
            compared("f1", number, [self._f1(answers.argmax(axis=1)) for answers in self.models], is_share=True),
            compared("loss", number, self._means(self.losses)),
        ]

    def _means(self, columns: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [sums / len(self.labels) for sums in self.bootstrap.sums(np.stack(columns, axis=1)).T]

    def _f1(self, answers: np.ndarray) -> np.ndarray:
        each = np.arange(self.pruned.shape[1])
        given, actual = answers[:, None] == each, self.labels[:, None] == each
        hits, occurrences = np.split(
            self.bootstrap.sums(np.concatenate([given & actual, given * 1.0 + actual], 1)), 2, 1
        )
        return np.nanmean(ratio(2 * hits, occurrences), axis=1)

    def answers(self, names: Sequence[str], texts: Sequence[str] | None) -> Answers:
        """How they differ; the names are those of the labels. Flipped samples have texts only if these are given."""
        own = Answers(
            classes=tuple(self._recalls(names)),
            calibration=calibration_of(self.pruned, self.is_right[0], self.bootstrap),
        )
        if self.dense is None:
            return own
        now, before = self.pruned.argmax(axis=1), self.dense.argmax(axis=1)
        flipped = now != before
        right, was_right = self.is_right
        divergence = (np.exp(self.dense) * (self.dense - self.pruned)).sum(axis=1)
        shares = [~flipped, flipped & was_right, flipped & right, flipped & ~was_right & ~right]
        means = self._means([*shares, divergence])
        agreement, to_wrong, to_right, other = (estimate(values, len(self.labels)) for values in means[:4])
        return Answers(
            agreement=agreement,
            to_wrong=to_wrong,
            to_right=to_right,
            other=other,
            divergence=estimate(means[4]),
            flipped=tuple(self._flipped(names, texts)),
            classes=own.classes,
            calibration=own.calibration,
            dense_calibration=calibration_of(self.dense, self.is_right[1], self.bootstrap),
        )

    def _recalls(self, names: Sequence[str]) -> list[Compared]:
        """The share of the samples of each label that is answered right, of the labels that occur."""
        found = []
        for index, name in enumerate(names):
            of_label = self.labels == index
            if of_label.any():
                sums = self.bootstrap.sums(np.stack([of_label, *(of_label & right for right in self.is_right)], axis=1))
                values = [ratio(hits, sums[:, 0]) for hits in sums.T[1:]]
                found.append(compared(name, int(of_label.sum()), values, is_share=True))
        return found

    def _flipped(self, names: Sequence[str], texts: Sequence[str] | None) -> list[FlippedSample]:
        """Samples that both answer differently: those that the dense model had right first, the surest ones first."""
        assert self.dense is not None
        now, before = self.pruned.argmax(axis=1), self.dense.argmax(axis=1)
        places = np.flatnonzero(now != before)
        sure = np.exp(self.pruned[places, now[places]])
        order = places[np.lexsort((places, -sure, ~self.is_right[1][places]))]
        return [
            FlippedSample(
                index=int(place),
                text=shortened(texts[place]) if texts is not None else None,
                label=names[self.labels[place]],
                dense=names[before[place]],
                pruned=names[now[place]],
                dense_confidence=float(np.exp(self.dense[place, before[place]])),
                pruned_confidence=float(np.exp(self.pruned[place, now[place]])),
            )
            for place in order[:MOST_FLIPPED]
        ]


def shortened(text: str) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text.split())
    return f"{line[: MOST_CHARACTERS - 1]}…" if len(line) > MOST_CHARACTERS else line
