"""The command `hf-prune explain`: what pruning took from a saved model, and what it changed."""

import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExplainError, RecipeError, one_line
from .messages import errors_as_lines, quiet
from .one_shot import DataConfig, Device, Dtype, TextColumn, Where
from .print_explain import print_explanation


def explain_command(
    model: Annotated[Path, typer.Argument(help="A folder with a saved model.")],
    data: Annotated[str, typer.Option(help="A data set on the Hub, a folder or file, or package:NAME/PATH.")],
    dense: Annotated[
        str | None,
        typer.Option(
            help="The dense model: a folder or a name on the Hub (default: the run's, if its record has one)."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data set (default: test, or the only one; train with --test-size).")
    ] = None,
    test_size: Annotated[
        int | None, typer.Option(help="Instead: rows to hold out of the split, as a recipe's test_size.")
    ] = None,
    validation_size: Annotated[
        int | None, typer.Option(help="Further rows that were held out, as a recipe's validation_size.")
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Seed of what is held out.")] = 0,
    text_column: TextColumn = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels of a classifier.")] = "label",
    where: Where = None,
    data_config: DataConfig = None,
    slices: Annotated[
        list[str] | None,
        typer.Option("--slice", metavar="COLUMN", help="A column whose values are compared."),
    ] = None,
    expressions: Annotated[
        list[str] | None,
        typer.Option("--expression", metavar="NAME=REGEX", help="What texts of a slice have; negations is built in."),
    ] = None,
    training_data: Annotated[
        str | None, typer.Option(help="A data set of the training rows, for the gap between training and test.")
    ] = None,
    training_split: Annotated[
        str | None, typer.Option(help="Split of the training rows; with --test-size they are the other rows.")
    ] = None,
    training_samples: Annotated[int, typer.Option(help="Training rows that the gap is measured on, at most.")] = 1000,
    samples: Annotated[
        int | None, typer.Option(help="Rows to use at most, drawn with the seed (default: all).")
    ] = None,
    max_length: Annotated[int, typer.Option(help="Tokens at which texts are cut.")] = 128,
    show_texts: Annotated[
        bool, typer.Option("--show-texts", help="Allow texts of the data in what is written.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Samples that pass through a model together.")] = 32,
    resamples: Annotated[int, typer.Option(help="Resamples of the bootstrap, 100 or more.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap and of what is drawn.")] = 0,
    without_perturbations: Annotated[
        bool, typer.Option("--without-perturbations", help="Do not ask classifiers about changed texts; much faster.")
    ] = False,
    without_costs: Annotated[bool, typer.Option("--without-costs", help="Measure neither time nor energy.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder to write explain/ into (default: the model's folder).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explain what pruning took and what it changed.

    Compares a pruned classifier or language model with the dense one on evaluation data: answers, slices, calibration,
    hidden states, sizes and costs, with intervals. Writes explain/ into the model's folder.
    """
    with errors_as_lines():
        if not model.is_dir():
            raise ExplainError(f"{model}: expected a folder with a saved model, found nothing")
        _check_output(output if output is not None else model)
        quiet(data=True)
        from ..explain.writing import write_explanation
        from ..publish.record import dense_beside, load_record
        from ..recipe.explain_data import errors_of_options, parse_explained, read_data, section_of
        from ..recipe.explaining import explain_saved
        from ..recipe.loading import parse_rows
        from ..recipe.models import check_computing

        check_computing(dtype, device)
        explained = parse_explained(
            samples=samples,
            slices=slices or [],
            expressions=expressions or [],
            show_texts=show_texts,
            training_samples=training_samples,
            batch_size=batch_size,
            resamples=resamples,
            seed=seed,
            perturbations=not without_perturbations,
            costs=not without_costs,
        )
        if validation_size is not None and test_size is None:
            raise RecipeError("--validation-size", f"must not be set without --test-size, got {validation_size}")
        if test_size is not None and (training_data is not None or training_split is not None):
            raise RecipeError("--training-data", "must not be set with --test-size: the training rows are the others")
        with errors_of_options():
            section, training = section_of(
                data,
                config=data_config,
                where=parse_rows(where or []),
                text_column=text_column,
                label_column=label_column,
                split=split,
                test_size=test_size,
                validation_size=validation_size,
                split_seed=split_seed,
                max_length=max_length,
                training_data=training_data,
                training_split=training_split,
            )
            explanation = explain_saved(
                model,
                partial(read_data, section, explained, training=training, with_training=test_size is not None),
                explained,
                dense if dense is not None else dense_beside(model, load_record(model)),
                dtype=dtype,
                device=device,
            )
        files = write_explanation(output if output is not None else model, explanation)
    if as_json:
        print(explanation.model_dump_json())
    else:
        print_explanation(explanation, files)


def _check_output(folder: Path) -> None:
    """Raise ExplainError for what is no folder, and where no folder can be made or written into."""
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ExplainError("--output", f"expected a folder to write into, found a file at {str(nearest)!r}")
    why = None if os.access(nearest, os.W_OK | os.X_OK) else "permission denied"
    if why is None and nearest != folder.absolute():  # a folder must be made, which file systems may forbid, too
        try:
            Path(tempfile.mkdtemp(dir=nearest)).rmdir()
        except OSError as error:
            why = one_line(error)
    if why is not None:
        raise ExplainError("--output", f"expected a folder to write into, {str(nearest)!r} is not writable: {why}")
