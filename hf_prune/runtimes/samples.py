"""What an exported model is tried with: texts of a data set, or tokens drawn from the vocabulary."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ExportError
from ..structure.proof import sample_inputs

# Samples of a batch; latency is measured with one sample, and with so many.
BATCH = 8


@dataclass(frozen=True)
class Samples:
    """Batches of samples by the names of the model's inputs, the classes that they have, and where they are from.

    `labels` are the numbers of the classes, one tensor for each batch; None if they are unknown.
    """

    batches: list[dict[str, torch.Tensor]]
    words: str
    labels: list[torch.Tensor] | None = None

    @property
    def number(self) -> int:
        """How many samples there are."""
        return sum(len(next(iter(batch.values()))) for batch in self.batches)

    @property
    def timed(self) -> list[dict[str, torch.Tensor]]:
        """What latency is measured with: the first sample, and the first batch if it has more."""
        first = self.batches[0]
        one = {name: value[:1] for name, value in first.items()}
        return [one, first] if len(next(iter(first.values()))) > 1 else [one]


def samples_of_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[Any] | None,
    length: int,
    words: str,
) -> Samples:
    """Texts as tokens, at most `length` of each, in batches of 8.

    For a language model without an encoder, texts are joined and cut into pieces of that length, so that none is
    padded. Labels are those of classes: models that generate text have none. Raises ExportError for too little text,
    and for labels that the model does not have.
    """
    length = min(length, _most_tokens(model))
    if model.can_generate() and not is_encoder_decoder(model):
        words = f"{len(texts)} {words}, joined and cut into pieces of {length} tokens"
        return Samples(_in_batches(_pieces(tokenizer, texts, length)), words)
    batches = [
        {
            name: value
            for name, value in tokenizer(
                list(texts[start : start + BATCH]),
                truncation=True,
                max_length=length,
                padding=True,
                return_tensors="pt",
            ).items()
            if isinstance(value, torch.Tensor)
        }
        for start in range(0, len(texts), BATCH)
    ]
    if not batches:
        raise ExportError("--data", "expected texts, got none")
    numbers = None if labels is None or model.can_generate() else _numbered(model, labels).split(BATCH)
    return Samples(batches, words, None if numbers is None else list(numbers))


def _pieces(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> torch.Tensor:
    tokens = [token for ids in tokenizer(list(texts), verbose=False)["input_ids"] for token in ids]
    pieces = len(tokens) // length
    if not pieces:
        raise ExportError("--data", f"expected texts of {length} tokens or more, got {len(tokens)} tokens in all")
    return torch.tensor(tokens[: pieces * length]).view(pieces, length)


def _in_batches(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)]


def _numbered(model: PreTrainedModel, labels: Sequence[Any]) -> torch.Tensor:
    """The numbers of classes: as they are, or by their names in the model's configuration."""
    by_name = {str(name): number for name, number in (model.config.label2id or {}).items()}
    known = set(by_name.values())
    numbers = [label if label in known else by_name.get(str(label)) for label in labels]
    unknown = next((label for label, number in zip(labels, numbers, strict=True) if number is None), None)
    if unknown is not None:
        raise ExportError("--label-column", f"expected the labels {', '.join(by_name)}, got {unknown!r}")
    return torch.tensor(numbers)


def drawn_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, length: int) -> Samples:
    """Two batches of tokens drawn from the vocabulary; without a tokenizer, a batch of random inputs.

    Raises ExportError for a model for which no inputs can be made.
    """
    if tokenizer is None:
        inputs = sample_inputs(model)
        if inputs is None:
            raise ExportError(f"{type(model).__name__}: no inputs are known to try it with")
        batch = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        return Samples([batch], "random inputs")
    length = min(length, _most_tokens(model))
    special = set(tokenizer.all_special_ids)
    embeddings: Any = model.get_input_embeddings()
    most = min(len(tokenizer), embeddings.num_embeddings)
    tokens = torch.tensor([token for token in range(most) if token not in special])
    drawn = torch.randint(len(tokens), (2 * BATCH, length), generator=torch.Generator().manual_seed(0))
    return Samples(_in_batches(tokens[drawn]), f"{length} tokens drawn from the vocabulary")


def _most_tokens(model: PreTrainedModel) -> int:
    """How long an input can be, less what is generated after it."""
    most = getattr(model.config, "max_position_embeddings", None)
    is_continued = model.can_generate() and not is_encoder_decoder(model)
    return max(most // 2 if is_continued else most - 2, 1) if isinstance(most, int) and most > 2 else 1 << 20


def inputs_for(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of a batch that the model's forward pass takes.

    Those of an encoder-decoder are what its encoder takes, and `decoder_input_ids`, the token that outputs start with.
    """
    if is_encoder_decoder(model):
        encoder: Any = model.get_encoder()
        taken = inspect.signature(type(encoder).forward).parameters
        start = torch.full((len(next(iter(batch.values()))), 1), start_token(model))
        read = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
        return {name: value for name, value in read.items() if name in taken} | {"decoder_input_ids": start}
    taken = inspect.signature(type(model).forward).parameters
    return {name: value for name, value in batch.items() if name in taken}


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether a model generates text from what its encoder has read."""
    return bool(model.config.is_encoder_decoder and model.can_generate())


def start_token(model: PreTrainedModel) -> int:
    """The token that outputs of an encoder-decoder start with. Raises ExportError if none is configured."""
    names = ("decoder_start_token_id", "bos_token_id")
    found = [getattr(one, name, None) for name in names for one in (model.generation_config, model.config)]
    token = next((one for one in found if isinstance(one, int)), None)
    if token is None:
        raise ExportError(
            f"{type(model).__name__}: expected decoder_start_token_id in config.json or generation_config.json, the "
            "token that outputs start with; found none"
        )
    return token
