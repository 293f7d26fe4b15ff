"""`ExplainingMixin`: `trainer.explain()`, what pruning took from a Trainer's model and what it changed.

explain        the model as it is now, on the Trainer's evaluation data; written only where a folder is given
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distillation.teachers import find_teacher
from ..errors import ExplainError, TeacherError
from ..explain.explain import explain
from ..explain.samples import Reader, Row, Samples
from ..explain.settings import Known, Settings, check_model
from ..explain.writing import write_explanation
from ..foreign.transformers import evaluation_collator
from ..model.names import plain_model
from ..publish.explanation import Explanation
from ..publish.record import Source
from ..publish.sources import describe_dataset
from ..saved.model import SavedModel
from ..saved.removed import Removed, removed_in
from ..structure.record import STRUCTURE_NAME
from .base import TrainerBase
from .reporting import report_explanation

_LABELS = ("labels", "label", "label_ids")


class ExplainingMixin(TrainerBase):
    """Explains a Trainer's model beside a dense one."""

    def explain(
        self,
        dense_model: nn.Module | str | os.PathLike | None = None,
        eval_dataset: Any = None,
        *,
        train_dataset: Any = None,
        slices: Mapping[str, Sequence[Any]] | None = None,
        settings: Settings | None = None,
        output_dir: str | os.PathLike | None = None,
    ) -> Explanation:
        """What pruning took from the model as it is now, and what it changed in its answers on evaluation data.

        The data are tokenized, with labels for classifiers. Texts are decoded from their tokens, where the trainer has
        a tokenizer.

        Headline figures are also sent where the trainer reports to, as `eval/explain_agreement`.

        Args:
            dense_model: the model to compare with, or the path or Hub name of one; the default is the teacher.
            eval_dataset: the default is the trainer's.
            train_dataset: for the gap between training and test; the default is the trainer's.
            slices: name -> a value for each sample of the evaluation data; slices of equal values are compared.
            settings: how it is measured.
            output_dir: the folder to save the model and the explanation in; without one, nothing is written.

        Raises:
            ExplainError: the model or the data cannot be explained, `output_dir` is a file, or several processes train
                together.
        """
        if self.args.world_size > 1 or self.args.n_gpu > 1:
            raise ExplainError(
                "trainer.explain",
                f"expected one process and one device, got {max(self.args.world_size, self.args.n_gpu)}; save the "
                "model, and explain it with hf-prune explain",
            )
        if output_dir is not None:
            path = Path(output_dir).absolute()
            in_the_way = next(one for one in (path, *path.parents) if one.exists())
            if not in_the_way.is_dir():
                raise ExplainError(
                    "output_dir", f"expected a folder to write into, found a file at {str(in_the_way)!r}"
                )
        settings = settings or Settings()
        model = plain_model(self.accelerator.unwrap_model(self.model))
        if not isinstance(model, PreTrainedModel) or model is not self.accelerator.unwrap_model(self.model):
            raise ExplainError("model", "expected a model of transformers without adapters; merge them first")
        of_classes = check_model(model) == "text-classification"
        dense = self._dense_to_explain(dense_model)
        tokenizer = self.processing_class if isinstance(self.processing_class, PreTrainedTokenizerBase) else None
        data = self._data_to_explain("eval_dataset", eval_dataset if eval_dataset is not None else self.eval_dataset)
        samples = _samples(data, tokenizer, of_classes, slices or {})
        training = None
        seen = train_dataset if train_dataset is not None else self.train_dataset
        if hasattr(seen, "__getitem__") and hasattr(seen, "__len__") and settings.training_samples:
            few = Samples(rows=cast(Any, range(len(cast(Any, seen))))).chosen(settings.training_samples, settings.seed)
            training = _samples([cast(Any, seen)[index] for index in few.rows or ()], tokenizer, of_classes, {})
        readers = [
            Reader(one, cast(Any, evaluation_collator(self)), _tokenizing(tokenizer, samples))
            for one in (model, dense)
            if one is not None
        ]
        if output_dir is not None:
            self.save_model(str(output_dir))
        saved = SavedModel(output_dir) if output_dir is not None else None
        known = Known(
            model=Path(str(output_dir or self.args.output_dir)).resolve().name,
            dense_model=_name_of(dense_model, self.teacher_name) if dense is not None else None,
            data=describe_dataset(data) or Source(name="the trainer's evaluation data"),
            command="trainer.explain()",
            files=saved.hashes if saved is not None else {},
            file_bytes=saved.file_bytes if saved is not None else None,
            removed=saved.removed if saved is not None else self._removed_in_memory(model),
            notes=() if saved is not None else ("The model was not saved: bytes are those of its weights in memory.",),
        )
        found = explain(
            readers[0],
            samples,
            known,
            dense=readers[1] if len(readers) > 1 else None,
            training=training,
            settings=settings,
        )
        if output_dir is not None:
            write_explanation(output_dir, found)
        report_explanation(self, found, "eval")
        return found

    def _removed_in_memory(self, model: PreTrainedModel) -> Removed | None:
        """What the pruner has cut out of the model, or read that had been cut out of it."""
        content = self.pruner.removed if self.pruner is not None else None
        return removed_in(content, model.config, Path(STRUCTURE_NAME)) if content is not None else None

    def _dense_to_explain(self, given: nn.Module | str | os.PathLike | None) -> PreTrainedModel | None:
        """The dense model, where it is: the given one, or the teacher."""
        dense = given if isinstance(given, nn.Module) else self.teacher
        if given is not None and not isinstance(given, nn.Module):
            try:
                dense = cast(Any, find_teacher(given, cast(nn.Module, self.model))).to(self.args.device)
            except TeacherError as error:
                raise TeacherError(problems=[("dense_model", text) for _, text in error.problems]) from error
        if dense is None:
            return None
        if not isinstance(dense, PreTrainedModel):
            raise ExplainError("dense_model", f"expected a model of transformers, got {type(dense).__name__}")
        return dense

    def _data_to_explain(self, name: str, data: Any) -> Any:
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__") or isinstance(data, Mapping):
            raise ExplainError(name, f"expected one data set with a length, got {type(data).__name__}")
        return data


