"""The files of a page: the page itself, what it shows, and what the Hub needs to start it."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import SpaceCardData

from ..errors import SpaceError
from ..publish.card import CARD_NAME
from ..publish.markdown import cleaned, code
from ..publish.push_plan import refuse_secrets
from ..publish.record import RunRecord, load_record
from ..saved.files import lies_inside
from ..saved.model import SavedModel
from .app import EXPLAIN_NAME, SETTINGS_NAME, Settings

# The version that the tests looked at pages with.
GRADIO_VERSION = "6.31.0"

PYTHON_VERSION = "3.11"  # the oldest that hf-prune works with; the Hub's default is older

APP_NAME = "app.py"
REQUIREMENTS_NAME = "requirements.txt"

_SHORT = "A pruned model beside its dense one"  # the Hub allows 60 characters


def make_page(folder: SavedModel, settings: Settings) -> dict[str, Path | bytes]:
    """The files of a page, path -> file or content.

    Raises CardError if one seems to contain a secret, and SpaceError for an explanation that is a link to outside the
    folder.
    """
    files: dict[str, Path | bytes] = {
        APP_NAME: Path(__file__).with_name(APP_NAME).read_bytes(),
        SETTINGS_NAME: (json.dumps(asdict(settings), indent=1, ensure_ascii=False) + "\n").encode(),
        REQUIREMENTS_NAME: requirements(settings).encode(),
        CARD_NAME: readme(settings, load_record(folder)).encode(),
    }
    explanation = folder.folder / EXPLAIN_NAME
    if explanation.is_file():
        if not lies_inside(explanation, folder.folder):
            raise SpaceError(
                f"{explanation}: expected a file in the folder, got a link to outside; copy the file there"
            )
        files[EXPLAIN_NAME] = explanation
    refuse_secrets(files)
    return files


def requirements(settings: Settings) -> str:
    """The packages that the page needs beside gradio, at the versions that are installed here."""
    names = ["torch", "transformers", *(package.replace("_", "-") for package in settings.imports)]
    return "".join(f"{name}=={version(name).partition('+')[0]}\n" for name in names)  # without +cpu: not on every index


def readme(settings: Settings, record: RunRecord | None) -> str:
    """The Space's README.md: the metadata that the Hub reads, and what the page is."""
    base = record.base_model if record is not None else None
    license_name = (record.chosen.get("license") if record is not None else None) or (base.license if base else None)
    models = [name for name in (settings.pruned, settings.dense) if name is not None]
    is_local = any(os.path.isabs(name) for name in models)
    data = SpaceCardData(
        title=settings.title,
        emoji="✂️",
        colorFrom="gray",
        colorTo="blue",
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        python_version=PYTHON_VERSION,
        app_file=APP_NAME,
        short_description=_SHORT if settings.dense is not None else "A pruned model",
        license=license_name,
        models=None if is_local else models,
        tags=["hf-prune", "pruned"],
    )
    dense = f" and the dense model {code(settings.dense_name)}" if settings.dense_name is not None else ""
    times = (
        "their answers to the same text, and how long each takes" if dense else "its answers, and how long they take"
    )
    where = "on the machine that has these models" if is_local else "on any machine"
    return (
        f"---\n{SpaceCardData(**cleaned(data.to_dict())).to_yaml()}\n---\n\n# {settings.title}\n\n"
        f"The pruned model {code(settings.pruned_name)}{dense}: {times}.\n\n"
        "Made by hf-prune. What it shows is in `space.json`. With the packages of `requirements.txt` "
        f"and gradio {GRADIO_VERSION}, `python app.py` starts it {where}.\n"
    )


def write_page(output: Path, files: Mapping[str, Path | bytes]) -> None:
    """Write the files of a page into a folder."""
    for name, content in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
