"""The tasks of recipes: for each, how texts become examples, which Trainer trains, and which metrics are computed."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import datasets
import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Trainer,
    default_data_collator,
)

from ..errors import RecipeError, first_line, nearest
from ..trainer.trainer import PruningMixin, PruningTrainer
from .data import check_labels, check_texts, number_labels
from .metrics import METRICS, load_metric
from .schema import Recipe

# Metrics by name, for the whole test split under "", and for groups of its rows under theirs.
Scores = dict[str, dict[str, float]]

ComputeMetrics = Callable[[EvalPrediction], dict[str, float]]

_LARGEST_EXPONENT = 709.0  # beyond it, exp overflows

# What the Trainer adds to the metrics of an evaluation.
_SPEED = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class PruningSeq2SeqTrainer(PruningMixin, Seq2SeqTrainer):
    """A `Seq2SeqTrainer` that prunes."""


class TextClassification:
    """One label for each text; metrics compare labels."""

    auto_class: Any = AutoModelForSequenceClassification
    trainers: tuple[type[Trainer], type[Trainer]] = (Trainer, PruningTrainer)

    def __init__(self, recipe: Recipe):
        self.section = recipe.dataset
        self.metrics = [_load_metric(name) for name in recipe.metrics]
        self.labels: list[str] = []
        self._groups: list[str] = []

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the recipe's fields."""
        section = self.section
        group = {"group_by": section.group_by} if section.group_by is not None else {}
        return {"text_column": section.text_column, "label_column": section.label_column, **group}

    def read(self, data: datasets.DatasetDict) -> datasets.DatasetDict:
        """The checked rows with `labels` from 0; remembers the labels' names and the groups of the test split."""
        check_texts(data, "text_column", self.section.text_column)
        check_labels(data, self.section)
        data, self.labels = number_labels(data, self.section)
        if self.section.group_by is not None:
            self._groups = [str(value) for value in data["test"][self.section.group_by]]
            data = data.remove_columns(self.section.group_by)
        return data

    def texts(self, data: datasets.DatasetDict) -> list[str]:
        """All texts of the training split, of the rows that `read` gives."""
        return list(data["train"][self.section.text_column])

    def model_options(self) -> dict[str, Any]:
        """The options of `from_pretrained` for a new head."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: index for index, label in enumerate(self.labels)},
        }

    def tokenize(
        self, data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> datasets.DatasetDict:
        """Texts truncated to `max_length` tokens."""
        column, length = self.section.text_column, self.section.max_length

        def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
            return dict(tokenizer(rows[column], truncation=True, max_length=length))

        return data.map(tokenize, batched=True, remove_columns=[column], desc="Tokenizing")

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
        """The collator, which pads a batch of examples."""
        return DataCollatorWithPadding(tokenizer)

    def compute_metrics(self, tokenizer: PreTrainedTokenizerBase) -> ComputeMetrics | None:
        """The metrics that the Trainer computes from its predictions."""

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            return self._compute(_guesses(prediction.predictions), prediction.label_ids)

        return compute

    def _compute(self, guesses: Any, labels: Any) -> dict[str, float]:
        values: dict[str, float] = {}
        for metric in self.metrics:
            values.update(metric.compute(predictions=guesses, references=labels))
        return values

    def evaluate(self, trainer: Trainer, data: datasets.Dataset, part: str = "test") -> Scores:
        """The metrics on a split, and on each group of the rows of the test split."""
        output = trainer.predict(data, metric_key_prefix=part)
        scores = {"": _unprefixed(output.metrics or {}, part)}
        if part != "test":
            return scores
        groups, guesses = np.array(self._groups), _guesses(output.predictions)
        for group in dict.fromkeys(self._groups):
            rows = groups == group
            scores[group] = self._compute(guesses[rows], np.asarray(output.label_ids)[rows])
        return scores

    @property
    def group_sizes(self) -> dict[str, int]:
        """The number of rows of the test split in each group."""
        return dict(Counter(self._groups))

    def samples(self, data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Texts to generate from: none."""
        return []


