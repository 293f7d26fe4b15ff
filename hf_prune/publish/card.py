"""Model cards on disk: a saved model's folder -> README.md, sparsity.json and plots.

The sparsity in a card is counted when the card is made, and measurements are used only for the weight files that they
were made on.
"""

import io
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.safe_json import parse_json
from ..errors import CardError, one_line
from ..methods.table import ENTRY_POINTS, method_of
from ..saved.files import check_inside, saved_files, write_file
from ..saved.model import SavedModel
from ..structure.chosen import SEARCH_NAME, read_chosen
from .card_explained import EXPLAIN_NAMES, explained_in, warn_if_stale
from .card_merge import Existing, merge_cards
from .card_metadata import generated_metadata
from .card_text import render_card
from .record import RECORD_NAME, RunRecord, load_record, save_record
from .sparsity_json import FIGURES_NAME, Figures, count_figures

logger = logging.getLogger(__name__)

CARD_NAME = "README.md"

LAYERS_NAME = "assets/layers.png"

SCHEDULE_NAME = "assets/schedule.png"

UNITS_NAME = "assets/units.png"

SEARCH_PLOT_NAME = "assets/search.png"

# The plots of a card, which may have some of them.
PLOTS = frozenset({LAYERS_NAME, SCHEDULE_NAME, SEARCH_PLOT_NAME, UNITS_NAME})


def make_files(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    on_hub: Existing | None = None,
    pushed: str | None = None,
    packed_bytes: int | None = None,
) -> dict[str, bytes]:
    """The card of a saved model and its other files, path -> content; nothing is written.

    It has a summary of `explain/explanation.json` if that explains the weights that are in the folder now.

    `repo_id` is the repository that the usage in the card names; `on_hub` is the card that is there, `pushed` the one
    that was last pushed there from here. What people wrote into the card on the Hub or in the folder is kept.
    `packed_bytes` is the size of the packed weights that are pushed beside these.

    Raises ReportError, RecordError, StaleRecordError, CardError, and PruningStateError for a broken file of ours.
    """
    from .plots import plot_layers, plot_schedule, plot_search, plot_units  # matplotlib is loaded when a card is made

    saved = SavedModel.of(folder)
    check_inside(saved.folder, (RECORD_NAME, CARD_NAME, FIGURES_NAME, SEARCH_NAME, *PLOTS, *EXPLAIN_NAMES))
    record = load_record(saved)
    figures = count_figures(saved, record)
    if repo_id is not None:
        figures = figures.model_copy(update={"model": repo_id.rsplit("/", 1)[-1], "packed_bytes": packed_bytes})
    chosen = read_chosen(saved.folder) if figures.removed is not None else None
    known = record if record is not None else RunRecord(name=figures.model)
    _warn_of_unknown_methods(figures, known)
    warn_if_stale(saved)
    figures = figures.model_copy(update={"metadata": generated_metadata(figures, known)})
    card = merge_cards(
        render_card(figures, known, repo_id or _shown_path(saved.folder), chosen, explained_in(saved)),
        here=read_card(saved),
        on_hub=on_hub,
        pushed=pushed,
        chosen={key: figures.metadata[key] for key in known.chosen if key in figures.metadata},
    )
    files = {CARD_NAME: card.encode(), FIGURES_NAME: _as_json(figures)}
    if figures.removed is not None:
        image = io.BytesIO()
        plot_units(figures.removed, image)
        files[UNITS_NAME] = image.getvalue()
    if chosen is not None:
        image = io.BytesIO()
        plot_search(chosen, image)
        files[SEARCH_PLOT_NAME] = image.getvalue()
    if figures.prunable and not figures.only_smaller:
        image = io.BytesIO()
        shares = {tensor.saved_as or tensor.name: tensor.sparsity for tensor in figures.prunable}
        plot_layers(shares, image, "Zeros by tensor, counted in the saved files")
        files[LAYERS_NAME] = image.getvalue()
    if known.history:
        image = io.BytesIO()
        metric = known.evaluation.main_metric if known.evaluation is not None else None
        plot_schedule(known.history, image, "Sparsity while fine-tuning", metric)
        files[SCHEDULE_NAME] = image.getvalue()
    return files


