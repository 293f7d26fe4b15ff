"""The formats that models are exported to: what each needs, and how it is written, opened and run.

Each is one entry of `FORMATS`. The exporters are those of transformers (`transformers.exporters`) where it has one.
"""

import contextlib
import copy
import importlib.util
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ExportError, first_line, nearest, one_line
from ..structure.fields import MISFITS
from .formats import Batch, ExportFormat, Runtime, Work
from .gguf import open_gguf, write_gguf
from .litert import open_litert, write_litert
from .samples import is_encoder_decoder


def find_format(name: str, int8: bool = False) -> ExportFormat:
    """The format of a name. Raises ExportError for another one, and for packages that are not installed."""
    if name not in FORMATS:
        raise ExportError("--to", f"expected one of {', '.join(FORMATS)}, got {name!r}{nearest(name, FORMATS)}")
    entry = FORMATS[name]
    if int8 and entry.int8 is None:
        offered = ", ".join(other for other, one in FORMATS.items() if one.int8 is not None)
        raise ExportError("--int8", f"expected one of the formats {offered}, got {name}")
    missing = [one for one in (*entry.modules, *(entry.int8_modules if int8 else ())) if not _is_installed(one)]
    if missing:
        raise ExportError(
            "--to",
            f"{name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed; "
            f"pip install 'hf-prune[{entry.extra}]'",
        )
    return entry


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it would be in
        return False


# ---- Those of transformers ----


def _write_onnx(work: Work, folder: Path) -> None:
    from transformers.exporters import OnnxConfig, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if work.int8 else None
    _write(work, folder, "onnx", OnnxConfig(dynamic=True, quantizer=quantizer))


def _write_openvino(work: Work, folder: Path) -> None:
    from transformers.exporters import NNCFOpenVINOQuantizer, OpenVINOConfig

    quantizer = NNCFOpenVINOQuantizer(calibration_dataset=[dict(batch) for batch in work.batches])
    # Not stateful: what the prompt leaves in the cache is handed from one graph to the other.
    config = OpenVINOConfig(dynamic=True, stateful=False, quantizer=quantizer if work.int8 else None)
    _write(work, folder, "openvino", config)


def _write_executorch(work: Work, folder: Path) -> None:
    from transformers.exporters import ExecutorchConfig

    _write(work, folder, "executorch", ExecutorchConfig(dynamic=True))


def _write(work: Work, folder: Path, name: str, config: Any) -> None:
    """Export with transformers, and write what `ExportedModel.from_pretrained` reads."""
    from transformers.exporters import AutoHfExporter

    inputs: Any = _of_two(work.batches[0])
    with _silent():
        exporter = AutoHfExporter.from_config(config)
        try:
            if is_encoder_decoder(work.model):
                exported = _export_encoder_decoder(exporter, work.model, inputs, config)
            elif work.is_generative:
                exported = exporter.export_for_generation(work.model, inputs, config)
            else:
                exported = exporter.export(work.model, inputs, config)
            exported.save_pretrained(folder)
        except MISFITS as error:
            cause = error.__cause__ or error
            raise ExportError(f"{type(work.model).__name__} cannot be exported to {name}: {one_line(cause)}") from error


def _export_encoder_decoder(exporter: Any, model: PreTrainedModel, inputs: dict[str, torch.Tensor], config: Any) -> Any:
    """An encoder-decoder as three graphs: `encoder`, and `prefill` and `decode` of the decoder.

    `export_for_generation` gives the latter two. Both take `encoder_outputs`, which the former computes.
    """
    from transformers.exporters import ExportedModel

    start = inputs["decoder_input_ids"]
    read = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    # The decoder starts with two tokens: the length of a cache of one would be taken for a constant.
    decoder = exporter.export_for_generation(model, {**read, "decoder_input_ids": torch.cat([start, start], 1)}, config)
    encoder: Any = model.get_encoder()
    generation = copy.deepcopy(model.generation_config)
    generation.decoder_start_token_id = int(start[0, 0])
    graphs = {"encoder": exporter.export(encoder, read, config).components["model"], **decoder.components}
    return ExportedModel(graphs, decoder.export_format, config=model.config, generation_config=generation)


def _of_two(batch: Batch) -> dict[str, torch.Tensor]:
    """A batch of two samples: a size of one would be taken for a constant."""
    return {name: torch.cat([value, value])[:2] for name, value in batch.items()}


def _open_onnx(folder: Path) -> dict[str, Runtime]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return _open(folder, session_options=options)


def _open_openvino(folder: Path) -> dict[str, Runtime]:
    return _open(folder, config={"INFERENCE_NUM_THREADS": torch.get_num_threads()})


def _computed_by_openvino() -> str:
    """OpenVINO computes in bfloat16 where the processor has instructions for it."""
    core = importlib.import_module("openvino").Core()
    name = core.get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}.get(name, name)


def _open(folder: Path, **options: Any) -> dict[str, Runtime]:
    """Open what `_write` wrote, on the CPU."""
    from transformers.exporters import ExportedModel

    with _silent():
        try:
            opened = ExportedModel.from_pretrained(folder, device="cpu", **options)
        except (*MISFITS, MemoryError) as error:
            raise ExportError(f"the exported model does not open in its runtime: {first_line(error)}") from error
    return {name: _with_known_inputs(runner) for name, runner in opened.runners.items()}


def _with_known_inputs(runner: Any) -> Runtime:
    """A runner that takes all inputs, and passes on those that the graph has."""

    def run(**inputs: Any) -> Any:
        return runner(**{name: value for name, value in inputs.items() if name in runner.metadata.kwargs})

    return run


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep exporters from printing their steps and warnings of versions; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


FORMATS: dict[str, ExportFormat] = {
    "onnx": ExportFormat(
        "ONNX Runtime",
        extra="onnx",
        modules=("transformers.exporters.base", "onnx", "onnxscript", "onnxruntime"),
        write=_write_onnx,
        open=_open_onnx,
        translates=True,
        int8="dynamic quantization: weights per channel, activations when they are computed",
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
    "openvino": ExportFormat(
        "OpenVINO",
        extra="openvino",
        modules=("transformers.exporters.base", "openvino"),
        write=_write_openvino,
        open=_open_openvino,
        # Not encoder-decoders: OpenVINO 2026.4 ended the process where a tiny T5, in int8 as well, was compared.
        int8="weights and activations, calibrated by NNCF on the samples",
        int8_modules=("nncf",),
        packages=("openvino", "nncf"),
        computes_in=_computed_by_openvino,
    ),
    "executorch": ExportFormat(
        "ExecuTorch (XNNPACK)",
        extra="executorch",
        modules=("transformers.exporters.base", "executorch"),
        packages=("executorch",),
        write=_write_executorch,
        open=_open,
    ),
    "litert": ExportFormat(
        "LiteRT",
        extra="litert",
        modules=("litert_torch", "ai_edge_litert"),
        packages=("litert-torch", "ai-edge-litert"),
        write=write_litert,
        open=open_litert,
        generates=False,
    ),
    "gguf": ExportFormat(
        "transformers, from GGUF",
        extra="gguf",
        modules=("gguf",),
        packages=("gguf",),
        write=write_gguf,
        open=open_gguf,
        model_types=("llama",),
        int8="Q8_0: blocks of 32 weights with a scale each",
    ),
}
