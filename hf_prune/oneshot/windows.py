"""Calibration data: texts as windows of tokens or padded batches, and what else a user may give."""

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config.calibration import CalibrationConfig
from ..errors import CalibrationError
from ..foreign.transformers import TASK_MAPPING

Batch = dict[str, Any]


class WindowReader:
    """Windows of tokens, cut from texts that are shuffled and joined by the tokenizer's end-of-text token.

    Args:
        texts: the texts.
        tokenizer: one with an `eos_token`, or the texts are joined by nothing.
        length: the length of a window in tokens.
        seed: the seed of the shuffle.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, seed: int):
        self._texts, self._tokenizer, self.length = texts, tokenizer, length
        order = list(range(len(texts)))
        random.Random(seed).shuffle(order)
        self._order: Iterator[int] = iter(order)
        self.texts_used = 0

    def take(self, count: int) -> torch.Tensor:
        """The next windows (count, length), int64, of texts that no window before had a token of.

        Raises CalibrationError if the texts that are left have too few tokens.
        """
        end = self._tokenizer.eos_token_id
        wanted, tokens = count * self.length, list[int]()
        for index in self._order:
            found = self._tokenizer(self._texts[index], add_special_tokens=False)["input_ids"]
            tokens += [*found, *([end] if end is not None else [])]
            self.texts_used += 1
            if len(tokens) >= wanted:
                return torch.tensor(tokens[:wanted]).view(count, self.length)
        raise CalibrationError(
            "samples",
            f"expected {wanted:,} tokens of text for {count} windows of {self.length} tokens, found {len(tokens):,}; "
            "use fewer or shorter windows, or more text",
        )


def text_batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: CalibrationConfig, labels: bool
) -> list[Batch]:
    """Texts of a model that is no causal language model: chosen with the seed, truncated, and padded batch by batch.

    With `labels`, the same texts are what an encoder-decoder is to answer. Raises CalibrationError if there are fewer
    texts than samples.
    """
    if len(texts) < config.samples:
        raise CalibrationError("samples", f"expected {config.samples} texts or more, found {len(texts)}")
    chosen = random.Random(config.seed).sample(range(len(texts)), config.samples)
    batches = []
    for start in range(0, config.samples, config.batch_size):
        some = [texts[index] for index in chosen[start : start + config.batch_size]]
        batch = dict(tokenizer(some, truncation=True, max_length=config.length, padding=True, return_tensors="pt"))
        if labels:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batches.append(batch)
    return batches


def sample_batches(
    samples: Any, collator: Callable[[list[Any]], Mapping[str, Any]], config: CalibrationConfig
) -> list[Batch]:
    """Some of the samples of a data set, chosen with the seed, as batches that a Trainer's collator makes.

    Raises CalibrationError if there are fewer than are asked for.
    """
    if len(samples) < config.samples:
        raise CalibrationError("samples", f"expected {config.samples} samples or more, found {len(samples)}")
    chosen = random.Random(config.seed).sample(range(len(samples)), config.samples)
    starts = range(0, config.samples, config.batch_size)
    return [dict(collator([samples[index] for index in chosen[start : start + config.batch_size]])) for start in starts]


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a model predicts the next token of its own input."""
    config = model.config
    return (
        not getattr(config, "is_encoder_decoder", False)
        and type(model).__name__ in TASK_MAPPING["text-generation"].values()
    )


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise CalibrationError for windows that are longer than the positions of a model."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise CalibrationError("length", f"expected at most the {positions:,} positions of the model, got {length:,}")


def as_batches(
    data: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, config: CalibrationConfig
) -> list[Batch]:
    """Calibration data as batches of inputs, see `prune`. Raises CalibrationError for what is none."""
    if isinstance(data, torch.Tensor):
        if data.dim() != 2 or data.is_floating_point() or not len(data):
            raise CalibrationError(
                "data", f"expected token ids of shape (samples, length), got {data.dtype} of {tuple(data.shape)}"
            )
        check_length(model, data.shape[1])
        return [{"input_ids": rows} for rows in data.long().split(config.batch_size)]
    if isinstance(data, (str, Mapping)) or not isinstance(data, Iterable):
        raise CalibrationError("data", f"expected texts, token ids or batches of inputs, got {type(data).__name__}")
    items = list(data)
    if not items:
        raise CalibrationError("data", "expected texts, token ids or batches of inputs, got none")
    if all(isinstance(item, str) for item in items):
        if tokenizer is None:
            raise CalibrationError("tokenizer", "expected the model's tokenizer, as the data are texts, got None")
        if is_causal(model):
            check_length(model, config.length)
            windows = WindowReader(items, tokenizer, config.length, config.seed).take(config.samples)
            return as_batches(windows, model, None, config)
        return text_batches(items, tokenizer, config, bool(getattr(model.config, "is_encoder_decoder", False)))
    if not all(isinstance(item, Mapping) for item in items):
        raise CalibrationError("data", f"expected texts or batches of inputs, got {type(items[0]).__name__}")
    return [dict(item) for item in items]


def digest_of(batches: Sequence[Batch]) -> str:
    """A digest of the tensors in batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            if torch.is_tensor(value):
                digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
                digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