def _warn_of_unknown_methods(figures: Figures, record: RunRecord) -> None:
    names = {
        config["method"]
        for config in figures.pruning
        if config["method"] != "keep" and method_of(config["method"], config.get("structure")) is None
    }
    for name in sorted(names - record.methods.keys()):
        logger.warning(
            "The method %r is not known here, and the record of the run does not describe it: the card has its name "
            "alone. Install the package that declares it in the entry-point group %s, and make the card again.",
            name,
            ENTRY_POINTS,
        )


def write_card(folder: str | os.PathLike, repo_id: str | None = None) -> Path:
    """Write the card of a saved model into its folder, with `sparsity.json` and `assets/`. Returns the card's path.

    What people wrote into an existing card is kept. Raises as `make_files` does, and then writes nothing.
    """
    write_files(folder, make_files(folder, repo_id))
    return Path(folder, CARD_NAME)


def write_files(folder: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Write the files of a card, path -> content, into a folder, and delete plots of an earlier card."""
    for name in PLOTS - files.keys():
        Path(folder, name).unlink(missing_ok=True)
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)


def forget_measurements(folder: str | os.PathLike) -> None:
    """Rewrite a folder's record for its present weights, without what was recorded of training and evaluation."""
    record = load_record(folder)
    if record is not None:
        save_record(
            folder,
            RunRecord(
                name=record.name,
                chosen=record.chosen,
                tags=record.tags,
                base_model=record.base_model,
                pruning=record.pruning,
                methods=record.methods,
                weights=SavedModel.of(folder).hashes,
            ),
        )


@contextmanager
def keep_card(folder: str | os.PathLike) -> Iterator[None]:
    """Keep a card with generated sections as it is, whatever writes into the folder: some models save a card."""
    path = Path(folder, CARD_NAME)
    before = path.read_bytes() if path.exists() else b""
    try:
        yield
    finally:
        if b"<!-- hf-prune: begin " in before:
            path.write_bytes(before)


@contextmanager
def keep_generation_config(folder: str | os.PathLike) -> Iterator[None]:
    """Keep generation_config.json as it is if the weights that are saved meanwhile are those that the folder has."""
    path = Path(folder, "generation_config.json")
    before = path.read_bytes() if path.exists() else None
    weights = saved_files(sorted(Path(folder).glob("model*.safetensors"))) if before is not None else {}
    yield
    if before is not None and saved_files([Path(folder, name) for name in weights]) == weights != {}:
        path.write_bytes(before)


def read_card(folder: str | os.PathLike) -> Existing | None:
    """The card in a folder, with the metadata that was generated for it; None if there is no card.

    Raises CardError if it cannot be read.
    """
    text = _read_text(Path(folder, CARD_NAME))
    figures = _read_text(Path(folder, FIGURES_NAME))
    return Existing(text, metadata_in(figures)) if text is not None else None


def metadata_in(figures: str | None) -> dict[str, Any]:
    """The generated metadata in the text of a `sparsity.json`; empty if there is none or it is not one of ours."""
    try:
        metadata = parse_json(figures or "{}").get("metadata")
    except (ValueError, AttributeError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig") if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        why = one_line(error)
        raise CardError(f"{path}: expected text in UTF-8, got a file that cannot be read: {why}") from error


def _shown_path(folder: Path) -> str:
    """The folder's path for the card: only its name, if the path would show more of the machine."""
    return folder.resolve().name if folder.is_absolute() or ".." in folder.parts else folder.as_posix()


def _as_json(figures: Figures) -> bytes:
    return (json.dumps(figures.model_dump(), indent=1, allow_nan=False) + "\n").encode()
