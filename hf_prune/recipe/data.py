"""Data sets of recipes: loaded, checked, and split for training, validation and test."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from ..errors import RecipeError, first_line, nearest_beside
from ..publish.record import Source
from ..publish.sources import describe_dataset
from .names import data_format, package_of, resolve_name
from .schema import DatasetSection


def load_data(
    section: DatasetSection, columns: Mapping[str, str], others: Sequence[str] = ("validation", "test")
) -> datasets.DatasetDict:
    """The split `train` and `others`, `validation` and `test`, of a data set, as the recipe's section describes them.

    `columns` maps the recipe's fields (such as `text_column`) to the columns that they name; others are dropped.
    """
    loaded = _load(section)
    _check_split_names(section)
    _check_columns_differ(columns)
    train = _part(loaded, section, "train_split")
    parts = datasets.DatasetDict(train=_rows(train, "train", section, columns))
    for part in others:
        split, size = getattr(section, f"{part}_split"), getattr(section, f"{part}_size")
        if (split is None) == (size is None):
            came = "neither" if split is None else "both"
            raise RecipeError(f"dataset.{part}_split", f"set {part}_split or {part}_size, but not both; got {came}")
        if split is not None:
            parts[part] = _rows(_part(loaded, section, f"{part}_split"), part, section, columns)
    if section.validation_size is not None or section.test_size is not None:
        check_texts(datasets.DatasetDict(train=parts["train"]), "text_column", section.text_column)
        parts["train"] = _drop_repeated(parts["train"], section.text_column).shuffle(seed=section.split_seed)
    for part in ("test", "validation"):
        size = getattr(section, f"{part}_size")
        if size is not None:
            parts[part], parts["train"] = _cut(parts["train"], f"{part}_size", size)
    if section.max_train_samples is not None:
        parts["train"] = parts["train"].select(range(min(section.max_train_samples, len(parts["train"]))))
    return parts


def load_texts(section: DatasetSection) -> datasets.Dataset:
    """The rows of one split with only their texts, without repeated ones: to calibrate with, where nothing is trained.

    Raises RecipeError as `load_data` does.
    """
    return _drop_repeated(load_rows(section, {"text_column": section.text_column}), section.text_column)


def load_rows(section: DatasetSection, columns: Mapping[str, str]) -> datasets.Dataset:
    """The rows of the split `train_split` with only these columns, among them the texts. Raises RecipeError."""
    _check_columns_differ(columns)
    rows = _rows(_part(_load(section), section, "train_split"), "train", section, columns)
    check_texts(datasets.DatasetDict(train=rows), "text_column", section.text_column)
    return rows


def default_test_split(section: DatasetSection) -> str:
    """The split to test on where none is named: `test`, or the only one. Raises RecipeError where there are others."""
    splits = list(_load(section))
    if "test" not in splits and len(splits) != 1:
        raise RecipeError("dataset.test_split", f"expected one of {', '.join(splits)}, got none")
    return "test" if "test" in splits else splits[0]


def _load(section: DatasetSection) -> datasets.DatasetDict:
    """All splits of a data set."""
    name = resolve_name("dataset.name", section.name)
    try:
        return _open_data(name, section.config)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        path = Path(name)
        if path.is_file() and (not path.stat().st_size or "corresponds to no data" in str(error)):
            raise RecipeError("dataset.name", f"{path.name} has no rows") from error
        cause = error.__cause__ or error
        hint = "" if path.exists() else nearest_beside(path)
        raise RecipeError("dataset.name", f"{name}: {first_line(cause)}{hint}") from error


def _check_split_names(section: DatasetSection) -> None:
    used = {section.train_split: "train_split"}
    for field in ("validation_split", "test_split"):
        split = getattr(section, field)
        if split is not None and split in used:
            raise RecipeError(f"dataset.{field}", f"must differ from {used[split]}, got {split!r} for both")
        used[split] = field


def _open_data(name: str, config: str | None) -> datasets.DatasetDict:
    path = Path(name)
    if config is not None and (path.is_file() or _is_saved(path)):
        raise RecipeError("dataset.config", f"must not be set with {name}, a local data set, got {config!r}")
    if path.is_file():
        builder = data_format(name)
        if builder is None:
            raise ValueError("expected a .csv, .json, .jsonl or .parquet file")
        return datasets.load_dataset(builder, data_files=name)
    if _is_saved(path):
        saved = datasets.load_from_disk(name, keep_in_memory=True)  # or `map` would leave its cache beside the files
        return saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict(train=saved)
    return datasets.load_dataset(name, config)


def _is_saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _part(loaded: datasets.DatasetDict, section: DatasetSection, field: str) -> datasets.Dataset:
    """The split that a field names. Raises RecipeError where there is none of that name, or where it has no rows."""
    split = getattr(section, field)
    if split not in loaded:
        raise RecipeError(f"dataset.{field}", f"expected one of {', '.join(loaded)}, got {split!r}")
    if not len(loaded[split]):
        where = f" in {split}" if len(loaded) > 1 else ""
        raise RecipeError("dataset.name", f"{Path(section.name).name} has no rows{where}")
    return loaded[split]


def _check_columns_differ(columns: Mapping[str, str]) -> None:
    first: dict[str, str] = {}
    for field, column in columns.items():
        if column in first:
            raise RecipeError(f"dataset.{first[column]}", f"must differ from {field}, got {column!r} for both")
        first[column] = field


def _rows(rows: datasets.Dataset, part: str, section: DatasetSection, columns: Mapping[str, str]) -> datasets.Dataset:
    """The rows that `where` selects, with only these columns."""
    for field, column in columns.items():
        if column not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise RecipeError(f"dataset.{field}", f"expected one of {found} (columns of {part}), got {column!r}")
    for column, value in section.where.items():
        if column not in rows.column_names:
            raise RecipeError("dataset.where", f"expected one of {', '.join(rows.column_names)}, got {column!r}")
        rows = rows.select([index for index, cell in enumerate(rows[column]) if cell == value])
        if not len(rows):
            raise RecipeError("dataset.where", f"no row of the {part} split has {value!r} in {column!r}")
    return rows.select_columns(list(columns.values()))


def check_texts(data: datasets.DatasetDict, field: str, column: str) -> None:
    """Raise RecipeError unless a column, which the recipe's `field` names, holds a text in every row of every split."""
    for part, rows in data.items():
        text = rows.features[column]
        if not isinstance(text, datasets.Value) or text.dtype not in ("string", "large_string"):
            kind = getattr(text, "dtype", type(text).__name__)
            raise RecipeError(f"dataset.{field}", f"expected strings in {column!r}, got {kind} in {part}")
        _check_filled(rows, part, field, column)


