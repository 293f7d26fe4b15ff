"""`explain/explanation.json` beside a saved model: what pruning took, and what it changed, as it was measured.

`hf_prune.explain` measures and writes it; pages, cards and comparisons are made from it alone.
"""

import os
from pathlib import Path
from typing import Literal

from ..saved.files import SavedFile
from .record import Cost, Frozen, Source, read_frozen, write_frozen

EXPLANATION_NAME = "explain/explanation.json"

# In the command of an explanation, before the name of a file or folder whose place is not told.
ELSEWHERE = "path/to/"

FORMAT_VERSION = 1

# The note of an explanation whose dense model is none.
SAME_WEIGHTS = (
    "The dense model has exactly the weights of the pruned model, so nothing can differ: it is the same one. "
    "Give the model as it was before pruning."
)


class Estimate(Frozen):
    """A mean over samples, and the ends of its 95% interval from a bootstrap over them; None where there is none."""

    value: float
    low: float | None = None
    high: float | None = None


class Compared(Frozen):
    """One figure of both models on the same samples; `difference` is pruned - dense, its interval from pairs.

    For language models, `samples` are tokens, and the intervals are over texts.

    `dense` and `difference` are None where there is no dense model.
    """

    name: str
    samples: int
    pruned: Estimate
    dense: Estimate | None = None
    difference: Estimate | None = None


class Slice(Frozen):
    """Samples that have something in common, and a metric of both models on them.

    `by` says what they have in common (`length`, `label`, a column's name, or the name of an expression), `value` which
    of them. `is_worse` says that the pruned model is worse than the dense one on these samples, where all slices of the
    explanation were tested together (Holm's method, 5%); None without a dense model.
    """

    by: str
    value: str
    metric: Compared
    is_worse: bool | None = None


class FlippedSample(Frozen):
    """A sample that both models answer differently. `text` is None unless the user allowed it to be shown."""

    index: int
    text: str | None
    label: str | None
    dense: str
    pruned: str
    dense_confidence: float
    pruned_confidence: float


class Bin(Frozen):
    """The samples with a confidence in [low, high): how many, their mean confidence, and the share answered right."""

    low: float
    high: float
    samples: int
    confidence: float
    accuracy: float


class Calibration(Frozen):
    """How far a model's confidence is from its accuracy: the expected calibration error over bins of equal width."""

    error: Estimate
    bins: list[Bin]


class Answers(Frozen):
    """How the answers of the pruned model differ from those of the dense one.

    `agreement` is the share of samples (of tokens, for language models) that both answer alike; `divergence` the mean
    KL(dense || pruned) in nats; `to_wrong`, `to_right` and `other` the shares of flips from right to wrong, from wrong
    to right, and from one wrong answer to another. All are None without a dense model. `classes` has the recall of each
    label.
    """

    agreement: Estimate | None = None
    divergence: Estimate | None = None
    to_wrong: Estimate | None = None
    to_right: Estimate | None = None
    other: Estimate | None = None
    flipped: tuple[FlippedSample, ...] = ()
    classes: tuple[Compared, ...] = ()
    calibration: Calibration | None = None
    dense_calibration: Calibration | None = None


class Matrix(Frozen):
    """A prunable tensor: its zeros, and the rows and columns that have nothing but zeros.

    `name` is the one that it has in the files. `layer` is the number of its layer, in the dense model where layers were
    removed; `kind` its name there (`attention.self.query`). `effective_rank` is the exponential of the entropy of its
    singular values (Roy and Vetterli, 2007), of both models; None for tensors that are not matrices or too large.
    """

    name: str
    kind: str
    layer: int | None
    shape: list[int]
    weights: int
    zeros: int
    zero_rows: int
    zero_columns: int
    effective_rank: float | None = None
    dense_effective_rank: float | None = None


