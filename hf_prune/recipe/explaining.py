"""Explaining a saved model: both models opened, explained on the samples, and what is written."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ExplainError
from ..explain.explain import explain
from ..explain.samples import Reader, Row
from ..explain.settings import Known, Settings, check_model, check_pair
from ..explain.writing import write_explanation
from ..model.opening import LOADING_ERRORS, why_not_opened
from ..publish.explanation import Explanation
from ..publish.explanation_words import summary
from ..publish.record import load_record
from ..saved.files import find_model
from ..saved.model import SavedModel
from .explain_data import Data, data_of, options_of, read_samples, written
from .models import check_length, set_padding
from .schema import ExplainSection, Recipe

Say = Callable[[str], None]

# How many training texts tokens are counted in.
_MOST_COUNTED = 20_000


def make_reader(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Reader:
    """A model with its tokenizer, which cuts texts at `max_length` tokens.

    For language models each text ends with the end-of-text token, where there is one and it is not cut off.
    """
    check_length(model, tokenizer, max_length)
    set_padding(model, tokenizer)
    tokenizer.padding_side = "right"
    end = tokenizer.eos_token_id
    of_tokens = check_model(model) == "text-generation"

    def tokenize(texts: Sequence[str]) -> list[Row]:
        found = tokenizer(list(texts), truncation=True, max_length=max_length)
        if not of_tokens:
            return [{name: found[name][index] for name in found} for index in range(len(texts))]
        rows: list[Row] = []
        for index, tokens in enumerate(found["input_ids"]):
            whole = [*tokens, *([end] if end is not None and tokens[-1:] != [end] else [])][:max_length]
            if not whole:
                raise ExplainError("data", f"expected texts of one token or more, text {index} has none")
            rows.append({"input_ids": whole, "attention_mask": [1] * len(whole)})
        return rows

    return Reader(model, cast(Any, DataCollatorWithPadding(tokenizer)), tokenize, max_length)


def explain_saved(
    folder: Path,
    read: Callable[[bool], Data],
    explained: ExplainSection,
    dense: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
) -> Explanation:
    """Explain the model in a folder beside a dense one, a folder or a name on the Hub. Writes nothing.

    `read` gives the data, with labels or without. Raises ExplainError, RecipeError or ReportError before anything is
    computed, if models and data do not fit together.
    """
    saved = SavedModel(folder)
    saved.check_whole()
    with_labels = check_model(_skeleton(saved)) == "text-classification"
    saved_dense = SavedModel(find_model(dense)) if dense is not None else None
    if saved_dense is not None:
        saved_dense.check_whole()
        check_pair(_skeleton(saved), _skeleton(saved_dense))
    data = read(with_labels)
    section = data.section
    samples = read_samples(data.test, section, _skeleton(saved), explained.slices).chosen(
        explained.samples, explained.seed
    )
    training = None
    if data.training is not None and explained.training_samples:
        training = read_samples(data.training, section, _skeleton(saved), [])
        training = training.chosen(_MOST_COUNTED, explained.seed)
    readers = [
        make_reader(_open(one, dtype, device), _tokenizer(one if one.has_tokenizer else saved), section.max_length)
        for one in (saved, saved_dense)
        if one is not None
    ]
    name = _name(saved)
    known = Known(
        model=name,
        dense_model=_name(saved_dense) if saved_dense is not None else None,
        data=data.source,
        command=_command(saved, dense, data, explained),
        files=saved.hashes,
        file_bytes=saved.file_bytes,
        dense_file_bytes=saved_dense.file_bytes if saved_dense is not None else None,
        nonzero=_nonzero(saved),
        dense_nonzero=_nonzero(saved_dense) if saved_dense is not None else None,
        prunable=[tensor.name for tensor in saved.tensors if tensor.prunable] or None,
        removed=saved.removed,
        notes=tuple(_perhaps_trained_on(saved, data)),
    )
    settings = Settings(
        resamples=explained.resamples,
        seed=explained.seed,
        batch_size=explained.batch_size,
        expressions=explained.expressions,
        show_texts=explained.show_texts,
        training_samples=explained.training_samples,
        perturbations=explained.perturbations,
        costs=explained.costs,
    )
    return explain(
        readers[0],
        samples,
        known,
        dense=readers[1] if len(readers) > 1 else None,
        training=training,
        settings=settings,
    )


def explain_run(recipe: Recipe, dense: Path | None, dtype: torch.dtype, say: Say) -> Explanation | None:
    """Explain the model that a run has saved beside the dense one, and write it; None if the recipe asks for none."""
    if recipe.explain is None:
        return None
    output = Path(recipe.output_dir)
    say("Explaining the pruned model")
    explanation = explain_saved(
        output / "model",
        lambda with_labels: data_of(recipe),
        recipe.explain,
        dense,
        dtype=dtype,
        device=str(recipe.training_arguments().device),
    )
    write_explanation(output / "model", explanation)
    say("\n".join(summary(explanation)))
    return explanation


def _skeleton(saved: SavedModel) -> PreTrainedModel:
    if saved.skeleton is None:
        raise ExplainError("model", f"{saved.folder}: {saved.note}")
    return saved.skeleton


def _open(saved: SavedModel, dtype: str | torch.dtype, device: str | None) -> PreTrainedModel:
    try:
        model = type(_skeleton(saved)).from_pretrained(saved.folder, dtype=dtype, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ExplainError("model", f"{saved.folder}: {why_not_opened(error)}") from error
    return model if device is None else cast(Any, model).to(torch.device(device))


def _tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase:
    if not saved.has_tokenizer:
        raise ExplainError("model", f"{saved.folder}: expected a tokenizer beside the model, found none")
    try:
        return AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ExplainError("model", f"the tokenizer cannot be loaded: {why_not_opened(error)}") from error


def _nonzero(saved: SavedModel) -> int | None:
    return sum(tensor.weights - tensor.zeros for tensor in saved.tensors) if saved.tensors else None


def _perhaps_trained_on(saved: SavedModel, data: Data) -> list[str]:
    """A sentence about samples that the model may have been trained on, by its record; none where there is no sign."""
    record, source = load_record(saved.folder), data.source
    training = record.training_data if record is not None else None
    if training is None or (training.name, training.config) != (source.name, source.config) or data.section.test_size:
        return []
    split = training.split or "train"
    if split != (source.split or "test"):
        return []
    return [
        f"The model was trained on rows of the same data ({source.name}, {split}), and these samples may be among "
        "them: --test-size and --split-seed hold out the rows that a recipe has held out."
    ]


def _name(saved: SavedModel) -> str:
    """What a model is called: by its record, or by its folder."""
    record, folder = load_record(saved.folder), saved.folder.resolve()
    if record is not None:
        return record.name
    if folder.name == "model":  # of a run, whose record has the same name when it is written
        return folder.parent.name
    return f"{folder.parent.name}/{folder.name}" if folder.name == "dense" else folder.name


def _command(saved: SavedModel, dense: str | Path | None, data: Data, explained: ExplainSection) -> str:
    """The command that measures an explanation again in the model's folder, without names of folders elsewhere."""
    words = ["hf-prune", "explain", "."]
    words += ["--dense", written(str(dense), saved.folder)] if dense is not None else []
    words += options_of(data, saved.folder)
    for name in explained.slices:
        words += ["--slice", name]
    for name, expression in explained.expressions.items():
        words += ["--expression", f"{name}={expression}"]
    words += ["--show-texts"] if explained.show_texts else []
    words += ["--without-perturbations"] if not explained.perturbations else []
    words += ["--without-costs"] if not explained.costs else []
    for field in ("samples", "training_samples", "batch_size", "resamples", "seed"):
        value = getattr(explained, field)
        if value != ExplainSection.model_fields[field].default:
            words += [f"--{field.replace('_', '-')}", str(value)]
    return shlex.join(words)