def _samples(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, of_classes: bool, slices: Mapping[str, Sequence[Any]]
) -> Samples:
    """The samples of a tokenized data set. Raises ExplainError where tokens, labels or values of slices are missing."""
    rows: list[Row] = [{name: _plain(value) for name, value in data[index].items()} for index in range(len(data))]
    if not rows or any("input_ids" not in row for row in rows):
        raise ExplainError("eval_dataset", "expected tokenized samples with input_ids")
    label = next((name for name in _LABELS if name in rows[0]), None)
    if of_classes and label is None:
        raise ExplainError("eval_dataset", f"expected samples with labels, got {', '.join(rows[0])}")
    wrong = next((name for name, values in slices.items() if len(values) != len(rows)), None)
    if wrong is not None:
        raise ExplainError("slices", f"expected {len(rows)} values for {wrong!r}, got {len(slices[wrong])}")
    texts = None
    if tokenizer is not None:
        texts = tokenizer.batch_decode([row["input_ids"] for row in rows], skip_special_tokens=True)
    labels = np.array([int(row[str(label)]) for row in rows]) if of_classes else None
    return Samples(texts=texts, rows=rows, labels=labels, columns=dict(slices))


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _tokenizing(tokenizer: PreTrainedTokenizerBase | None, samples: Samples) -> Any:
    """What makes rows of texts that were changed: the tokenizer, with the length of the longest sample.

    All are padded to it, for collators that do not pad.
    """
    if tokenizer is None or tokenizer.pad_token is None:
        return None
    longest = max(len(row["input_ids"]) for row in samples.rows or ())

    def tokenize(texts: Sequence[str]) -> list[Row]:
        found = tokenizer(list(texts), truncation=True, padding="max_length", max_length=longest)
        return [{name: found[name][index] for name in found} for index in range(len(texts))]

    return tokenize


def _name_of(given: nn.Module | str | os.PathLike | None, teacher: str | None) -> str:
    if isinstance(given, nn.Module):
        return "the given dense model"
    if given is not None:
        return Path(str(given)).name
    return Path(teacher).name if teacher is not None else "the teacher"
