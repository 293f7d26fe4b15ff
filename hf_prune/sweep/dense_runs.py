"""The dense runs of a sweep: trained once for all points whose settings leave them as they are."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..config.safe_json import read_object
from ..recipe.dense_run import DenseRun, train_dense, write_dense_record
from ..recipe.outcome import Say
from ..recipe.prepare import Examples, prepare
from ..recipe.reports import close_reports
from ..recipe.schema import Recipe
from ..saved.files import write_file
from ..saved.model import SavedModel
from .plan import named

_NAME = "dense_run.json"

# What the dense run leaves out of the training arguments, or what changes no weight.
_NOT_OF_DENSE = ("run_name", "push_to_hub", "hub_token", "hub_model_id", "hub_private_repo", "hub_revision")


def dense_key(recipe: Recipe) -> str:
    """A digest of all that the dense run of a recipe depends on: equal for recipes with the same dense model."""
    training = {
        name: value for name, value in (recipe.training | (recipe.dense or {})).items() if name not in _NOT_OF_DENSE
    }
    content = {
        **recipe.model_dump(include={"task", "dataset", "generation", "metrics"}),
        "model": recipe.model.model_dump(exclude={"vocabulary"}),  # tokens are removed after the dense run
        "training": training,
        "at_once": recipe.calibration is not None,  # then the model is evaluated before it is trained, too
        "trains_on": recipe.trains_on,  # or the dense run has epochs of its own
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def dense_folder(output: Path, recipe: Recipe) -> Path:
    """The folder of a recipe's dense model in that of a sweep."""
    return output / f"dense-{dense_key(recipe)[:8]}" / "dense"


def find_dense(output: Path, recipe: Recipe) -> DenseRun | None:
    """The dense run of a recipe that a sweep's folder has, finished and unchanged; None if there is none."""
    folder = dense_folder(output, recipe)
    content = read_object(folder.parent / _NAME)
    if content.get("key") != dense_key(recipe) or not folder.is_dir():
        return None
    weights = {name: dataclasses.asdict(file) for name, file in SavedModel(folder).hashes.items()}
    if content.get("weights") != weights:
        return None
    fields = {field.name: content[field.name] for field in dataclasses.fields(DenseRun) if field.name != "folder"}
    return DenseRun(folder=folder, **fields)


def make_dense(output: Path, recipe: Recipe, examples: Examples, say: Say, run_name: str | None = None) -> DenseRun:
    """Train the dense model of a recipe, and save it with its record and card in the folder of a sweep.

    Where it reports to, it is called as that folder, after `run_name`, if there is one: it is no run of one point. What
    an unfinished run has left there is removed.
    """
    folder = dense_folder(output, recipe)
    shutil.rmtree(folder.parent, ignore_errors=True)
    changes = {"output_dir": str(folder.parent), "training": {**recipe.training, "run_name": run_name}}
    recipe = named(recipe.model_copy(update=changes), folder.parent.name)
    prepared = prepare(recipe, examples)
    folder.parent.mkdir(parents=True)
    run, trainer = train_dense(prepared, say, validate=True)
    saved = SavedModel(folder)
    write_dense_record(saved, prepared, trainer, run, say)
    close_reports(trainer)
    content: dict[str, Any] = {
        "key": dense_key(recipe),
        "weights": {name: dataclasses.asdict(file) for name, file in saved.hashes.items()},
        **{field.name: getattr(run, field.name) for field in dataclasses.fields(run) if field.name != "folder"},
    }
    write_file(folder.parent / _NAME, (json.dumps(content, indent=1) + "\n").encode())
    return run
