"""`explain`: everything that is measured of a pruned model and of the dense one, put together."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from ..errors import ExplainError
from ..foreign.accelerate import without_mixed_precision
from ..publish.explanation import SAME_WEIGHTS, Complexity, Drift, Explanation, StackLeft
from .classifier import explain_classifier
from .complexity import costs_of, count_weights, energy_of
from .drift import drift_of
from .language_model import explain_language_model
from .samples import Reader, Row, Samples
from .settings import Known, Settings, Task, check_model, check_pair, have_same_weights
from .slices import LEAST_SAMPLES
from .taken import matrices_of, units_of

logger = logging.getLogger(__name__)


def explain(
    pruned: Reader,
    samples: Samples,
    known: Known,
    *,
    dense: Reader | None = None,
    training: Samples | None = None,
    settings: Settings | None = None,
) -> Explanation:
    """What pruning took from a model, and what it changed on samples. Writes nothing.

    The models stay as they are: where they are, in the mode and precision that they have. Both compute in the precision
    of their weights, also where a Trainer has put autocast around one of them. For one seed, everything but the
    measured costs is the same again on one machine.

    Args:
        pruned: the pruned model.
        samples: with labels for classifiers.
        known: what is known beside the models.
        dense: the model that it is compared with.
        training: samples that the model was trained on, for the gap between training and test.
        settings: how it is measured.

    Raises:
        ExplainError: the models or the samples cannot be explained.
    """
    settings = settings or Settings()
    task = check_model(pruned.model)
    if dense is not None:
        check_pair(pruned.model, dense.model)
    if len(samples) < LEAST_SAMPLES:
        raise ExplainError("data", f"expected {LEAST_SAMPLES} samples or more, got {len(samples)}")
    with ExitStack() as stack:
        for reader in (pruned, dense):
            if reader is not None:
                stack.enter_context(without_mixed_precision(reader.model))
        return _explain(task, pruned, samples, known, dense, training, settings)


def _explain(
    task: Task,
    pruned: Reader,
    samples: Samples,
    known: Known,
    dense: Reader | None,
    training: Samples | None,
    settings: Settings,
) -> Explanation:
    notes = list(known.notes)
    if dense is not None and have_same_weights(pruned.model, dense.model):
        logger.warning(SAME_WEIGHTS)
        notes.append(SAME_WEIGHTS)
    rows = pruned.rows(samples)
    samples = replace(samples, rows=rows) if dense is None or dense.tokenize is None else samples
    dense_rows = dense.rows(samples) if dense is not None else rows
    explain_answers = explain_classifier if task == "text-classification" else explain_language_model
    found, why = explain_answers(pruned, dense, samples, training, settings)
    notes += why
    layers = known.removed.layers if known.removed is not None else ()
    units, why = units_of(pruned.model, layers)
    notes += why
    drift: list[Drift] = []
    if dense is not None:
        few = samples.chosen(settings.drift_samples, settings.seed)
        drift, why = drift_of(pruned, dense, few, settings.batch_size, layers)
        notes += why
    complexity, why = _complexity(pruned, dense, rows, dense_rows, known, settings)
    notes += why
    return Explanation(
        task=task,
        model=known.model,
        dense_model=known.dense_model if dense is not None else None,
        files=dict(known.files),
        data=known.data,
        samples=len(samples),
        command=known.command,
        resamples=settings.resamples,
        seed=settings.seed,
        matrices=tuple(matrices_of(pruned.model, dense.model if dense is not None else None, known.prunable, layers)),
        units=tuple(units),
        layers_left=tuple(StackLeft(path=one.path, of=one.of, kept=one.kept) for one in layers),
        removed_words=known.removed.words if known.removed is not None else None,
        drift=tuple(drift),
        complexity=complexity,
        notes=tuple(notes),
        **found,
    )


def _complexity(
    pruned: Reader,
    dense: Reader | None,
    rows: Sequence[Row],
    dense_rows: Sequence[Row],
    known: Known,
    settings: Settings,
) -> tuple[Complexity, list[str]]:
    """Sizes and costs of both models, and why there is no energy."""
    parameters, nonzero, own_bytes = count_weights(pruned.model)
    of_dense = count_weights(dense.model) if dense is not None else (None, None, None)
    costs = costs_of(pruned, dense, rows, dense_rows) if settings.costs else []
    energy, why = energy_of(pruned, dense, rows, dense_rows, settings.batch_size) if settings.costs else (None, None)
    return Complexity(
        parameters=parameters,
        nonzero=known.nonzero if known.nonzero is not None else nonzero,
        file_bytes=known.file_bytes if known.file_bytes is not None else own_bytes,
        dense_parameters=of_dense[0],
        dense_nonzero=known.dense_nonzero if known.dense_nonzero is not None else of_dense[1],
        dense_file_bytes=known.dense_file_bytes if known.dense_file_bytes is not None else of_dense[2],
        costs=tuple(costs),
        energy=energy,
    ), [why] if why is not None else []
