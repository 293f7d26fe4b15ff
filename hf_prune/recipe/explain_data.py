"""The rows that a saved model is explained on, as a section of a recipe or the options of a command name them."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pydantic import ValidationError
from transformers import PreTrainedModel

from ..errors import ExplainError, RecipeError, TargetError
from ..explain.samples import Samples
from ..explain.settings import labels_of
from ..model.expressions import refuse_slow
from ..publish.explanation import ELSEWHERE
from ..publish.record import Source
from .data import check_texts, default_test_split, load_data, load_rows, source_of
from .loading import why_no_slice
from .schema import DatasetSection, ExplainSection, Recipe

# On how many of the longest texts expressions are tried, before they are matched with all.
_TRIED = 200

# Key of a recipe, or argument -> the option of `hf-prune explain` that says the same.
OPTIONS = {
    "dataset.name": "--data",
    "dataset.config": "--data-config",
    "dataset.train_split": "--split",
    "dataset.test_split": "--split",
    "dataset.test_size": "--test-size",
    "dataset.validation_size": "--validation-size",
    "dataset.text_column": "--text-column",
    "dataset.label_column": "--label-column",
    "dataset.where": "--where",
    "dataset.max_length": "--max-length",
    "explain.slices": "--slice",
    "explain.expressions": "--expression",
    "data": "--data",
    "dense": "--dense",
}


@dataclass(frozen=True)
class Data:
    """The rows that a model is explained on, of one data set.

    Attributes:
        section: the data set; `test_split` or `test_size` says which rows.
        test: the rows; `training` those that the model was trained on, or None.
        source: what is said of them.
        training_section: the training rows, its `train_split`, where they are of a data set of their own.
        with_training: whether the training rows of the same data set were asked for.
    """

    section: DatasetSection
    test: datasets.Dataset
    training: datasets.Dataset | None
    source: Source
    training_section: DatasetSection | None = None
    with_training: bool = False


def parse_explained(expressions: Sequence[str], **fields: Any) -> ExplainSection:
    """The section of `hf-prune explain`; the expressions are NAME=REGEX. Raises RecipeError, naming the option."""
    parsed: dict[str, str] = {}
    for expression in expressions:
        name, equals, text = expression.partition("=")
        why = why_no_slice(name, text) if equals else f"expected NAME=REGEX, got {expression!r}"
        if why is not None:
            raise RecipeError("--expression", why)
        parsed[name] = text
    try:
        return ExplainSection(expressions=parsed, **fields)
    except ValidationError as error:
        raise _of_options(error) from error


def _of_options(error: ValidationError) -> RecipeError:
    """pydantic's errors as problems of the options of a command."""
    return RecipeError(
        problems=[
            (
                f"--{str(one['loc'][0]).replace('_', '-')}",
                f"{one['msg'][0].lower()}{one['msg'][1:]}, got {one['input']!r}",
            )
            for one in error.errors()
        ]
    )


@contextlib.contextmanager
def errors_of_options(options: Mapping[str, str] = OPTIONS) -> Iterator[None]:
    """Name options of a command in problems of recipes and of explanations, in place of keys and fields."""
    try:
        yield
    except (RecipeError, ExplainError) as error:
        problems = [(options.get(key, key), _with_options(text, options)) for key, text in error.problems]
        raise type(error)(problems=problems) from error


def _with_options(text: str, options: Mapping[str, str]) -> str:
    """A message that names a field at its beginning, with the option in its place."""
    beginning = "must differ from "
    field, comma, rest = text.removeprefix(beginning).partition(",")
    option = options.get(f"dataset.{field}")
    return f"{beginning}{option}{comma}{rest}" if text.startswith(beginning) and option is not None else text


def section_of(
    name: str,
    *,
    split: str | None,
    test_size: int | None,
    training_data: str | None,
    training_split: str | None,
    **fields: Any,
) -> tuple[DatasetSection, DatasetSection | None]:
    """The section of the data that is explained, and that of the training rows, where they are named by themselves.

    The first has no `test_split` where none is named: `read_data` finds it.
    """
    try:
        if test_size is not None:
            return DatasetSection(name=name, train_split=split or "train", test_size=test_size, **fields), None
        # Its training split is not read: it only must have another name.
        section = DatasetSection(name=name, test_split=split, train_split=training_split or "", **fields)
    except ValidationError as error:
        raise _of_options(error) from error
    if training_data is None and training_split is None:
        return section, None
    update = {"train_split": training_split or "train", "name": training_data or name}
    return section, section.model_copy(update=update)


def read_data(
    section: DatasetSection,
    explained: ExplainSection,
    with_labels: bool,
    training: DatasetSection | None = None,
    with_training: bool = False,
) -> Data:
    """The rows that sections name, with texts, labels and the columns of slices.

    `training` names a data set of its own for the training rows, its `train_split`; otherwise they are those of the
    same data set, if `with_training`. A section of a command without `test_split` is explained on `test`, or on the
    only split. Raises RecipeError as `load_data` does.
    """
    if section.test_size is None and section.test_split is None:
        section = section.model_copy(update={"test_split": default_test_split(section)})
    if training is not None and (training.name, training.train_split) == (section.name, section.test_split):
        raise RecipeError("--training-split", f"must differ from --split, got {section.test_split!r} for both")
    columns = {"text_column": section.text_column}
    if with_labels:
        columns["label_column"] = section.label_column
    plain = dict(columns)
    columns |= {f"slice {name}": name for name in explained.slices if name not in columns.values()}
    try:
        if section.test_size is not None or (with_training and training is None):
            others = ["test", *(["validation"] if section.validation_size or section.validation_split else [])]
            parts = load_data(section, columns, others)
            test, own_training = parts["test"], parts["train"]
        else:
            assert section.test_split is not None
            test = load_rows(section.model_copy(update={"train_split": section.test_split}), columns)
            own_training = None
    except RecipeError as error:
        raise RecipeError(problems=[(_key(key, section), text) for key, text in error.problems]) from error
    if training is not None:
        with errors_of_options({"dataset.name": "--training-data", "dataset.train_split": "--training-split"}):
            own_training = load_rows(training, plain)
    for part in (test, own_training):
        if part is not None:
            check_texts(datasets.DatasetDict(test=part), "text_column", section.text_column)
    _refuse_slow(explained, list(test[section.text_column]))
    return Data(section, test, own_training, source_of(section, test, "test"), training, with_training)


