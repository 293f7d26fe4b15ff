"""What a model card says of measurements: evaluations, samples of generated text, and costs."""

from collections.abc import Mapping, Sequence

from .markdown import code, inline, single_line
from .record import Cost, Evaluation, Generation, PassCost, RunRecord, lower_is_better, recovery
from .sources import described

# The most characters of a text in the table of samples.
_MOST_SAMPLE = 400

# What is counted in a forward pass: its name in the table, the field of `PassCost`, and the unit.
_COUNTED = (("millions of floating-point operations", "flops", 1e6), ("megabytes of memory", "memory_bytes", 1e6))


def headline(evaluation: Evaluation | None, is_pruned: bool = True) -> str | None:
    """The main metric, and of a pruned model how much of the dense model's it is; None without one."""
    if evaluation is None or evaluation.main_metric is None:
        return None
    name = evaluation.main_metric
    value = evaluation.metrics[name]
    text = f"{code(name)} is **{_figure(value)}**"
    dense = (evaluation.dense_metrics or {}).get(name)
    if dense is None and not is_pruned:
        return f"{text}."
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
    part = ", the validation split" if evaluation.part == "validation" else ""
    return f"Evaluated on {described(dataset)}{samples}{part}."


def metric_columns(evaluation: Evaluation, is_pruned: bool = True) -> list[str]:
    """The columns of the table of an evaluation, after the name of the metric."""
    compared = ["difference", "recovery"] if evaluation.dense_metrics else []
    names = [name for name, _ in _models(evaluation)]
    return [*names[:-1], names[-1] if is_pruned else "this model", *compared]


def _models(evaluation: Evaluation) -> list[tuple[str, Mapping[str, float]]]:
    """The models that were evaluated, in the order of the run, with their metrics."""
    models = {
        "without training": evaluation.base_metrics,
        "dense": evaluation.dense_metrics,
        "pruned at once": evaluation.at_once_metrics,
        "pruned": evaluation.metrics,
    }
    return [(name, metrics or {}) for name, metrics in models.items() if metrics or name == "pruned"]


