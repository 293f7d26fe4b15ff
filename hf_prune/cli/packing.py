"""The commands that pack a model and unpack it: `hf-prune pack` and `hf-prune unpack`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .messages import errors_as_lines, quiet
from .tables import console, make_table

if TYPE_CHECKING:
    from ..publish.packing import PackedModel

Output = Annotated[Path, typer.Argument(help="The folder to write; new or empty.")]


def pack_command(
    model: Annotated[str, typer.Argument(help="A folder with a saved model, package:NAME/PATH, or a name on the Hub.")],
    output: Output,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16: round float32 weights first (default: the weights as they are).")
    ] = None,
    embeddings: Annotated[
        str | None,
        typer.Option(help="int8 or int4: round embeddings first, with a scale for each row (default: as they are)."),
    ] = None,
) -> None:
    """Write a model with packed weights: smaller, lossless.

    The folder opens with from_pretrained after `import hf_prune`, and can be pushed. Bytes are printed beside the
    entropy of mask and values, as far as their first 16 bits are known: about what a code of single weights can reach.
    """
    with errors_as_lines():
        quiet()
        from ..packed.bound import entropy_bytes
        from ..publish.packing import save_packed

        packed = save_packed(model, output, dtype, embeddings)
        # The bound is one of single weights, and those of a row share its scale.
        bounds = [entropy_bytes(packed.folder / file.name) for file in packed.files] if embeddings is None else None
    _print_sizes(packed, bounds)
    for what, kind in (("Float32 weights", dtype), ("Embeddings", embeddings)):
        if kind is not None:
            console.print(f"{what} were rounded to {kind}: the model that opens is not the one that was packed.")


def unpack_command(
    packed: Annotated[str, typer.Argument(help="A folder with a packed model, or a model name on the Hub.")],
    output: Output,
) -> None:
    """Write the dense model of a packed one.

    Its files are those that were packed, bit for bit.
    """
    with errors_as_lines():
        quiet()
        from ..publish.packing import unpack

        unpacked = unpack(packed, output)
    _print_sizes(unpacked, None)


def _print_sizes(model: "PackedModel", bounds: list[int] | None) -> None:
    """Print the bytes of each weight file, dense and packed, and of all."""
    columns = ("dense bytes", "packed bytes", "ratio", *(["entropy bound"] if bounds is not None else []))
    table = make_table("", "file", *columns)
    rows = [(file.name, file.dense, file.packed) for file in model.files]
    if len(rows) > 1:
        rows.append(("all", model.dense_bytes, model.packed_bytes))
        bounds = [*bounds, sum(bounds)] if bounds is not None else None
    for place, (name, dense, packed) in enumerate(rows):
        bound = [f"{bounds[place]:,}"] if bounds is not None else []
        table.add_row(name, f"{dense:,}", f"{packed:,}", f"{dense / packed:.2f}", *bound)
    console.print(table)
    console.print(str(model.folder), soft_wrap=True)