def _key(key: str, section: DatasetSection) -> str:
    """The key of a problem with data, in a recipe that has the columns of slices and a split under other names."""
    if key.startswith("dataset.slice "):
        return "explain.slices"
    return "dataset.test_split" if key == "dataset.train_split" and section.test_size is None else key


def _refuse_slow(explained: ExplainSection, texts: list[str]) -> None:
    """Raise RecipeError for an expression that takes too long on these texts: other people may have written it."""
    longest = sorted(texts, key=len)[-_TRIED:]
    tried = [f"(?s:.*)(?:{expression})(?s:.*)" for expression in explained.expressions.values()]
    try:
        refuse_slow("expressions", tried, longest, "texts")
    except TargetError as error:
        raise RecipeError("explain.expressions", error.problems[0][1]) from error


def read_samples(rows: datasets.Dataset, section: DatasetSection, model: PreTrainedModel, slices: list[str]) -> Samples:
    """Texts, the indices of a classifier's labels, and columns. Raises RecipeError for labels that do not fit."""
    labels = (
        _labels(rows, section.label_column, labels_of(model)) if section.label_column in rows.column_names else None
    )
    return Samples(
        texts=list(rows[section.text_column]), labels=labels, columns={name: list(rows[name]) for name in slices}
    )


def _is_label(value: Any, text: str, names: Sequence[str]) -> bool:
    return text in names or (type(value) is int and 0 <= value < len(names))


def _labels(rows: datasets.Dataset, column: str, names: list[str]) -> np.ndarray:
    """The index of each row's label among the names of a model's labels.

    Labels are found by their names; whole numbers that are not among the names are indices.
    """
    feature, values = rows.features[column], list(rows[column])
    if isinstance(feature, datasets.ClassLabel) and set(feature.names) <= set(names):
        values = [feature.names[value] for value in values]
    known: dict[Any, int] = {name: index for index, name in enumerate(names)}
    texts = [str(value) for value in values]
    if set(texts) <= known.keys():
        return np.array([known[text] for text in texts])
    if all(type(value) is int and 0 <= value < len(names) for value in values):
        return np.array(values)
    pairs = zip(values, texts, strict=True)
    wrong = next((value for value, text in pairs if not _is_label(value, text, names)), values[0])
    raise RecipeError(
        "dataset.label_column", f"expected the labels of the model ({', '.join(names)}), got {wrong!r} in {column!r}"
    )


def data_of(recipe: Recipe) -> Data:
    """The test and training rows that a recipe's model is explained on. Raises RecipeError."""
    assert recipe.explain is not None
    return read_data(recipe.dataset, recipe.explain, recipe.task == "text-classification", with_training=True)


def check_explained(recipe: Recipe) -> None:
    """Raise RecipeError for slices that the data of a recipe do not have."""
    if recipe.explain is not None:
        data_of(recipe)


def options_of(data: Data, folder: Path) -> list[str]:
    """The options of `hf-prune explain` that give the same rows, where it is run in a model's folder."""
    section, training = data.section, data.training_section
    found = ["--data", written(section.name, folder)]
    defaults = {"config": "--data-config", "text_column": "--text-column", "label_column": "--label-column"}
    defaults |= {"max_length": "--max-length"}
    for field, option in defaults.items():
        value = getattr(section, field)
        if value != DatasetSection.model_fields[field].default:
            found += [option, str(value)]
    for column, value in section.where.items():
        found += ["--where", f"{column}={value}"]
    if section.test_size is not None:
        found += ["--test-size", str(section.test_size)]
        found += ["--validation-size", str(section.validation_size)] if section.validation_size else []
        found += ["--split-seed", str(section.split_seed)] if section.split_seed else []
        found += ["--split", section.train_split] if section.train_split != "train" else []
    elif section.test_split != "test":
        found += ["--split", str(section.test_split)]
    if training is not None:
        found += ["--training-data", written(training.name, folder)]
    if (training is not None and training.train_split != "train") or (data.with_training and section.test_size is None):
        found += ["--training-split", (training or section).train_split]
    return found


def written(name: str, folder: Path) -> str:
    """A name for a command that is run in a model's folder: of a path, the one that leads there from the folder.

    So that no other folders of this machine are named, it is told only of what lies in the working directory or beside
    the model, or beside the run whose `model` it is, and as it was given where the working directory is the model's
    folder. Of others only the last part is told, after `path/to/`.
    """
    path = Path(name).expanduser()
    if not path.exists():  # on the Hub, or in a package
        return name
    place, start = Path(os.path.abspath(path)), Path(os.path.realpath(folder))
    if Path.cwd() == start and not path.is_absolute():
        return name
    beside = start.parent.parent if start.name == "model" else start.parent
    shared = Path(os.path.commonpath([place, start]))
    if any(shared.is_relative_to(known) for known in (Path.cwd(), beside) if known != known.parent):
        return os.path.relpath(place, start)
    return f"{ELSEWHERE}{place.name}"
