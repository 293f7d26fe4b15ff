"""The command that exports a model to another runtime: `hf-prune export`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ExportError
from .messages import errors_as_lines, quiet
from .print_export import print_export
from .tables import print_line

if TYPE_CHECKING:
    from ..runtimes.export import Texts


def export_command(
    model: Annotated[str, typer.Argument(help="A folder with a saved model, package:NAME/PATH, or a name on the Hub.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    to: Annotated[str, typer.Option(help="onnx, openvino, litert, executorch or gguf.")],
    int8: Annotated[bool, typer.Option("--int8", help="Quantise to int8 as well (onnx, openvino, gguf).")] = False,
    data: Annotated[
        str | None,
        typer.Option(
            help="Texts to compare outputs with: a data set on the Hub, a folder or file, or package:NAME/PATH."
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="The dense model to compare with (default: a new one of the original sizes).")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="How many of the texts (default 64).")] = None,
    length: Annotated[int, typer.Option(help="The most tokens of a text.")] = 128,
    data_config: Annotated[str | None, typer.Option(help="Configuration of a data set on the Hub.")] = None,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    label_column: Annotated[str | None, typer.Option(help="Column of the classes, to measure accuracy.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="Only the rows with this value.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Export a model to another runtime.

    The exported model is opened there, its outputs are compared with those of PyTorch, and its latency is measured in
    turns with this model and a dense one. The folder has the exported model, its tokenizer, export_report.json, and a
    README.md with what was measured.
    """
    with errors_as_lines():
        from ..runtimes.exporters import find_format

        find_format(to, int8)
        for name, least, value in (("--samples", 1, samples), ("--length", 2, length)):
            if value is not None and value < least:
                raise ExportError(name, f"expected {least} or more, got {value}")
        for name, given in (("--label-column", label_column), ("--samples", samples)):
            if given is not None and data is None:
                raise ExportError(name, "must not be set without --data")
        quiet(data=True)
        from ..runtimes.export import export_model

        texts = None
        if data is not None:
            texts = _texts(data, data_config, split, text_column, label_column, where or [], samples or 64)
        say = print_line if not as_json else lambda _: None
        report = export_model(model, output, to, int8, texts, dense, length, say)
    if as_json:
        print(json.dumps(report.to_dict()))
    else:
        print_export(report, output)


def _texts(
    data: str,
    config: str | None,
    split: str,
    text_column: str,
    label_column: str | None,
    where: list[str],
    samples: int,
) -> "Texts":
    """Some of the texts that the options name, drawn with a fixed seed: data may be sorted by class."""
    from ..recipe.data import load_rows
    from ..recipe.loading import parse_rows
    from ..recipe.schema import DatasetSection
    from ..runtimes.export import Texts

    rows_where = parse_rows(where)
    section = DatasetSection(name=data, config=config, train_split=split, text_column=text_column, where=rows_where)
    columns = {"text_column": text_column, **({"label_column": label_column} if label_column is not None else {})}
    rows = load_rows(section, columns).shuffle(seed=0)
    rows = rows.select(range(min(samples, len(rows))))
    labels = list(rows[label_column]) if label_column is not None else None
    name = Path(data).name if Path(data).exists() else data
    return Texts(list(rows[text_column]), f"texts of {name}, {split} split", labels)