class UnitGroup(Frozen):
    """The neurons or heads of a layer: the share of zeros in each one's weights; `dead` have nothing but zeros.

    `layer` is its number in the dense model where layers were removed, `path` where it is now. For many units `zeros`
    has the quantiles 0, 1/64, ..., 1 instead, and `are_quantiles` is set.
    """

    structure: Literal["neurons", "heads"]
    path: str
    layer: int | None
    units: int
    dead: int
    zeros: list[float]
    are_quantiles: bool = False


class StackLeft(Frozen):
    """A stack of `of` layers out of which some were removed, and the numbers of those that are left, from 0."""

    path: str
    of: int
    kept: tuple[int, ...]


class Drift(Frozen):
    """How far hidden states moved after a layer of the dense model; None where the layer was removed.

    The mean of |pruned - dense|^2 / |dense|^2, or, where their widths differ, 1 - linear CKA (Kornblith et al., 2019).
    """

    layer: int
    moved: float | None
    by: Literal["distance", "cka"]


class Gap(Frozen):
    """The metric on samples of the training data, on the test data, and the gap between them, of one model."""

    model: Literal["dense", "pruned"]
    training: Estimate
    test: Estimate
    gap: Estimate
    training_samples: int


class Perturbed(Frozen):
    """The metric where each text is changed: `name` is the perturbation, `words` what it does, with its seed."""

    name: str
    words: str
    metric: Compared
    agreement: Estimate | None = None


class Energy(Frozen):
    """Energy for `samples` samples in batches, in joules, as codecarbon measures or estimates it (`method`)."""

    samples: int
    pruned: float
    dense: float | None
    method: str


class Complexity(Frozen):
    """Sizes of both models. Bytes are those of the weight files. `costs` are of forward passes, as in the card."""

    parameters: int
    nonzero: int
    file_bytes: int
    dense_parameters: int | None = None
    dense_nonzero: int | None = None
    dense_file_bytes: int | None = None
    costs: tuple[Cost, ...] = ()
    energy: Energy | None = None


class Explanation(Frozen):
    """What pruning took from a saved model, and what it changed.

    `task` is `text-classification` or `text-generation`. `metric` is the one that slices, gaps and perturbations have:
    `accuracy`, or `loss` (nats a token), of which lower is better. `data` is what it was measured on, `samples` of it;
    `command` measures it again, in the model's folder. `resamples` and `seed` are those of the bootstrap. `files` are
    the hashes of the weight files. `removed_words` say what was cut out, `layers_left` which layers are left where some
    were: everywhere else layers have the numbers that they have in the dense model. For language models, slices are by
    source, token frequency and position. `tokens_counted_in` says where it was counted how rare tokens are. `notes` say
    what could not be said.
    """

    format_version: int = FORMAT_VERSION
    task: Literal["text-classification", "text-generation"]
    model: str
    dense_model: str | None
    files: dict[str, SavedFile]
    data: Source
    samples: int
    metric: str
    command: str
    resamples: int
    seed: int
    metrics: tuple[Compared, ...]
    answers: Answers
    slices: tuple[Slice, ...]
    matrices: tuple[Matrix, ...]
    units: tuple[UnitGroup, ...]
    removed_words: str | None = None
    layers_left: tuple[StackLeft, ...] = ()
    drift: tuple[Drift, ...] = ()
    gaps: tuple[Gap, ...] = ()
    perturbations: tuple[Perturbed, ...] = ()
    complexity: Complexity
    tokens_counted_in: str | None = None
    notes: tuple[str, ...] = ()


def save_explanation(folder: str | os.PathLike, explanation: Explanation) -> Path:
    """Write `explain/explanation.json` into a saved model's folder. Returns its path."""
    path = Path(folder, EXPLANATION_NAME)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_frozen(path, explanation)
    return path


def load_explanation(folder: str | os.PathLike) -> Explanation | None:
    """The explanation in a saved model's folder, None if there is none. Raises RecordError, naming the file."""
    return read_frozen(Path(folder, EXPLANATION_NAME), Explanation, FORMAT_VERSION, "an explanation")
