"""What a model card says of what pruning changed: a summary of `explain/explanation.json`, and where the page is."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..saved.model import SavedModel
from .explanation import EXPLANATION_NAME, Compared, Explanation, load_explanation
from .explanation_words import (
    as_number,
    as_share,
    command_words,
    difference,
    figure,
    is_of_language,
    main_metric,
    slice_name,
    summary,
    worse_slices,
    worst_first,
)
from .markdown import code, fence, inline

logger = logging.getLogger(__name__)

PAGE_NAME = "explain/index.html"

MARKDOWN_NAME = "explain/explanation.md"

_SLICES_NAME, _TAKEN_NAME, _CALIBRATION_NAME = "explain/slices.png", "explain/taken.png", "explain/calibration.png"

# The files that `hf-prune explain` writes beside a model.
EXPLAIN_NAMES = frozenset({EXPLANATION_NAME, PAGE_NAME, MARKDOWN_NAME, _SLICES_NAME, _TAKEN_NAME, _CALIBRATION_NAME})

# The most slices in the table of a card.
_MOST_SLICES = 3


@dataclass(frozen=True)
class Explained:
    """An explanation of the weights that a folder has, and which of `EXPLAIN_NAMES` are there."""

    explanation: Explanation
    names: frozenset[str]


def explained_in(saved: SavedModel) -> Explained | None:
    """The explanation in a saved model's folder; None if there is none, or if it explains other weights.

    Raises RecordError if it cannot be read.
    """
    explanation = load_explanation(saved.folder)
    if explanation is None or explanation.files != saved.hashes:
        return None
    return Explained(explanation, frozenset(name for name in EXPLAIN_NAMES if Path(saved.folder, name).is_file()))


def warn_if_stale(saved: SavedModel) -> None:
    """Log that an explanation in the folder is of other weights, so that the card and a push leave it out."""
    explanation = load_explanation(saved.folder)
    if explanation is not None and explanation.files != saved.hashes:
        logger.warning(
            "%s explains other weights than those in %s now: the card and a push leave it out. Measure again, in that "
            "folder: %s",
            EXPLANATION_NAME,
            saved.folder,
            explanation.command,
        )


def shown_texts(explained: Explained | None) -> int:
    """Of how many samples the explanation shows the texts."""
    return sum(one.text is not None for one in explained.explanation.answers.flipped) if explained is not None else 0


@dataclass(frozen=True)
class Section:
    """The section of a card: sentences, rows, a picture, a link, the command and words before it.

    Rows are (name, dense, pruned, difference).
    """

    sentences: list[str]
    rows: list[tuple[str, str, str, str]]
    has_dense: bool
    picture: str | None
    picture_alt: str
    more: str
    command_words: str
    command: str


def explained_section(explained: Explained | None) -> Section | None:
    """What the card says of an explanation; None without one. No texts of samples are in it."""
    if explained is None:
        return None
    explanation, names = explained.explanation, explained.names
    picture, alt = _picture(explanation, names)
    return Section(
        sentences=[inline(sentence) for sentence in summary(explanation)],
        rows=_rows(explanation),
        has_dense=explanation.dense_model is not None,
        picture=picture,
        picture_alt=inline(alt),
        more=_more(explanation, names),
        command_words=inline(command_words(explanation)),
        command=fence(" ".join(explanation.command.split()), "bash"),
    )


def _rows(explanation: Explanation) -> list[tuple[str, str, str, str]]:
    answers = explanation.answers
    rows = []
    metric = main_metric(explanation)
    if metric is not None:
        rows.append(_row(code(metric.name), metric))
    what = "next tokens" if is_of_language(explanation) else "answers"
    shares = {
        f"{what} that are the same as the dense model's": answers.agreement,
        f"{what} changed from right to wrong": answers.to_wrong,
        f"{what} changed from wrong to right": answers.to_right,
        f"{what} changed from one wrong answer to another": answers.other
        if answers.other and answers.other.value
        else None,
    }
    rows += [(name, "", as_share(share), "") for name, share in shares.items() if share is not None]
    if answers.divergence is not None:
        rows.append((r"KL(dense \|\| pruned), nats", "", as_number(answers.divergence), ""))
    if answers.calibration is not None:
        dense = as_share(answers.dense_calibration.error) if answers.dense_calibration is not None else ""
        rows.append(("expected calibration error", dense, as_share(answers.calibration.error), ""))
    shown = worse_slices(explanation) or worst_first(explanation)
    for one in shown[:_MOST_SLICES]:
        name = f"{code(explanation.metric)}, {inline(slice_name(one))}{' (worse)' if one.is_worse else ''}"
        rows.append(_row(name, one.metric))
    return rows


def _row(name: str, metric: Compared) -> tuple[str, str, str, str]:
    return name, figure(metric.name, metric.dense), figure(metric.name, metric.pruned), difference(metric)


def _picture(explanation: Explanation, names: Collection[str]) -> tuple[str | None, str]:
    """The picture that the card shows, if it is in the folder, and what is in it."""
    if _SLICES_NAME in names and explanation.slices:
        return _SLICES_NAME, f"{explanation.metric} of each of {len(explanation.slices)} slices, with 95% intervals"
    if _TAKEN_NAME in names:
        return _TAKEN_NAME, "Heat map of what was taken, by layer and matrix"
    return None, ""


def _more(explanation: Explanation, names: Collection[str]) -> str:
    """How many samples it was measured on, and where the rest is."""
    unit = "texts" if is_of_language(explanation) else "samples"
    told = f"Measured on {explanation.samples:,} {unit} of {inline(explanation.data.name)}"
    told += "; 95% intervals are in brackets." if explanation.resamples else "."
    if PAGE_NAME in names:
        told += f" All figures and pictures are in [`{PAGE_NAME}`]({PAGE_NAME}), which opens without a network"
        told += f", and in [`{MARKDOWN_NAME}`]({MARKDOWN_NAME})." if MARKDOWN_NAME in names else "."
    return told
