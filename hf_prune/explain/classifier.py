"""The parts of an explanation that are of a classifier's answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..publish.explanation import Gap, Perturbed
from .answers import MOST_FLIPPED, Asked, ask
from .language import count_tokens
from .perturbations import PERTURBATIONS, perturbed
from .resampling import MODELS, Bootstrap, compared, estimate, gap_between
from .samples import Reader, Samples, lengths_of
from .settings import Settings, labels_of
from .slices import Group, Measured, compare_slices, counted_in, groups_of_rarity, groups_of_samples, words_of_left_out


def explain_classifier(
    pruned: Reader, dense: Reader | None, samples: Samples, training: Samples | None, settings: Settings
) -> tuple[dict[str, Any], list[str]]:
    """The fields of `Explanation` that are of answers, and what could not be said."""
    assert samples.labels is not None  # checked where samples are read
    readers = [reader for reader in (pruned, dense) if reader is not None]
    names = labels_of(pruned.model)
    bootstrap = Bootstrap(len(samples), settings.resamples, settings.seed)
    found = [ask(reader, samples, settings.batch_size) for reader in readers]
    asked = Asked(samples.labels, found[0], found[1] if dense is not None else None, bootstrap)
    texts = samples.texts if settings.show_texts else None
    answers = asked.answers(names, texts)
    rows = pruned.rows(samples)
    counted = pruned.rows(training) if training is not None else rows
    groups = [
        *groups_of_samples(samples, lengths_of(rows), settings.expressions, pruned.max_length),
        *groups_of_rarity([row["input_ids"] for row in rows], count_tokens(counted)),
        *(Group("label", name, samples.labels == index) for index, name in enumerate(names)),
    ]
    slices, left_out = compare_slices("accuracy", _measured(groups, asked.is_right), bootstrap, is_share=True)
    notes = words_of_left_out(left_out)
    if answers.agreement is not None and round((1 - answers.agreement.value) * len(samples)) > MOST_FLIPPED:
        notes.append(f"Of the samples that both models answer differently, {MOST_FLIPPED} are listed.")
    fields = {
        "metric": "accuracy",
        "metrics": tuple(asked.metrics()),
        "answers": answers,
        "slices": tuple(slices),
        "tokens_counted_in": counted_in(training),
        "gaps": tuple(_gaps(readers, training, asked, settings)) if training is not None else (),
    }
    if settings.perturbations and samples.texts is not None and all(reader.tokenize is not None for reader in readers):
        fields["perturbations"] = tuple(_perturbations(readers, samples, asked, settings))
    elif settings.perturbations:
        notes.append("Answers to changed texts are not known, as the texts or their tokenizer are not.")
    return fields, notes


def _measured(groups: Sequence[Group], is_right: Sequence[np.ndarray]) -> list[Measured]:
    """The sums of right answers that slices are compared by."""
    return [
        Measured(
            group.by,
            group.value,
            of=group.inside.astype(float),
            pruned=(group.inside & is_right[0]).astype(float),
            dense=(group.inside & is_right[1]).astype(float) if len(is_right) > 1 else None,
        )
        for group in groups
    ]


def _gaps(readers: Sequence[Reader], training: Samples, asked: Asked, settings: Settings) -> list[Gap]:
    """The accuracy on training samples and on the samples, of each model."""
    few = training.chosen(settings.training_samples, settings.seed)
    assert few.labels is not None
    other = Bootstrap(len(few), settings.resamples, settings.seed + 1)
    found = []
    for name, reader, is_right in zip(MODELS, readers, asked.is_right, strict=False):
        seen = ask(reader, few, settings.batch_size).argmax(axis=1) == few.labels
        of_training = other.sums(seen[:, None])[:, 0] / len(few)
        of_test = asked.bootstrap.sums(is_right[:, None])[:, 0] / asked.bootstrap.samples
        found.append(gap_between(name, of_training, of_test, len(few), asked.bootstrap.samples))
    return found[::-1]


def _perturbations(readers: Sequence[Reader], samples: Samples, asked: Asked, settings: Settings) -> list[Perturbed]:
    """Accuracy where each text is changed, and how often the pruned model's answer stays what it was."""
    assert samples.texts is not None
    found, number = [], len(samples)
    before = asked.pruned.argmax(axis=1)
    for one in PERTURBATIONS:
        changed = Samples(texts=perturbed(samples.texts, one, settings.seed))
        answers = [ask(reader, changed, settings.batch_size).argmax(axis=1) for reader in readers]
        columns = [before == answers[0], *(given == samples.labels for given in answers)]
        same, *right = asked.bootstrap.sums(np.stack(columns, axis=1)).T / number
        found.append(
            Perturbed(
                name=one.name,
                words=f"{one.words} (seed {settings.seed})" if one.is_random else one.words,
                metric=compared("accuracy", number, right, is_share=True),
                agreement=estimate(same, number),
            )
        )
    return found