def check_labels(data: datasets.DatasetDict, section: DatasetSection) -> None:
    """Raise RecipeError unless the labels are single values, one in every row of every split."""
    for part, rows in data.items():
        label = rows.features[section.label_column]
        if not isinstance(label, (datasets.Value, datasets.ClassLabel)):
            kind = type(label).__name__
            raise RecipeError(
                "dataset.label_column", f"expected single values in {section.label_column!r}, got {kind} in {part}"
            )
        _check_filled(rows, part, "label_column", section.label_column)


def _check_filled(rows: datasets.Dataset, part: str, field: str, column: str) -> None:
    empty = next((index for index, cell in enumerate(rows[column]) if cell is None), None)
    if empty is not None:
        raise RecipeError(f"dataset.{field}", f"expected a value in every row, row {empty} of {part} has none")


def _drop_repeated(part: datasets.Dataset, column: str) -> datasets.Dataset:
    first = {text: index for index, text in reversed(list(enumerate(part[column])))}
    return part.select(sorted(first.values()))


def _cut(part: datasets.Dataset, field: str, size: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    if not 0 < size < len(part):
        raise RecipeError(f"dataset.{field}", f"expected 1 to {len(part) - 1} of the {len(part)} rows, got {size}")
    return part.select(range(size)), part.select(range(size, len(part)))


def number_labels(data: datasets.DatasetDict, section: DatasetSection) -> tuple[datasets.DatasetDict, list[str]]:
    """The data with the column of labels replaced by `labels`, numbered from 0, and the labels' names."""
    column = section.label_column
    feature = data["train"].features[column]
    if isinstance(feature, datasets.ClassLabel):
        names, numbers = list(feature.names), {index: index for index in range(feature.num_classes)}
    else:
        values = sorted(set(data["train"][column]))
        names, numbers = [str(value) for value in values], {value: index for index, value in enumerate(values)}
    if len(names) < 2:
        raise RecipeError("dataset.label_column", f"expected two or more different labels, got {', '.join(names)}")
    for part, rows in data.items():
        unknown = set(rows[column]) - set(numbers)
        if unknown:
            expected = f"the labels {names} of the training split"
            raise RecipeError("dataset.label_column", f"expected {expected}, got {unknown.pop()!r} in {part}")

    def number(rows: dict[str, list[Any]]) -> dict[str, list[int]]:
        return {"labels": [numbers[value] for value in rows[column]]}

    return data.map(number, batched=True, remove_columns=[column], desc="Numbering labels"), names


def source_of(section: DatasetSection, rows: datasets.Dataset, part: str) -> Source:
    """The source of the rows of a `part` (`train`, `validation` or `test`): the data set, and in words which rows.

    The split is told where the data set is on the Hub, or where it has another name than the part.
    """
    known = describe_dataset(rows)
    split = getattr(section, f"{part}_split")
    taken = [f"where {column} is {value}" for column, value in section.where.items()]
    if split is None:
        taken.insert(0, _held_out(section, part))
    elif part == "train" and (section.test_size or section.validation_size):
        taken.insert(0, f"the other rows of {split}")
    on_hub = known is not None and known.hub_name is not None
    return Source(
        name=package_of(section.name) or Path(section.name).name,
        hub_name=known.hub_name if known is not None else None,
        revision=known.revision if known is not None else None,
        config=section.config,
        split=split if on_hub or split != part else None,
        rows=", ".join(taken) or None,
    )


def _held_out(section: DatasetSection, part: str) -> str:
    """Which rows a size holds out; those for validation follow those for testing, and depend on them."""
    after = f" after {section.test_size} for testing" if part == "validation" and section.test_size else ""
    size = getattr(section, f"{part}_size")
    return f"{size} rows held out of {section.train_split}{after} with seed {section.split_seed}"