class TextGeneration:
    """Texts packed into blocks of one length for a causal language model; the metric is perplexity.

    Texts are concatenated, each with an end-of-text token, and cut into blocks of `max_length` tokens; the rest at the
    end of each split is dropped. Perplexity is `exp` of the mean loss of a token.
    """

    auto_class: Any = AutoModelForCausalLM
    trainers: tuple[type[Trainer], type[Trainer]] = (Trainer, PruningTrainer)

    def __init__(self, recipe: Recipe):
        self.section, self.generation = recipe.dataset, recipe.generation
        _refuse_groups(recipe)

    group_sizes: Mapping[str, int] = MappingProxyType({})

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the recipe's fields."""
        return {"text_column": self.section.text_column}

    def read(self, data: datasets.DatasetDict) -> datasets.DatasetDict:
        """The checked rows."""
        check_texts(data, "text_column", self.section.text_column)
        return data

    def texts(self, data: datasets.DatasetDict) -> list[str]:
        """All texts of the training split, of the rows that `read` gives."""
        return list(data["train"][self.section.text_column])

    def model_options(self) -> dict[str, Any]:
        """Nothing: the head is that of the language model."""
        return {}

    def tokenize(
        self, data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> datasets.DatasetDict:
        """Blocks of tokens, which are their own labels. Raises RecipeError if a split gives no block."""
        column, length = self.section.text_column, self.section.max_length
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

        def pack(rows: dict[str, list[str]]) -> dict[str, Any]:
            tokens = [token for ids in tokenizer(rows[column], verbose=False)["input_ids"] for token in (*ids, *end)]
            blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
            return {"input_ids": blocks, "labels": blocks}

        packed = data.map(pack, batched=True, batch_size=None, remove_columns=[column], desc="Packing")
        for part, blocks in packed.items():
            if not len(blocks):
                raise RecipeError(
                    "dataset.max_length", f"the {part} split has too few tokens for one block of {length}; set it lower"
                )
        return packed

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
        """The collator, which stacks blocks into a batch."""
        return default_data_collator

    def compute_metrics(self, tokenizer: PreTrainedTokenizerBase) -> ComputeMetrics | None:
        """None: only the loss is needed, and the logits would not fit into memory."""
        return None

    def evaluate(self, trainer: Trainer, data: datasets.Dataset, part: str = "test") -> Scores:
        """Perplexity and loss on a split."""
        loss = trainer.evaluate(data, metric_key_prefix=part)[f"{part}_loss"]
        perplexity = math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf  # of a training that has diverged
        return {"": {"perplexity": perplexity, "loss": loss}}

    def samples(self, data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The recipe's prompts."""
        return list(self.generation.prompts)


class Summarization:
    """A summary of each text by an encoder-decoder; metrics compare texts that are generated.

    Without a `summary_column`, a text's first sentence is to be told from the rest: the gap-sentence objective of
    PEGASUS, in its form Lead (arXiv 1912.08777, section 3.1).
    """

    auto_class: Any = AutoModelForSeq2SeqLM
    trainers: tuple[type[Trainer], type[Trainer]] = (Seq2SeqTrainer, PruningSeq2SeqTrainer)

    def __init__(self, recipe: Recipe):
        self.section, self.generation = recipe.dataset, recipe.generation
        self.metrics = [_load_metric(name) for name in recipe.metrics]
        self._texts: list[str] = []
        _refuse_groups(recipe)

    group_sizes: Mapping[str, int] = MappingProxyType({})

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are read, by the recipe's fields."""
        summary = self.section.summary_column
        return {"text_column": self.section.text_column, **({"summary_column": summary} if summary else {})}

    def read(self, data: datasets.DatasetDict) -> datasets.DatasetDict:
        """The checked rows with `text` and `summary`."""
        for field, column in self.columns.items():
            check_texts(data, field, column)
        text, summary = self.section.text_column, self.section.summary_column

        def split(row: dict[str, str]) -> dict[str, str]:
            if summary is not None:
                return {"document": row[text], "summary": row[summary]}
            first, rest = first_sentence(row[text])
            return {"document": rest, "summary": first}

        data = data.map(split, remove_columns=list(self.columns.values()), desc="Summaries")
        data = data.filter(lambda row: bool(row["document"] and row["summary"]), desc="Summaries")
        for part, rows in data.items():
            if not len(rows):
                raise RecipeError("dataset.text_column", f"expected texts of two or more sentences, {part} has none")
        self._texts = list(data["test"]["document"])
        return data

    def texts(self, data: datasets.DatasetDict) -> list[str]:
        """All texts of the training split, of the rows that `read` gives."""
        return [*data["train"]["document"], *data["train"]["summary"]]

    def model_options(self) -> dict[str, Any]:
        """Nothing: the head is that of the language model."""
        return {}

    def tokenize(
        self, data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
    ) -> datasets.DatasetDict:
        """Texts truncated to `max_length` tokens, and as labels summaries truncated to `max_summary_length`."""

        def tokenize(rows: dict[str, list[str]]) -> dict[str, Any]:
            inputs = dict(tokenizer(rows["document"], truncation=True, max_length=self.section.max_length))
            inputs.pop("token_type_ids", None)
            most = self.section.max_summary_length
            labels = tokenizer(text_target=rows["summary"], truncation=True, max_length=most)
            return inputs | {"labels": labels["input_ids"]}

        return data.map(tokenize, batched=True, remove_columns=["document", "summary"], desc="Tokenizing")

    def collator(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Any:
        """The collator, which pads a batch and has the model shift the labels right for its decoder."""
        return DataCollatorForSeq2Seq(tokenizer, model=model)

    def compute_metrics(self, tokenizer: PreTrainedTokenizerBase) -> ComputeMetrics | None:
        """The metrics of generated summaries."""

        def texts(ids: Any) -> list[str]:
            return tokenizer.batch_decode(np.where(ids >= 0, ids, tokenizer.pad_token_id), skip_special_tokens=True)

        def compute(prediction: EvalPrediction) -> dict[str, float]:
            guesses, labels = texts(prediction.predictions), texts(prediction.label_ids)
            values: dict[str, float] = {}
            for metric in self.metrics:
                values.update(metric.compute(predictions=guesses, references=labels))
            return values

        return compute

    def evaluate(self, trainer: Trainer, data: datasets.Dataset, part: str = "test") -> Scores:
        """The metrics on a split."""
        return {"": _unprefixed(trainer.predict(data, metric_key_prefix=part).metrics or {}, part)}

    def samples(self, data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The recipe's prompts, and the first texts of the test split."""
        texts = [*self.generation.prompts, *self._texts[: self.generation.samples]]
        ids = tokenizer(texts, truncation=True, max_length=self.section.max_length)["input_ids"] if texts else []
        return tokenizer.batch_decode(ids, skip_special_tokens=True)


Task = TextClassification | TextGeneration | Summarization

TASKS: dict[str, type[Task]] = {
    "text-classification": TextClassification,
    "text-generation": TextGeneration,
    "summarization": Summarization,
}


def _refuse_groups(recipe: Recipe) -> None:
    if recipe.dataset.group_by is not None:
        raise RecipeError("dataset.group_by", f"must not be set for {recipe.task}, got {recipe.dataset.group_by!r}")


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence of a text, and the rest, which may be empty. Line breaks become spaces."""
    plain = " ".join(re.sub(r"<br\s*/?>", " ", text).split())
    first, _, rest = re.sub(r"([.!?])\s+", r"\1\n", plain, count=1).partition("\n")
    return first, rest


# ---- Generated texts ----


@dataclass(frozen=True)
class Generated:
    """The texts that a model generated, and the number of new tokens per second."""

    texts: list[str]
    tokens_per_second: float


def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: Mapping[str, Any]
) -> Generated:
    """The texts that a model generates for each prompt, without the prompt. `options` are those of its `generate`.

    One token is generated beforehand to warm up, and is not timed.
    """
    texts, tokens, seconds = [], 0, 0.0
    was_training = model.training
    model.eval()
    for index, prompt in enumerate(prompts):
        inputs = {
            name: value.to(model.device)
            for name, value in tokenizer(prompt, return_tensors="pt").items()
            if name in ("input_ids", "attention_mask")
        }
        if index == 0:
            with torch.random.fork_rng():
                cast(Any, model).generate(**inputs, **{**options, "max_new_tokens": 1})
        start = time.perf_counter()
        written = cast(Any, model).generate(**inputs, **options)[0]
        seconds += time.perf_counter() - start
        if not model.config.is_encoder_decoder:
            written = written[inputs["input_ids"].shape[1] :]
        tokens += len(written)
        texts.append(str(tokenizer.decode(written, skip_special_tokens=True)))
    model.train(was_training)
    return Generated(texts, tokens / seconds)


# ---- Metrics ----


def _load_metric(name: str) -> Any:
    try:
        return load_metric(name)
    except (FileNotFoundError, ImportError, ValueError, OSError) as error:
        hint = nearest(name, METRICS)
        raise RecipeError("metrics", f"{name!r} cannot be loaded: {first_line(error)}{hint}") from error


def _guesses(predictions: Any) -> Any:
    """The most likely label of each row."""
    logits = predictions[0] if isinstance(predictions, tuple) else predictions  # encoder-decoders give hidden states
    return np.argmax(logits, axis=-1)


def _unprefixed(values: Mapping[str, float], part: str) -> dict[str, float]:
    """The metrics of a split without the prefix and without the Trainer's timings."""
    prefix = f"{part}_"
    names = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
    return {name: value for name, value in names.items() if name not in _SPEED}
