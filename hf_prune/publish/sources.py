"""What a run was made with and what came of it, described and measured for its record."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .record import Source

# What `datasets` calls data sets that are files of these kinds.
_KINDS_OF_FILES = (
    *("arrow", "audiofolder", "cache", "csv", "generator", "hdf5", "imagefolder", "json", "lance", "pandas", "parquet"),
    *("pdffolder", "spark", "sql", "text", "videofolder", "webdataset", "xml"),
)


# ---- What a run began with ----


def is_hub_name(name: str | None) -> bool:
    """Whether a name could be that of a repository on the Hub, with its namespace or without."""
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return bool(name)


def describe_base(
    name_or_path: str, hub_name: str | None = None, revision: str | None = None
) -> tuple[Source, str | None]:
    """A base model as its own card describes it: license and languages; and why they are not known, where they are not.

    `name_or_path` is a folder or a name on the Hub; `hub_name` is what a folder's model is called there.
    """
    folder = Path(name_or_path)
    card_file = folder / "README.md"
    if not folder.is_dir() and hub_name is None:
        hub_name = name_or_path if is_hub_name(name_or_path) else None
    shown = hub_name or folder.name or name_or_path
    data: dict[str, Any] = {}
    if folder.is_dir() and not card_file.is_file():
        problem: str | None = f"the folder of {shown} has no card (README.md)"
    else:
        try:
            card = ModelCard.load(card_file if folder.is_dir() else name_or_path, ignore_metadata_errors=True)
            data = card.data.to_dict()
            problem = None if _texts(data.get("license")) else f"the card of {shown} names no license"
        except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
            # No network, no such name, or a card that is none.
            problem = f"the card of {shown} cannot be read: {type(error).__name__}"
    license_name = next(iter(_texts(data.get("license"))), None)
    source = Source(
        name=shown,
        hub_name=hub_name,
        revision=revision,
        license=license_name,
        languages=language_codes(data.get("language")),
    )
    return source, problem


def language_codes(value: Any) -> list[str]:
    """The languages in a card's metadata."""
    return _texts(with_norwegian(value))


def with_norwegian(value: Any) -> Any:
    """A card's `language`, where `no` is Norwegian: YAML 1.1 reads it as false."""
    if isinstance(value, list):
        return [with_norwegian(code) for code in value]
    return "no" if value is False else value


def _texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text]


def describe_dataset(dataset: Any) -> Source | None:
    """What a `datasets.Dataset` knows of where it came from: name and revision on the Hub, configuration, split."""
    info = getattr(dataset, "info", None)
    if info is None:
        return None
    found = next(
        filter(None, (re.match(r"hf://datasets/([^@]+)@([^/]+)/", url) for url in info.download_checksums or {})), None
    )
    name = found[1] if found else info.dataset_name
    if name is None or (found is None and name in _KINDS_OF_FILES):  # which is a kind of file, not a name
        return None
    return Source(
        name=name,
        hub_name=found[1] if found else None,
        revision=found[2] if found else None,
        config=info.config_name if info.config_name != "default" else None,
        split=str(dataset.split) if dataset.split is not None else None,
    )
