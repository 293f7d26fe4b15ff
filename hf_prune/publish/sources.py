"""The sources of a run, its base model and data sets: for its record, and as links in its card."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import ModelCard, constants, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..config.safe_yaml import LimitedLoader
from ..foreign.huggingface_hub import REGEX_YAML_BLOCK
from .markdown import code, inline, single_line
from .record import Source

# The names that `datasets` gives to data sets read from files of these kinds.
_KINDS_OF_FILES = (
    *("arrow", "audiofolder", "cache", "csv", "generator", "hdf5", "imagefolder", "json", "lance", "pandas", "parquet"),
    *("pdffolder", "spark", "sql", "text", "videofolder", "webdataset", "xml"),
)


def is_hub_name(name: str | None) -> bool:
    """Whether a name could be that of a repository on the Hub, with or without its namespace: no path that exists."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return bool(name) and not Path(name or "").exists()


def shown_name(name: str) -> str:
    """A name for a card: of a path on this machine, only the last part."""
    is_path = Path(name).exists() or re.match(r"[/\\~]|\.{1,2}[/\\]|\w:\\", name)
    return _last_part(name) if is_path else name


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] if Path(path).name.strip(".") else Path(path).resolve().name


def describe_name(name: str) -> Source:
    """A model or data set by a name alone: on the Hub, of a folder or file, or any other."""
    return Source(name=shown_name(name), hub_name=name if is_hub_name(name) else None)


def describe_base(
    name_or_path: str, hub_name: str | None = None, revision: str | None = None
) -> tuple[Source, str | None]:
    """A base model with license and languages from its card; and if they are unknown, why.

    `name_or_path` is a folder or a name on the Hub; `hub_name` is the name on the Hub of a folder's model, or a path,
    of which only the last part is shown.
    """
    if hub_name is not None and not is_hub_name(hub_name):
        name_or_path, hub_name = hub_name, None
    folder = Path(name_or_path)
    card_file = folder / "README.md"
    if not folder.is_dir() and hub_name is None:
        hub_name = name_or_path if is_hub_name(name_or_path) else None
    shown = hub_name or _last_part(name_or_path) or name_or_path
    data: dict[str, Any] = {}
    if folder.is_dir() and not card_file.is_file():
        problem: str | None = f"the folder of {shown} has no model card (README.md)"
    else:
        try:
            path = card_file if folder.is_dir() else hf_hub_download(name_or_path, card_file.name)
            text = Path(path).read_text(encoding="utf-8")
            split_card(text)  # within the limits that ModelCard does not have
            card = ModelCard(text, ignore_metadata_errors=True)
            data = card.data.to_dict()
            problem = None if _texts(data.get("license")) else f"the model card of {shown} states no license"
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            # No network, no such name, or not a model card.
            problem = f"the model card of {shown} cannot be read: {type(error).__name__}"
    license_name = next(iter(_texts(data.get("license"))), None)
    source = Source(
        name=shown,
        hub_name=hub_name,
        revision=revision,
        license=license_name,
        languages=language_codes(data.get("language")),
    )
    return source, problem


def split_card(text: str) -> tuple[Any, str]:
    """The metadata of a card, None if it has none, and its text. Raises yaml.YAMLError for metadata beyond limits."""
    block = REGEX_YAML_BLOCK.search(text)
    return (yaml.load(block[2], LimitedLoader), text[block.end() :]) if block is not None else (None, text)


def language_codes(value: Any) -> list[str]:
    """The languages in a card's metadata."""
    return _texts(with_norwegian(value))


def with_norwegian(value: Any) -> Any:
    """A card's `language` with `no` for Norwegian, which YAML 1.1 reads as false."""
    if isinstance(value, list):
        return [with_norwegian(code) for code in value]
    return "no" if value is False else value


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text and text.isprintable()]


def describe_dataset(dataset: Any) -> Source | None:
    """The source that a `datasets.Dataset` records: name and revision on the Hub, configuration, split."""
    info = getattr(dataset, "info", None)
    if info is None:
        return None
    found = next(
        filter(None, (re.match(r"hf://datasets/([^@]+)@([^/]+)/", url) for url in info.download_checksums or {})), None
    )
    name = found[1] if found else info.dataset_name
    if name is None or (found is None and name in _KINDS_OF_FILES):  # a kind of file, not a name
        return None
    return Source(
        name=name,
        hub_name=found[1] if found else None,
        revision=found[2] if found else None,
        config=info.config_name if info.config_name != "default" else None,
        split=str(dataset.split) if dataset.split is not None else None,
    )


def linked(source: Source, kind: str = "") -> str:
    """A model or (with the kind `datasets/`) a data set, as a link if it is on the Hub, with its revision."""
    text = code(source.name)
    if source.hub_name:
        text = f"[{text}]({constants.ENDPOINT}/{kind}{quote(single_line(source.hub_name), safe='/')})"
    return f"{text} (revision {code(source.revision)})" if source.revision else text


def described(dataset: Source) -> str:
    """A data set as a link, with its configuration, split and rows."""
    config = f", configuration {code(dataset.config)}" if dataset.config else ""
    split = f", split {code(dataset.split)}" if dataset.split else ""
    rows = f", {inline(dataset.rows)}" if dataset.rows else ""
    return f"{linked(dataset, 'datasets/')}{config}{split}{rows}"
