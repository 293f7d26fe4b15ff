"""Export to LiteRT (TensorFlow Lite) with litert-torch: `model.tflite` for one sample of one length."""

import contextlib
import io
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..config.safe_json import read_json
from ..errors import ExportError, one_line
from ..structure.fields import MISFITS
from .formats import Runtime, Work
from .passes import main_output

_MODEL, _INPUTS = "model.tflite", "litert_inputs.json"


class _Alone(nn.Module):
    """A model whose inputs are given in an order, and whose main output is the only one."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return main_output(self.model(**dict(zip(self.names, values, strict=True))))


def write_litert(work: Work, folder: Path) -> None:
    """Write `model.tflite` for one sample of the longest length of the batches, and the names of its inputs.

    Inputs of whole numbers have 32 bits.
    """
    import litert_torch

    names = list(work.batches[0])
    longest = {name: max((batch[name] for batch in work.batches), key=lambda value: value.shape[-1]) for name in names}
    values = tuple(_of_32_bits(longest[name][:1]) for name in names)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            litert_torch.convert(_Alone(work.model, names).eval(), values).export(str(folder / _MODEL))
        except MISFITS as error:
            raise ExportError(f"{type(work.model).__name__} cannot be exported to litert: {one_line(error)}") from error
    padding = {"input_ids": work.model.config.pad_token_id or 0}
    inputs = [{"name": name, "padding": padding.get(name, 0)} for name in names]
    (folder / _INPUTS).write_text(json.dumps(inputs, indent=1) + "\n", encoding="utf-8")


def _of_32_bits(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.is_floating_point() else values.int()


def open_litert(folder: Path) -> dict[str, Runtime]:
    """The model in LiteRT's interpreter. Samples run one by one; shorter texts are padded on the right."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(folder / _MODEL), num_threads=torch.get_num_threads())
    interpreter.allocate_tensors()
    inputs = read_json(folder / _INPUTS)
    details = sorted(interpreter.get_input_details(), key=lambda one: int(one["name"].rpartition("_")[2].split(":")[0]))
    (output,) = interpreter.get_output_details()

    def run(**batch: torch.Tensor) -> tuple[torch.Tensor]:
        found = []
        lengths = {value.shape[-1] for value in batch.values()}
        for index in range(len(next(iter(batch.values())))):
            for one, place in zip(inputs, details, strict=True):
                value = _of_32_bits(batch[one["name"]][index : index + 1])
                missing = int(place["shape"][-1]) - value.shape[-1]
                interpreter.set_tensor(place["index"], F.pad(value, (0, missing), value=one["padding"]).numpy())
            interpreter.invoke()
            found.append(torch.tensor(interpreter.get_tensor(output["index"])))
        return (_without_padding(torch.cat(found), int(details[0]["shape"][-1]), min(lengths)),)

    return {"model": run}


def _without_padding(outputs: torch.Tensor, length: int, wanted: int) -> torch.Tensor:
    """Outputs of each token, without those of the padding; outputs of a whole sample as they are."""
    return outputs[:, :wanted] if outputs.ndim > 2 and outputs.shape[1] == length else outputs
