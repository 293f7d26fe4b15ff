"""The samples that models are asked about, and how each model gets them as inputs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..structure.batches import on_model

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Samples:
    """Samples of one data set.

    Attributes:
        texts: the texts; None where only inputs are known.
        rows: the inputs of each sample without padding (`input_ids`, and what else the model takes); None for texts,
            which each model's tokenizer makes inputs of.
        labels: the index of the label of each sample; None for language models.
        columns: what else is known of each sample, to compare slices by.
    """

    texts: Sequence[str] | None = None
    rows: Sequence[Row] | None = None
    labels: np.ndarray | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows if self.rows is not None else self.texts or ())

    def take(self, indices: Sequence[int]) -> "Samples":
        """The samples at these indices."""
        return Samples(
            texts=[self.texts[index] for index in indices] if self.texts is not None else None,
            rows=[self.rows[index] for index in indices] if self.rows is not None else None,
            labels=self.labels[list(indices)] if self.labels is not None else None,
            columns={name: [values[index] for index in indices] for name, values in self.columns.items()},
        )

    def chosen(self, most: int | None, seed: int) -> "Samples":
        """At most so many of the samples, drawn with the seed, in their order."""
        if most is None or most >= len(self):
            return self
        return self.take(sorted(np.random.default_rng(seed).choice(len(self), most, replace=False).tolist()))


@dataclass(frozen=True)
class Reader:
    """A model, and how samples become its inputs.

    Attributes:
        model: the model.
        collate: a padded batch of tensors, from the rows of several samples.
        tokenize: the rows of texts; None if there is no tokenizer.
        max_length: at how many tokens `tokenize` cuts texts; None if that is unknown.
    """

    model: PreTrainedModel
    collate: Callable[[list[Row]], Mapping[str, Any]]
    tokenize: Callable[[Sequence[str]], list[Row]] | None = None
    max_length: int | None = None

    def rows(self, samples: Samples) -> Sequence[Row]:
        """The inputs of samples."""
        if samples.rows is not None:
            return samples.rows
        assert self.tokenize is not None  # samples without rows have texts, and come with a tokenizer
        assert samples.texts is not None
        return self.tokenize(samples.texts)

    def inputs(self, rows: Sequence[Row], indices: Sequence[int]) -> dict[str, Any]:
        """A batch of these rows on the model's device, without labels."""
        return on_model(self.collate([dict(rows[index]) for index in indices]), self.model)


def lengths_of(rows: Sequence[Row]) -> np.ndarray:
    """The number of tokens of each row (int64)."""
    return np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)


def batches_of(lengths: np.ndarray, batch_size: int) -> Iterator[list[int]]:
    """The indices of all samples in batches of about the same length, so that little is padded."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size].tolist()


@contextlib.contextmanager
def asked(*models: nn.Module | None) -> Iterator[None]:
    """Models in eval mode without gradients, and afterwards in the mode that each of their modules had."""
    modes = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        for model in models:
            if model is not None:
                model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
