"""The README.md of an exported model: what was measured, as a table, and how it is opened."""

from ..publish.markdown import code, fence, inline
from .export_report import ExportReport, Row

_OPENED = {
    "gguf": "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER", gguf_file="model.gguf")',
    "litert": 'from ai_edge_litert.interpreter import Interpreter\n\nmodel = Interpreter("FOLDER/model.tflite")',
}
_OF_TRANSFORMERS = (
    "from transformers.exporters import ExportedModel\n\n"
    'model = ExportedModel.from_pretrained("FOLDER", device="cpu")\noutputs = model(**inputs)'
)
_OF_GENERATION = (
    "from transformers.exporters import ExportedModel\n\n"
    'model = ExportedModel.from_pretrained("FOLDER", device="cpu")\n'
    'prefill, decode = model.runners["prefill"], model.runners["decode"]'
)


_OF_TRANSLATION = """import torch
from transformers import AutoTokenizer
from transformers.exporters import ExportedModel

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = ExportedModel.from_pretrained("FOLDER", device="cpu")
encoder, prefill, decode = (model.runners[name] for name in ("encoder", "prefill", "decode"))

inputs = tokenizer(texts, padding=True, return_tensors="pt")
encoded = encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
given = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
start = torch.full((len(texts), 1), model.generation_config.decoder_start_token_id)
found = prefill(decoder_input_ids=start, **given)
tokens = [found.logits[:, -1:].argmax(-1)]  # the most likely token
while len(tokens) < 20:
    found = decode(decoder_input_ids=tokens[-1], past_key_values=found.past_key_values, **given)
    tokens.append(found.logits[:, -1:].argmax(-1))
print(tokenizer.batch_decode(torch.cat(tokens, dim=1)))"""


def render(report: ExportReport) -> str:
    """The text of the card."""
    metadata = ["---", "tags:", "- hf-prune", f"- {report.to}", *(["- int8"] if report.int8 else []), "---"]
    of_stages = {"encoder": _OF_TRANSLATION, "prefill": _OF_GENERATION, "model": _OF_TRANSFORMERS}
    opened = _OPENED.get(report.to, of_stages[report.stages[0]])
    precision = f" in int8 ({report.int8})" if report.int8 else ""
    return "\n".join(
        [
            *metadata,
            "",
            f"# {inline(report.name)}, exported to {report.to}",
            "",
            f"A pruned {code(report.model_class)}{precision}, exported by `hf-prune export`.",
            "",
            fence(opened, "python"),
            "",
            "## Measured",
            "",
            *_in_markdown(cells_of(report)),
            "",
            notes(report),
            "",
        ]
    )


def _in_markdown(cells: list[list[str]]) -> list[str]:
    """The lines of a table in Markdown; the first row has the names of the columns."""
    first, *others = (f"| {' | '.join(row)} |" for row in cells)
    return [first, f"|{'---|' * len(cells[0])}", *others]


def cells_of(report: ExportReport) -> list[list[str]]:
    """The cells of the table: the names of the columns, and a row for each model in each runtime."""
    sizes = list(report.rows[0].seconds)
    with_accuracy = any(row.accuracy is not None for row in report.rows)
    columns = ["", "precision", "MB", *(f"ms, {size}" for size in sizes), "speed", "speed there"]
    columns += ["difference", "equal", *(["accuracy"] if with_accuracy else [])]
    return [columns, *(_cells_of_row(report, row, sizes, with_accuracy) for row in report.rows)]


def _cells_of_row(report: ExportReport, row: Row, sizes: list[int], with_accuracy: bool) -> list[str]:
    return [
        f"{row.runtime}, {row.model}",
        row.precision,
        _number(row.megabytes, "{:.3g}"),
        *(f"{1000 * row.seconds[size]:.1f}" for size in sizes),
        _speed(report.rows[0], row),
        _speed(_dense_there(report, row), row),
        _number(row.difference, "{:.1e}"),
        _number(row.agreement, "{:.1%}"),
        *([_number(row.accuracy, "{:.1%}")] if with_accuracy else []),
    ]


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value is not None else ""


def _dense_there(report: ExportReport, row: Row) -> Row | None:
    """The dense model in the same runtime."""
    return next((one for one in report.rows if (one.runtime, one.model) == (row.runtime, "dense")), None)


def _speed(of: Row | None, row: Row) -> str:
    """How many times as fast as another, for each size of a batch."""
    if of is None:
        return ""
    return " / ".join(f"{of.seconds[size] / seconds:.1f}×" for size, seconds in row.seconds.items())


def notes(report: ExportReport) -> str:
    """How it was measured."""
    first = report.rows[0]
    threads = "1 thread, CPU time of the process" if report.threads == 1 else f"{report.threads} threads"
    found = [
        f"Milliseconds of a pass with {' and with '.join(map(str, first.seconds))} samples: the least of several, all "
        f"models in turns; {inline(report.processor)}, {threads}.",
        f"Speed: times as fast as {first.runtime}, {first.model}, for each batch.",
    ]
    if _dense_there(report, report.rows[-1]) is not None:
        found.append("Speed there: as the dense model in the same runtime and float32; 1.0× is no gain from pruning.")
    if report.computes_in != "float32":
        there = report.rows[-1].runtime
        found.append(f"{there} computes float32 models in {report.computes_in} on this processor, its default.")
    if report.dense_is_new:
        found.append("The dense model was built for this comparison, with the original sizes and new weights.")
    if report.sparsity:
        found.append(f"{report.sparsity:.1%} of the prunable weights are zero.")
    found.append(
        f"Difference: the largest one from the outputs of this model in PyTorch, relative to the largest of these, on "
        f"{report.number} samples: {inline(report.samples)}."
    )
    if any(row.agreement is not None for row in report.rows):
        found.append("Equal: the share of predictions (classes or next tokens) that are the same.")
    if report.stages[0] == "encoder":
        found.append("A pass is the encoder's, and 9 tokens of the decoder, one by one.")
    elif report.stages[0] == "prefill":
        found.append("A pass is a prompt and 8 tokens after it, one by one.")
    shown = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"{' '.join(found)}\n\nVersions: {inline(shown)}."
