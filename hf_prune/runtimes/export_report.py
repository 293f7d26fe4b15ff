"""What an export gave, as `export_report.json` beside it has it."""

from dataclasses import asdict, dataclass, field
from typing import Any

REPORT_NAME = "export_report.json"
FORMAT_VERSION = 1


@dataclass
class Row:
    """What was measured of one model in one runtime.

    Attributes:
        runtime: PyTorch, or another.
        model: `dense`, or `this model`.
        precision: float32 or int8.
        megabytes: of the files with its weights; None of a dense model that was built to be timed.
        seconds: samples of a batch -> seconds of a pass.
        difference: the largest difference from PyTorch's outputs of this model, relative to the largest output.
        agreement: the share of equal predictions (classes or next tokens).
        accuracy: the share of right classes.
    """

    runtime: str
    model: str
    precision: str
    megabytes: float | None = None
    seconds: dict[int, float] = field(default_factory=dict)
    difference: float | None = None
    agreement: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True)
class ExportReport:
    """What an export gave, as `export_report.json` has it.

    `computes_in` is the data type that the runtime computes float32 models in on this machine. `stages` are what runs
    the model: `model`, or `prefill` and `decode` of one that generates text, after the `encoder` of an encoder-decoder.
    """

    name: str
    model_class: str
    to: str
    int8: str | None
    sparsity: float | None
    samples: str
    number: int
    dense_is_new: bool
    computes_in: str
    stages: list[str]
    rows: list[Row]
    processor: str
    threads: int
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)
