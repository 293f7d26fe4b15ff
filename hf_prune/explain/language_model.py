"""The parts of an explanation that are of what a language model says of texts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import ExplainError
from ..publish.explanation import Gap
from .language import AskedTokens, Tokens, ask_tokens, count_tokens
from .resampling import MODELS, Bootstrap, gap_between
from .samples import Reader, Row, Samples, lengths_of
from .settings import Settings
from .slices import compare_slices, counted_in, groups_of_samples, words_of_left_out


def explain_language_model(
    pruned: Reader, dense: Reader | None, samples: Samples, training: Samples | None, settings: Settings
) -> tuple[dict[str, Any], list[str]]:
    """The fields of `Explanation` that are of losses, and what could not be said."""
    notes: list[str] = []
    rows = pruned.rows(samples)
    tokens = _ask(pruned, dense, samples, settings)
    bootstrap = Bootstrap(len(samples), settings.resamples, settings.seed)
    asked = AskedTokens(tokens, len(samples), bootstrap)
    if dense is not None and tokens.agrees is None:
        notes.append("Agreement of tokens and KL are not known: the models have different vocabularies.")
    counted = pruned.rows(training) if training is not None else rows
    measured = asked.measured(
        groups_of_samples(samples, lengths_of(rows), settings.expressions, pruned.max_length),
        asked.groups(count_tokens(counted)),
    )
    slices, left_out = compare_slices("loss", measured, bootstrap, is_share=False)
    notes += words_of_left_out(left_out)
    return {
        "metric": "loss",
        "metrics": tuple(asked.metrics()),
        "answers": asked.answers(),
        "slices": tuple(slices),
        "tokens_counted_in": counted_in(training),
        "gaps": tuple(_gaps(pruned, dense, training, asked, settings)) if training is not None else (),
    }, notes


def _ask(pruned: Reader, dense: Reader | None, samples: Samples, settings: Settings) -> Tokens:
    """Ask both models; where their vocabularies differ, each about its own tokens, which must be as many."""
    rows = pruned.rows(samples)
    if dense is None or _are_alike(pruned, dense, rows, samples):
        return ask_tokens(pruned, dense, rows, settings.batch_size)
    own = ask_tokens(pruned, None, rows, settings.batch_size)
    other = ask_tokens(dense, None, dense.rows(samples), settings.batch_size)
    if len(own.text) != len(other.text) or (own.text != other.text).any():
        raise ExplainError(
            "dense", "expected a tokenizer that divides texts into as many tokens as that of the pruned model"
        )
    return replace(own, dense=other.pruned)


def _are_alike(pruned: Reader, dense: Reader, rows: Sequence[Row], samples: Samples) -> bool:
    """Whether both models have the same tokens: as many, and the same ones in the texts."""
    own, other = (reader.model.config.get_text_config().vocab_size for reader in (pruned, dense))
    others = dense.rows(samples)
    return own == other and all(
        list(row["input_ids"]) == list(one["input_ids"]) for row, one in zip(rows, others, strict=True)
    )


def _gaps(pruned: Reader, dense: Reader | None, training: Samples, asked: AskedTokens, settings: Settings) -> list[Gap]:
    """The loss on training texts and on the texts, of each model."""
    few = training.chosen(settings.training_samples, settings.seed)
    seen = AskedTokens(
        _ask(pruned, dense, few, settings), len(few), Bootstrap(len(few), settings.resamples, settings.seed + 1)
    )
    found = [
        gap_between(name, of_training, of_test, len(few))
        for name, of_training, of_test in zip(MODELS, seen.losses(), asked.losses(), strict=False)
    ]
    return found[::-1]
