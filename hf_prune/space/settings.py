"""What a page shows: the task of a saved model, its dense model, and examples."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..config.safe_json import read_json
from ..errors import ReportError, SpaceError, one_line
from ..model.per_layer import needs_import
from ..publish.hub_errors import HUB_ERRORS, explain_error
from ..publish.markdown import cleaned, single_line
from ..publish.record import RunRecord, dense_beside, load_record
from ..publish.sources import is_hub_name
from ..publish.tasks import task_of
from ..saved.files import TOKENIZER_NAMES, name_of
from ..saved.model import SavedModel
from .app import TASKS, Settings

_EXAMPLES = {
    "text-classification": [
        "A film that stays with you.",
        "The service was slow, and the food was cold.",
        "It arrived on time and does what it says.",
    ],
    "text-generation": [
        "The best thing about this film is",
        "On the way to the station, we",
        "To bake a simple bread, you need",
    ],
    "summarization": [
        "The town library opens a new wing this week. It has room for forty thousand books and a hall for readings. "
        "The building took three years, one more than planned, because the ground was softer than expected. "
        "On Saturday, visitors can see all rooms, and there is music in the evening.",
    ],
}

_NEW_TOKENS = 40

_SUPPORTED = ", ".join(TASKS)


@dataclass(frozen=True)
class Dense:
    """The dense model of a page: its name on the Hub or its folder, and its revision, or None.

    `words` say on the page what it is. `why_not` are the reasons, for who makes the page, why recorded models are not
    shown.
    """

    name: str | None
    revision: str | None
    words: str
    why_not: tuple[str, ...] = ()


@dataclass(frozen=True)
class _About:
    """What is known of a model without its weights: its config.json, and the names of its files."""

    config: dict[str, Any]
    files: frozenset[str]

    @property
    def task(self) -> str | None:
        names = self.config.get("architectures")
        return task_of(names[0]) if isinstance(names, list) and names and isinstance(names[0], str) else None

    @property
    def labels(self) -> int:
        """The number of labels; transformers writes none for its default of two."""
        labels, number = self.config.get("id2label"), self.config.get("num_labels")
        return len(labels) if isinstance(labels, dict) and labels else number if isinstance(number, int) else 2

    @property
    def has_tokenizer(self) -> bool:
        return bool(self.files & {*TOKENIZER_NAMES})


def make_settings(
    folder: SavedModel, name: str, dense: Dense, examples: Sequence[str], revision: str | None = None
) -> Settings:
    """The settings of a page for a saved model, which the page opens by a name and a revision."""
    task = task_for(folder)
    packed_or_own_widths = folder.dense_bytes is not None or (
        folder.skeleton is not None and needs_import(folder.skeleton.config)
    )
    called = _called(name)
    shown = called.rpartition("/")[2]
    return Settings(
        title=cleaned(f"{shown} and its dense model" if dense.name is not None else shown),
        task=task,
        pruned=name,
        pruned_name=called,
        pruned_revision=revision,
        dense=dense.name,
        dense_name=_called(dense.name) if dense.name is not None else None,
        dense_revision=dense.revision,
        dense_is=dense.words,
        examples=list(examples) or _EXAMPLES[task],
        new_tokens=_NEW_TOKENS,
        imports=["hf_prune"] if packed_or_own_widths else [],
    )


def _called(name: str) -> str:
    """What a page calls a model: its name on the Hub, or for a folder, the name of its run, and no path."""
    if not os.path.isabs(name):
        return name
    record = load_record(name)
    return single_line(record.name if record is not None else name_of(Path(name)))


# ---- The task ----


def task_for(folder: SavedModel) -> str:
    """The task that a page shows a saved model in.

    Raises SpaceError for other tasks, which it names, and for a model that a page cannot open.
    """
    folder.check_whole()
    about, task = _about_folder(folder.folder), task_of(folder.architecture)
    if task == "text2text-generation" and "summarization" in _tasks_said(folder):
        task = "summarization"
    if task not in TASKS:
        what = f"{task} ({folder.architecture})" if task is not None else folder.architecture or "one of unknown class"
        hint = (
            " If it writes summaries, say so in the first lines of its README.md: pipeline_tag: summarization."
            if task == "text2text-generation"
            else ""
        )
        raise SpaceError(f"{folder.folder}: expected a model for {_SUPPORTED}, got {what}.{hint}")
    if not about.has_tokenizer:
        raise SpaceError(f"{folder.folder}: expected a tokenizer beside the model, found none; save it there")
    several = about.config.get("problem_type") == "multi_label_classification"
    if task == "text-classification" and (several or about.labels < 2):
        what = "several labels for a text" if several else "a number for a text"
        raise SpaceError(f"{folder.folder}: expected a model that gives one label of several, got {what}")
    return task


def _tasks_said(folder: SavedModel) -> set[str | None]:
    """The tasks that the record of the run and the card say."""
    record = load_record(folder) or RunRecord(name="")
    card = folder.folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    in_card = re.search(r"^pipeline_tag:\s*([\w-]+)\s*$", text, flags=re.MULTILINE)
    return {(record.recipe or {}).get("task"), record.chosen.get("pipeline_tag"), in_card[1] if in_card else None}


# ---- The dense model ----


def find_dense(folder: SavedModel, wanted: str | None, api: HfApi, is_local: bool = False) -> Dense:
    """The dense model of a page: the wanted one, or else that of the run, or the teacher or base model of the record.

    Args:
        folder: the pruned model.
        wanted: a name on the Hub; a folder, too, if the page `is_local`, of this machine alone.
        api: the Hub's client, which reads the dense model's configuration and nothing else.
        is_local: whether the page may open folders; else the models are those on the Hub.

    Raises SpaceError if the wanted model cannot be shown beside the pruned one. A recorded one that cannot be shown is
    left out, and `why_not` says why.
    """
    if wanted is not None:
        return _wanted_dense(folder, wanted, api, is_local)
    why_not = []
    record = load_record(folder)
    beside = dense_beside(folder.folder, record)
    if beside is not None:
        problem = _why_unfit(_about_folder(beside), folder)
        if problem is None and is_local:
            return Dense(str(beside), None, "The dense model is the one that the same run trained.")
        push = f"hf-prune push {os.path.relpath(beside)} USER/DENSE"
        why_not.append(f"the dense model of its run {problem or f'is not on the Hub ({push} sends it there)'}")
    for source, role in _recorded(record):
        if source.hub_name is None:
            why_not.append(f"{role}, {single_line(source.name)}, is not known to be on the Hub")
            continue
        about = _about_on_hub(api, source.hub_name, source.revision)
        problem = about if isinstance(about, str) else _why_unfit(about, folder)
        if problem is None:
            return Dense(source.hub_name, source.revision, f"The dense model is {role}.")
        why_not.append(f"{role}, {source.hub_name}, {problem}")
    return Dense(None, None, "The pruned model is shown alone: no dense model is named for it.", tuple(why_not))


def _recorded(record: RunRecord | None) -> list[tuple[Any, str]]:
    distillation = record.distillation if record is not None else None
    found = [(distillation.teacher if distillation is not None else None, "the teacher that it was distilled from")]
    found += [(record.base_model if record is not None else None, "the model that it was made from")]
    return [(source, role) for source, role in found if source is not None]


def _wanted_dense(folder: SavedModel, wanted: str, api: HfApi, is_local: bool) -> Dense:
    path = Path(wanted)
    if path.is_dir() and not is_local:
        raise SpaceError(
            "--dense",
            f"expected the name of a model on the Hub, got the folder {wanted}, which a Space cannot read. Push it: "
            f"hf-prune push {wanted} USER/DENSE, and give --dense USER/DENSE",
        )
    if path.is_dir():
        about: _About | str = _about_folder(path)
    elif is_hub_name(wanted):
        about = _about_on_hub(api, wanted, None)
    else:
        raise SpaceError("--dense", f"expected the name of a model on the Hub, got {wanted!r}")
    problem = about if isinstance(about, str) else _why_unfit(about, folder)
    if problem is not None:
        raise SpaceError("--dense", f"{wanted} {problem}")
    name = str(path.resolve()) if path.is_dir() else wanted
    return Dense(name, None, "Both models answer the same text.")


def _why_unfit(dense: _About, folder: SavedModel) -> str | None:
    """Why a model cannot be shown beside the pruned one, or None."""
    pruned = _about_folder(folder.folder)
    if dense.task != pruned.task:
        return f"is a model for {dense.task or 'an unknown task'}, and the pruned one for {pruned.task}"
    if pruned.task == "text-classification" and dense.labels != pruned.labels:
        return f"has {dense.labels} labels, and the pruned model {pruned.labels}"
    return None if dense.has_tokenizer else "has no tokenizer"


def _about_folder(folder: Path) -> _About:
    try:
        config = read_json(folder / "config.json", finite=False)
    except (OSError, ValueError) as error:
        raise ReportError(f"{folder}: expected a folder with a saved model: {one_line(error)}") from error
    return _About(_mapping(config), frozenset(path.name for path in folder.iterdir()))


def _about_on_hub(api: HfApi, name: str, revision: str | None) -> _About | str:
    """A model on the Hub, or why its configuration cannot be read."""
    try:
        files = frozenset(api.list_repo_files(name, revision=revision))
        config = read_json(Path(api.hf_hub_download(name, "config.json", revision=revision)), finite=False)
    except HUB_ERRORS as error:
        return f"cannot be read on the Hub: {explain_error(error)}"
    return _About(_mapping(config), files)


def _mapping(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else {}
