"""A saved model, exported to another runtime, opened there, compared with PyTorch and timed beside it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ExportError, one_line
from ..model.opening import LOADING_ERRORS, why_not_opened
from ..publish.measure import versions
from ..saved.files import find_model, why_not_written
from ..saved.model import SavedModel
from ..saved.report import make_report
from ..structure.latency import build_again, build_dense
from ..structure.record import fields_before, read_structure
from ..structure.timing import processor_name
from .export_card import render
from .export_report import REPORT_NAME, ExportReport, Row
from .exporters import FORMATS, find_format
from .formats import ExportFormat, Work
from .passes import Stages, agreement, difference, run_pass, stages_of, time_passes
from .samples import Samples, drawn_samples, inputs_for, samples_of_texts

# How far outputs in float32 may be from PyTorch's, relative to the largest: OpenVINO computes in bfloat16 where it can.
TOLERANCE = 0.05

# A dense model to compare with is built only up to so many parameters.
_MOST_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class Texts:
    """Texts to try a model with, their labels if they are known, and what they are, in words."""

    texts: list[str]
    words: str
    labels: list[Any] | None = None


def export_model(
    model: str | os.PathLike,
    output: Path,
    to: str,
    int8: bool = False,
    texts: Texts | None = None,
    dense: str | os.PathLike | None = None,
    length: int = 128,
    say: Callable[[str], None] = lambda _: None,
) -> ExportReport:
    """Export a saved model to another runtime, and write it with what was measured into a new folder.

    The exported model is opened there and must answer as PyTorch does. Latency is measured in turns with the model in
    PyTorch, with a dense one in both, and for int8 with float32. The folder gets the exporter's files, the tokenizer,
    `export_report.json`, and a `README.md` with the same as a table.

    Args:
        model: a folder with a saved model, or its name on the Hub.
        output: the folder to write; it must not exist, or be empty.
        to: a name of `FORMATS`.
        int8: whether to quantise.
        texts: texts to compare and time with; without them, tokens are drawn from the vocabulary.
        dense: a saved dense model to compare with. Without it, one of the original sizes is built, with new weights.
        length: the most tokens of a text.
        say: is told what is done.

    Raises:
        ExportError: packages are missing, the model cannot be exported, or its outputs differ.
        ReportError: there is no saved model.
    """
    entry = find_format(to, int8)
    found = why_not_written(output)
    if found is not None:
        raise ExportError("OUT", f"expected a new or an empty folder, got {found}: {output}")
    saved = SavedModel(find_model(model))
    if saved.skeleton is not None:
        _check_class(saved.skeleton, entry, to)
    saved.check_whole()
    whole = _load(saved)
    tokenizer = _tokenizer(saved)
    samples = _samples(whole, tokenizer, texts, length)
    other = _load(SavedModel(find_model(dense))) if dense is not None else _new_dense(saved, whole)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise ExportError("OUT", f"{output} cannot be written: {one_line(error)}") from error
    try:
        rows = _write_and_measure(entry, whole, other, tokenizer, dense is not None, samples, int8, unfinished, say)
        report = ExportReport(
            name=saved.folder.resolve().name,
            model_class=type(whole).__name__,
            to=to,
            int8=entry.int8 if int8 else None,
            sparsity=make_report(saved).prunable_sparsity,
            samples=samples.words,
            number=samples.number,
            dense_is_new=dense is None and other is not None,
            computes_in=entry.computes_in(),
            stages=list(stages_of(whole)),
            rows=rows,
            processor=processor_name(),
            threads=torch.get_num_threads(),
            versions=versions(("hf-prune", "torch", "transformers", *entry.packages)),
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        text = json.dumps(report.to_dict(), indent=1, allow_nan=False, ensure_ascii=False)
        (unfinished / REPORT_NAME).write_text(f"{text}\n", encoding="utf-8")
        (unfinished / "README.md").write_text(render(report), encoding="utf-8")
        unfinished.chmod(0o755)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return report


def _check_class(model: PreTrainedModel, entry: ExportFormat, to: str) -> None:
    """Raise ExportError for a model that is not exported to a format, before its weights are read."""
    name = type(model).__name__
    if entry.model_types and model.config.model_type not in entry.model_types:
        wanted = ", ".join(entry.model_types)
        raise ExportError("--to", f"{to} is written for models of the type {wanted}, got {model.config.model_type}")
    if model.config.is_encoder_decoder:
        _check_encoder_decoder(model, entry, to)
    if model.can_generate() and not entry.generates:
        raise ExportError(f"{name}: language models are not exported to {to}; use onnx or openvino")


def _check_encoder_decoder(model: PreTrainedModel, entry: ExportFormat, to: str) -> None:
    """Raise ExportError for an encoder-decoder that is not exported to a format."""
    name = type(model).__name__
    if not model.can_generate():
        raise ExportError(f"{name}: of encoder-decoders, those that generate text are exported; this class does not")
    if model.main_input_name != "input_ids":
        raise ExportError(
            f"{name}: of encoder-decoders, those that read text are exported; it reads {model.main_input_name}"
        )
    if not entry.translates:
        offered = " or ".join(other for other, one in FORMATS.items() if one.translates)
        raise ExportError(f"{name}: encoder-decoders are not exported to {to}; use {offered}")


def _write_and_measure(
    entry: ExportFormat,
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    is_dense_trained: bool,
    samples: Samples,
    int8: bool,
    folder: Path,
    say: Callable[[str], None],
) -> list[Row]:
    """Write the wanted export into the folder, the others into temporary ones; measure all."""
    with tempfile.TemporaryDirectory() as temporary:
        rows: list[Row] = []
        stages: list[tuple[Stages, Any]] = []
        if dense is not None:
            megabytes = _megabytes(dense) if is_dense_trained else None
            rows.append(Row("PyTorch", "dense", "float32", megabytes))
            stages.append((stages_of(dense), dense.config))
        rows.append(Row("PyTorch", "this model", "float32", _megabytes(model)))
        stages.append((stages_of(model), model.config))
        wanted = [("this model", model, False), *([("this model", model, True)] if int8 else [])]
        if dense is not None:
            wanted.insert(0, ("dense", dense, False))
        for name, one, quantised in wanted:
            precision = "int8" if quantised else "float32"
            say(f"Exporting {name} to {entry.runtime}, {precision}")
            is_last = (name, quantised) == (wanted[-1][0], wanted[-1][2])
            place = folder if is_last else Path(temporary, f"{name}-{precision}")
            place.mkdir(exist_ok=True)
            entry.write(Work(one, tokenizer, samples.batches, quantised), place)
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file()) / 1e6
            kept = name == "this model" or is_dense_trained
            rows.append(Row(entry.runtime, name, precision, size if kept else None))
            stages.append((entry.open(place), one.config))
        say("Comparing and timing")
        _measure(
            rows, stages, samples, is_dense_trained, predicts=model.can_generate() or "For" in type(model).__name__
        )
    wrong = next((row for row in rows if row.precision == "float32" and (row.difference or 0) > TOLERANCE), None)
    if wrong is not None:
        raise ExportError(
            f"the outputs in {wrong.runtime} differ by {wrong.difference:.1e} of the largest from those of PyTorch; "
            "nothing was written"
        )
    return rows


def _measure(
    rows: Sequence[Row], stages: Sequence[tuple[Stages, Any]], samples: Samples, with_dense: bool, predicts: bool
) -> None:
    """Fill in differences, accuracies and seconds; of a model with a head (`predicts`), equal predictions too."""
    at = next(index for index, row in enumerate(rows) if row.model == "this model")
    expected = [run_pass(*stages[at], batch) for batch in samples.batches]
    following = [one.argmax(-1) if "prefill" in stages[at][0] else None for one in expected]
    for row, (some, config) in zip(rows, stages, strict=True):
        if row.model == "dense" and not (with_dense and samples.labels):
            continue
        pairs = zip(samples.batches, following, strict=True)
        found = [run_pass(some, config, batch, after) for batch, after in pairs]
        if row.model != "dense" and row.runtime != "PyTorch":
            row.difference = difference(found, expected)
            row.agreement = agreement(found, expected) if predicts else None
        if samples.labels is not None:
            right = [(one.argmax(-1) == label) for one, label in zip(found, samples.labels, strict=True)]
            row.accuracy = float(torch.cat(right).float().mean())
    for batch in samples.timed:
        number = len(next(iter(batch.values())))
        after = following[0][:number] if following[0] is not None else None
        for row, seconds in zip(rows, time_passes(stages, batch, after), strict=True):
            row.seconds[number] = seconds


def _load(saved: SavedModel) -> PreTrainedModel:
    """The model in float32, in evaluation mode."""
    if saved.skeleton is None:
        raise ExportError(f"{saved.folder}: {saved.note}")
    if saved.dense_bytes is not None and not saved.says_packed:
        raise ExportError(
            f"{saved.folder}: the weights are packed, and config.json does not say so; take the config.json that "
            "hf-prune pack wrote, or unpack the weights with hf-prune unpack"
        )
    try:
        return type(saved.skeleton).from_pretrained(saved.folder, dtype=torch.float32).eval()
    except LOADING_ERRORS as error:
        raise ExportError(f"{saved.folder}: the weights cannot be loaded: {one_line(error)}") from error


def _tokenizer(saved: SavedModel) -> PreTrainedTokenizerBase | None:
    if not saved.has_tokenizer:
        return None
    try:
        return AutoTokenizer.from_pretrained(saved.folder, trust_remote_code=False)
    except LOADING_ERRORS as error:
        raise ExportError(f"{saved.folder}: the tokenizer cannot be loaded: {why_not_opened(error)}") from error


def _samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, texts: Texts | None, length: int
) -> Samples:
    if texts is None:
        samples = drawn_samples(model, tokenizer, length)
    elif tokenizer is None:
        raise ExportError("--data", "expected a tokenizer in the folder of the model, to read texts; found none")
    else:
        samples = samples_of_texts(model, tokenizer, texts.texts, texts.labels, length, texts.words)
    return Samples([inputs_for(model, batch) for batch in samples.batches], samples.words, samples.labels)


def _new_dense(saved: SavedModel, model: PreTrainedModel) -> PreTrainedModel | None:
    """A model of the original sizes with new weights; None for very large ones."""
    removed = read_structure(saved.folder)
    parameters = removed["parameters"][0] if removed is not None else model.num_parameters()
    if parameters > _MOST_PARAMETERS:
        return None
    if removed is not None:
        return build_dense(model, fields_before(removed))
    return build_again(model, "float32", torch.device("cpu"))


def _megabytes(model: PreTrainedModel) -> float:
    """The megabytes of a model's parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 1e6