def metric_rows(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """The name of each metric, the main one first, and the cells of its row, for `metric_columns`."""
    models, dense = _models(evaluation), evaluation.dense_metrics or {}
    names = sorted(evaluation.metrics, key=lambda name: name != evaluation.main_metric)
    rows = []
    for name in names:
        cells = [_figure(metrics[name]) if name in metrics else "not measured" for _, metrics in models]
        if name in dense:
            pruned = evaluation.metrics[name]
            kept = recovery(name, dense[name], pruned)
            cells += [_figure(pruned - dense[name], "+"), f"{kept:.1%}" if kept is not None else "–"]
        elif dense:
            cells += ["–", "–"]
        rows.append((name, cells))
    before, after = ["–"] * (len(models) - 1), ["–", "–"] if dense else []
    return rows + [(name, [*before, "not a finite number", *after]) for name in evaluation.not_finite]


def models_note(record: RunRecord) -> str:
    """Which models the columns of the table of a model are of that was pruned at once; empty where it is clear."""
    evaluation = record.evaluation
    if evaluation is None or record.calibration is None:
        return ""
    notes = []
    if evaluation.base_metrics:
        notes.append(f"Without training: {_base_words(record)}.")
    if evaluation.dense_metrics and record.dense_steps:
        notes.append(f"Dense: after {record.dense_steps:,} optimizer steps on the training data.")
    if evaluation.at_once_metrics:
        notes.append("Pruned at once: before any training of the pruned model.")
    if notes and record.steps:
        notes.append(f"Pruned: after {record.steps:,} more steps.")
    return " ".join(notes)


def _base_words(record: RunRecord) -> str:
    return code(record.base_model.name) if record.base_model is not None else "the model that the run began with"


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


def generation_rows(generation: Generation | None) -> list[tuple[str, str]]:
    """How fast samples of text were generated."""
    if generation is None:
        return []
    rows = [("generation of the samples", f"{generation.tokens_per_second:.1f} tokens/s")]
    if generation.dense_tokens_per_second is not None:
        rows.append(("generation of the samples, dense model", f"{generation.dense_tokens_per_second:.1f} tokens/s"))
    return rows


def cost_rows(costs: Sequence[Cost], is_smaller: bool) -> list[tuple[str, str, str, str]]:
    """What is measured of a forward pass on each batch, with the dense and with the pruned model, and how they compare.

    Models that are not smaller are not compared: they differ by the noise of the clock.
    """
    rows = []
    for cost in costs:
        batch = "1 sample" if cost.samples == 1 else f"{cost.samples:,} samples"
        faster = f"{cost.speedup:.2f} times as fast" if cost.speedup is not None and is_smaller else ""
        rows.append((f"{batch}: milliseconds", _milliseconds(cost.dense), _milliseconds(cost.model), faster))
        for name, field, unit in _COUNTED:
            value, dense = getattr(cost.model, field), getattr(cost.dense, field, None)
            if value is None:
                continue
            share = f"{value / dense:.1%}" if dense and is_smaller else ""
            rows.append((f"{batch}: {name}", _millions(dense, unit), _millions(value, unit), share))
    return rows


def _milliseconds(of: PassCost | None) -> str:
    """The median, and the quartiles where they are known."""
    if of is None:
        return ""
    spread = f" ({1000 * of.quartiles[0]:.1f} to {1000 * of.quartiles[1]:.1f})" if of.quartiles is not None else ""
    return f"{1000 * of.seconds:.1f}{spread}"


def _millions(value: int | None, unit: float) -> str:
    return f"{value / unit:,.1f}" if value is not None else ""


def cost_note(record: RunRecord, is_smaller: bool, is_explained: bool = False) -> str:
    """How a forward pass was measured, and on which machine; `is_explained` says that there is a page with others."""
    if not record.costs:
        return ""
    passes = " and ".join(f"{cost.passes:,} passes ({_shapes_of(cost)})" for cost in record.costs)
    machine = record.hardware
    on = ""
    if machine is not None:
        threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
        on = f", on {inline(machine.accelerator or f'{machine.processor} with {threads}')}"
    in_turns = ", of both models in turns" if record.costs[0].dense is not None else ""
    quartiles = " with quartiles" if record.costs[0].model.quartiles is not None else ""
    note = f"Milliseconds: median{quartiles} of {passes}{in_turns}{on}."
    if record.costs[0].model.flops is not None:
        note += " Floating-point operations are those that torch's FlopCounterMode counts."
    if record.costs[0].model.memory_bytes is not None:
        note += " Memory: the weights, and the most that the pass holds beside them at a time."
    if record.costs[0].dense_is_new:
        note += " The dense model was built for this comparison, with the original sizes and new weights."
    if is_smaller and record.costs[0].dense is None:
        note += " The dense model was not measured."
    if is_explained:
        note += " The page in `explain/` times other inputs, the first samples of its own data, so its figures differ."
    return note


def _shapes_of(cost: Cost) -> str:
    """The names and shapes of the inputs of a batch."""
    shapes: dict[str, list[str]] = {}
    for name, shape in cost.shapes.items():
        shapes.setdefault("×".join(map(str, shape)), []).append(code(name))
    return "; ".join(f"{', '.join(names)} {shape}" for shape, names in shapes.items())


def limits(record: RunRecord, is_explained: bool) -> list[str]:
    """What was not measured; `is_explained` says that the card has a section of what pruning changed."""
    lines = []
    if is_explained:
        lines.append(
            "Only what is under Evaluation and What pruning changed was measured. Groups and inputs that are not among "
            "those slices may have lost more."
        )
    elif record.evaluation is None:
        lines.append("The model was not evaluated before this card was made; its quality is unknown.")
    else:
        lines.append(
            "Only the metrics under Evaluation were measured. Pruned models can lose more on rare groups and unusual "
            "inputs than an average shows; this was not examined."
        )
    if record.base_model is not None:
        lines.append(f"The limitations of {code(record.base_model.name)} apply to this model, too.")
    return lines
