"""Model cards on disk: a saved model's folder -> README.md, sparsity.json and plots.

Nothing in a card is remembered: sparsity is counted when the card is made, and what was measured counts only for the
files that it was measured on.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from .card_merge import CardError
from .card_text import make_card
from .figures import FIGURES_NAME, Figures, count_figures
from .messages import one_line
from .plots import plot_layers, plot_schedule
from .record import Evaluation, RunRecord, load_record, save_record, saved_files
from .report import weight_files

CARD_NAME = "README.md"
ASSETS_FOLDER = "assets"
LAYERS_NAME = f"{ASSETS_FOLDER}/layers.png"
SCHEDULE_NAME = f"{ASSETS_FOLDER}/schedule.png"


def make_files(
    folder: str | os.PathLike, repo_id: str | None = None, existing: Sequence[str] | None = None
) -> dict[str, bytes]:
    """The card of a saved model and what belongs to it, path -> content; nothing is written.

    `repo_id` is where the model is going to be, for the usage in the card. `existing` are cards whose texts are kept:
    by default the folder's own. Raises ReportError, RecordError and CardError.
    """
    folder = Path(folder)
    record = load_record(folder)
    figures = count_figures(folder, record)
    if existing is None:
        existing = read_card(folder)
    if repo_id is not None:
        figures = figures.model_copy(update={"model": repo_id.rsplit("/", 1)[-1]})
    card = make_card(figures, record, repo_id or _shown_path(folder), existing)
    files = {CARD_NAME: card.encode(), FIGURES_NAME: _as_json(figures)}
    if figures.prunable:
        image = io.BytesIO()
        shares = {tensor.name: tensor.sparsity for tensor in figures.prunable}
        plot_layers(shares, image, "Zeros by tensor, counted in the saved files")
        files[LAYERS_NAME] = image.getvalue()
    if record is not None and record.history:
        image = io.BytesIO()
        metric = record.evaluation.main_metric if record.evaluation is not None else None
        plot_schedule(record.history, image, "Sparsity while fine-tuning", metric)
        files[SCHEDULE_NAME] = image.getvalue()
    return files


def write_card(folder: str | os.PathLike, repo_id: str | None = None) -> Path:
    """Make the card of a saved model and write it into its folder, with `sparsity.json` and `assets/`; the card's path.

    What a person wrote into a card that is there is kept. Raises as `make_files` does, and writes nothing then.
    """
    write_files(folder, make_files(folder, repo_id))
    return Path(folder, CARD_NAME)


def write_files(folder: str | os.PathLike, files: Mapping[str, bytes]) -> None:
    """Write the files of a card, path -> content, into a folder; pictures of an earlier card go."""
    for name in {LAYERS_NAME, SCHEDULE_NAME} - files.keys():
        Path(folder, name).unlink(missing_ok=True)
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def forget_measurements(folder: str | os.PathLike) -> None:
    """Make the record of a folder one of the weights that are there now: what was measured and trained goes."""
    record = load_record(folder)
    if record is not None:
        _forget_datasets(Path(folder), record.evaluation)
        files = saved_files(weight_files(Path(folder)))
        save_record(
            folder,
            RunRecord(
                name=record.name,
                chosen=record.chosen,
                tags=record.tags,
                base_model=record.base_model,
                pruning=record.pruning,
                weights=files,
            ),
        )


def _forget_datasets(folder: Path, evaluation: Evaluation | None) -> None:
    """Take the data set of an evaluation out of the card's metadata: it would stay as if a person had added it."""
    if evaluation is None or evaluation.dataset is None:
        return
    for text in read_card(folder):
        card = ModelCard(text, ignore_metadata_errors=True)
        if card.data.get("datasets") == [evaluation.dataset.hub_name]:
            card.data.pop("datasets")
            card.save(folder / CARD_NAME)


def read_card(folder: str | os.PathLike) -> list[str]:
    """The card in a folder, in a list, or an empty list if there is none. Raises CardError if it cannot be read."""
    path = Path(folder, CARD_NAME)
    try:
        return [path.read_text(encoding="utf-8-sig")] if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise CardError(
            f"{path}: expected a card in UTF-8, got a file that cannot be read: {one_line(error)}"
        ) from error


def _shown_path(folder: Path) -> str:
    """How the folder is named where the card is made, without where on the machine that is."""
    return folder.resolve().name if folder.is_absolute() or ".." in folder.parts else folder.as_posix()


def _as_json(figures: Figures) -> bytes:
    return (json.dumps(figures.model_dump(), indent=1, allow_nan=False) + "\n").encode()
