"""What a model card says of measurements: evaluations, samples of generated text, and speed."""

from collections.abc import Sequence

from .markdown import code, inline, single_line
from .record import Evaluation, Generation, RunRecord, lower_is_better, recovery
from .sources import described

# The most characters of a text in the table of samples.
_MOST_SAMPLE = 400


def headline(evaluation: Evaluation | None) -> str | None:
    """The main metric, and how much of the dense model's it is; None without one."""
    if evaluation is None or evaluation.main_metric is None:
        return None
    name = evaluation.main_metric
    value = evaluation.metrics[name]
    text = f"{code(name)} is **{_figure(value)}**"
    dense = (evaluation.dense_metrics or {}).get(name)
    if dense is None:
        return f"{text}; the dense baseline was not measured."
    kept = recovery(name, dense, value)
    recovered = f": **{kept:.1%}** recovered" if kept is not None else ""
    return f"{text}; the dense model has {_figure(dense)}{recovered}."


def evaluated_on(evaluation: Evaluation) -> str:
    """What an evaluation was made on, in a sentence."""
    samples = f", {evaluation.samples:,} samples" if evaluation.samples is not None else ""
    dataset = evaluation.dataset
    if evaluation.given_in is not None:
        on = f"on {described(dataset)}" if dataset is not None else "on a data set of unknown name"
        return f"Evaluated {on}{samples}; the metrics are those of {code(evaluation.given_in)}, given by the author."
    if dataset is None:
        return f"Evaluated on the Trainer's {code(evaluation.part)} data{samples}; the name of the data set is unknown."
    return f"Evaluated on {described(dataset)}{samples}."


def metric_rows(evaluation: Evaluation) -> list[tuple[str, str, str, str, str]]:
    """Name, dense, pruned, difference and recovery of each metric, the main one first."""
    names = sorted(evaluation.metrics, key=lambda name: name != evaluation.main_metric)
    rows = []
    for name in names:
        pruned, dense = evaluation.metrics[name], (evaluation.dense_metrics or {}).get(name)
        if dense is None:
            rows.append((name, "not measured", _figure(pruned), "–", "–"))
            continue
        kept = recovery(name, dense, pruned)
        share = f"{kept:.1%}" if kept is not None else "–"
        rows.append((name, _figure(dense), _figure(pruned), _figure(pruned - dense, "+"), share))
    return rows + [(name, "–", "not a finite number", "–", "–") for name in evaluation.not_finite]


def _figure(value: float, sign: str = "") -> str:
    """A value with four decimals, or four digits where that would show next to nothing."""
    return f"{value:{sign}.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:{sign}.4g}"


def recovery_note(evaluations: Sequence[Evaluation]) -> str:
    """What recovery means; empty where nothing was compared with the dense model."""
    note = "Recovery is the pruned model's value divided by the dense model's"
    compared = [one for one in evaluations if one.dense_metrics]
    errors = list(dict.fromkeys(name for one in compared for name in one.dense_metrics or () if lower_is_better(name)))
    if not compared:
        return ""
    if not errors:
        return f"{note}."
    return f"{note}; for {', '.join(map(code, errors))}, where lower is better, the inverse."


def sample_rows(generation: Generation | None) -> list[dict[str, str]]:
    """The cells of the table of samples."""
    samples = generation.samples if generation is not None else []
    return [
        {name: inline(_shortened(text)) for name, text in sample.model_dump().items() if text is not None}
        for sample in samples
    ]


def _shortened(text: str) -> str:
    text = single_line(text)
    return text if len(text) <= _MOST_SAMPLE else f"{text[:_MOST_SAMPLE]}…"


def samples_note(generation: Generation | None) -> str:
    """What generated the samples, and from which prompts."""
    if generation is None:
        return ""
    which = "the dense and the pruned model" if generation.dense_tokens_per_second is not None else "the model"
    return (
        f"Texts that {which} generated, not selected by hand, for the prompts of the recipe and the first texts of the "
        f"test split. The options of generation are in `generation_config.json`."
    )


def speed_rows(record: RunRecord, is_smaller: bool) -> list[tuple[str, str]]:
    """What was timed, and how long it took; of a smaller model, also how much faster it is than the dense one."""
    latency, generation = record.latency, record.generation
    rows = []
    if latency is not None:
        rows.append(("forward pass", f"{latency.seconds * 1000:.1f} ms"))
    if latency is not None and latency.dense_seconds is not None:
        rows.append(("forward pass, dense model", f"{latency.dense_seconds * 1000:.1f} ms"))
    if is_smaller and latency is not None and latency.dense_seconds is not None and latency.seconds > 0:
        rows.append(("times as fast as the dense model", f"{latency.dense_seconds / latency.seconds:.2f}"))
    if generation is not None:
        rows.append(("generation of the samples", f"{generation.tokens_per_second:.1f} tokens/s"))
    if generation is not None and generation.dense_tokens_per_second is not None:
        rows.append(("generation of the samples, dense model", f"{generation.dense_tokens_per_second:.1f} tokens/s"))
    return rows


def speed_note(record: RunRecord, is_smaller: bool) -> str:
    """How latencies were measured, and on which machine."""
    note = _measured_on(record)
    if is_smaller and record.latency is not None and record.latency.dense_seconds is None:
        note += " The latency of the dense model was not measured."
    return note


def _measured_on(record: RunRecord) -> str:
    if record.latency is None:
        return ""
    latency, machine = record.latency, record.hardware
    shapes: dict[str, list[str]] = {}
    for name, shape in latency.shapes.items():
        shapes.setdefault("×".join(map(str, shape)), []).append(code(name))
    batch = "; ".join(f"{', '.join(names)} {shape}" for shape, names in shapes.items())
    note = f"Median of {latency.passes} passes on one batch ({batch})"
    if machine is None:
        return f"{note}."
    if machine.accelerator:
        return f"{note}, on {inline(machine.accelerator)}."
    return f"{note}, on {inline(machine.processor)} with {machine.threads} threads."
