"""The text of a model card: counted figures and the record of a run -> Markdown and metadata, by a template."""

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, constants

from ..foreign.huggingface_hub import eval_results_to_model_index
from ..methods.citations import citations
from ..methods.patterns import parse_pattern
from ..methods.reconstructions import RECONSTRUCTIONS
from ..methods.scopes import SCOPES
from ..methods.table import words_of
from ..saved.removed import Removed, words_for
from ..saved.report import totals_of
from ..structure.chosen import Chosen
from .markdown import code, fence, inline, single_line
from .record import (
    Distillation,
    Evaluation,
    Generation,
    RemovedTokens,
    RunRecord,
    Source,
    lower_is_better,
    recovery,
)
from .sparsity_json import Figures
from .tasks import HUB_TASKS, task_of

_TEMPLATE = Path(__file__).with_name("card_template.md")

# The most characters of a text in the table of samples.
_MOST_SAMPLE = 400

# The most rows of the table of tensors; a card must stay readable in a browser.
_MOST_ROWS = 500


def render_card(figures: Figures, record: RunRecord | None, location: str, chosen: Chosen | None = None) -> str:
    """The text of a card, with its metadata, from figures and record alone.

    `location` is the model's name on the Hub or its folder, for the usage section; `chosen` the structure that was
    chosen for a target, if there was one.
    """
    record = record if record is not None else RunRecord(name=figures.model)
    values: dict[str, Any] = {
        "title": inline(figures.model),
        "summary": _summary(figures, record),
        "removed": _removed(figures),
        "tokens": _tokens(record.removed_tokens),
        "needs_import": figures.needs_import,
        "removed_rows": _removed_rows(figures.removed),
        "units_alt": _units_alt(figures.removed),
        "searched": _searched(chosen) if chosen is not None else None,
        "search_alt": f"Speed and predicted change of the structures considered for {chosen.target.words}"
        if chosen is not None
        else "",
        "only_smaller": figures.only_smaller,
        "headline": _headline(record.evaluation),
        "prunable": totals_of(figures.prunable) if figures.prunable else None,
        "overall": totals_of(figures.tensors) if figures.tensors else None,
        "others": totals_of([tensor for tensor in figures.tensors if not tensor.prunable]),
        "target": figures.target_sparsity if figures.removed is None else None,
        "how_pruned": _how_pruned(figures),
        "weight_files": _file_names(figures),
        "tensors": [] if figures.only_smaller else figures.prunable,
        "most_rows": _MOST_ROWS,
        "layers_alt": _layers_alt(figures),
        "history": record.history,
        "schedule_alt": _schedule_alt(record.history),
        "evaluations": [
            {"on": _evaluated_on(one), "rows": _metric_rows(one), "dense": one.dense_metrics}
            for one in record.evaluations
        ],
        "recovery_note": _recovery_note(record.evaluations),
        "samples": _samples(record.generation),
        "samples_dense": record.generation is not None and record.generation.dense_tokens_per_second is not None,
        "samples_note": _samples_note(record.generation),
        "file_bytes": figures.file_bytes,
        "speed": _speed(record, figures.removed is not None),
        "speed_note": _speed_note(record, figures.removed is not None),
        "size_note": _size_note(figures),
        "report": f"hf-prune report {shlex.quote(single_line(location))}",
        "usage": _usage(figures, location),
        "check": _check(figures, location),
        "go_on": _go_on(figures),
        "training_lines": _training_lines(record),
        "recipe": fence(_as_yaml(record.recipe), "yaml") if record.recipe else None,
        "pruning_yaml": fence(_as_yaml({"pruning": figures.pruning}), "yaml") if figures.pruning else None,
        "arguments": list(record.training_arguments.items()),
        "limits": _limits(record),
        "citations": _citations(figures, record),
        "cell": code,
        "number": lambda value: f"{value:,}",
        "percent": lambda value: f"{value:.2%}",
        "shape": lambda sides: "×".join(map(str, sides)) or "–",
    }
    metadata = generated_metadata(figures, record)
    return str(ModelCard.from_template(ModelCardData(**metadata), str(_TEMPLATE), **values))


def generated_metadata(figures: Figures, record: RunRecord) -> dict[str, Any]:
    """The generated metadata of a card: what is known, and what the user chose."""
    task, base, evaluation = record.chosen.get("pipeline_tag"), record.base_model, record.evaluation
    task = task or task_of(figures.architecture)
    found: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task if task in HUB_TASKS else None}
    if base is not None:
        found |= {"license": base.license, "language": base.languages or None}
        if base.hub_name:
            found |= {"base_model": base.hub_name, "base_model_relation": "finetune"}
    found["tags"] = [
        *("hf-prune", *(["pruned"] if _is_pruned(figures) else [])),
        *(*_method_tags(figures), *record.tags),
    ]
    sources = [record.training_data, *(one.dataset for one in record.evaluations)]
    names = [source.hub_name for source in sources if source is not None and source.hub_name]
    found["datasets"] = list(dict.fromkeys(names)) or None
    if evaluation is not None:
        found["metrics"] = [name for name in evaluation.metrics if name != "loss"] or None
    results = [result for one in record.evaluations if task is not None for result in _eval_results(task, one)]
    if results:
        # One value for a metric of a data set: that of the first evaluation, the main one.
        first: dict[tuple, EvalResult] = {}
        for result in results:
            first.setdefault((*result.unique_identifier, result.dataset_name, result.metric_type), result)
        found["model-index"] = eval_results_to_model_index(figures.model, list(first.values()))
    if record.emissions is not None:
        found["co2_eq_emissions"] = {
            "emissions": record.emissions.kilograms * 1000,
            "source": "codecarbon",
            "training_type": "fine-tuning",
        }
    return {key: _clean(value) for key, value in (found | record.chosen).items() if value is not None}


def _is_pruned(figures: Figures) -> bool:
    """Whether the model is pruned: something was removed, or there are zeros in prunable tensors.

    If no prunable tensors are known, whether there is a configuration.
    """
    if figures.removed is not None:
        return True
    if figures.prunable:
        return totals_of(figures.prunable).zeros > 0
    return bool(figures.pruning) or totals_of(figures.tensors).zeros > 0


def _clean(value: Any) -> Any:
    """The same with every text on a single line of printable characters, which YAML and the Hub can hold."""
    if isinstance(value, str):
        return single_line(value)
    if isinstance(value, Mapping):
        return {single_line(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    return value


def _eval_results(task: str, evaluation: Evaluation) -> list[EvalResult]:
    """Results for the `model-index`, which needs the name of a data set; none if there is a loss only."""
    dataset = evaluation.dataset or Source(name="Unknown", hub_name="unknown", split=evaluation.part or None)
    if all(name == "loss" or name.endswith("_loss") for name in evaluation.metrics):
        return []
    return [
        EvalResult(
            task_type=task,
            dataset_type=single_line(dataset.hub_name or dataset.name),
            dataset_name=single_line(dataset.name),
            dataset_config=single_line(dataset.config) if dataset.config else None,
            dataset_split=single_line(dataset.split) if dataset.split else None,
            dataset_revision=single_line(dataset.revision) if dataset.revision else None,
            metric_type=single_line(name),
            metric_name=single_line(name),
            metric_value=round(value, 6),
        )
        for name, value in evaluation.metrics.items()
    ]


def _method_tags(figures: Figures) -> list[str]:
    """The patterns, where the counted zeros reach the target sparsity, and the methods; what was removed for units."""
    tags: dict[str, None] = {}
    for config in figures.pruning:
        if config.get("structure"):
            tags |= {"structured-pruning": None} if figures.removed is not None else {}
        elif _target_missed(figures) is None and config["pattern"] not in figures.missed_patterns:
            tags |= {config["pattern"].replace(":", "-") if "block" in config["pattern"] else config["pattern"]: None}
        tags |= {config["method"]: None}
    return list(tags)


def _target_missed(figures: Figures) -> float | None:
    """The target sparsity, if counted zeros and removed weights do not reach it or zeros could not be counted.

    Where the target of all tensors was not recorded, it is the lowest that a configuration has, except those whose
    units were removed.
    """
    target, counted = figures.target_sparsity, figures.reached_sparsity
    if target is None:
        of_weights = [one for one in figures.pruning if figures.removed is None or not one.get("structure")]
        target = min(map(_lowest_target, of_weights), default=None)
    return target if target and (counted is None or counted < target - 1e-4) else None


def _lowest_target(config: Mapping[str, Any]) -> float:
    """The lowest sparsity that a configuration asks of a tensor; 0 for the method `keep`."""
    return min([config["sparsity"] or 0.0, *(config["overrides"] or {}).values()])


def _shown(source: Source, kind: str = "") -> str:
    """A model or (with the kind `datasets/`) a data set, as a link if it is on the Hub, with its revision."""
    text = code(source.name)
    if source.hub_name:
        text = f"[{text}]({constants.ENDPOINT}/{kind}{quote(single_line(source.hub_name), safe='/')})"
    return f"{text} (revision {code(source.revision)})" if source.revision else text


def _summary(figures: Figures, record: RunRecord) -> str:
    base = _shown(record.base_model) if record.base_model is not None else "A model"
    if figures.pruning and record.steps:
        recorded = {name: inline(method.words) for name, method in record.methods.items()}
        methods = _methods(figures.pruning, recorded)
        distilled = "distilled" if record.distillation is not None else "fine-tuned"
        missed = _target_missed(figures)
        note = f" Its target sparsity of {missed:.2%} was not reached." if missed is not None else ""
        note += "".join(f" Not every group of weights has the pattern {one}." for one in figures.missed_patterns)
        return f"{base}, {distilled} and pruned with hf-prune: {methods}.{note}"
    return f"{base}, {'pruned' if _is_pruned(figures) else 'dense'}."


def _methods(configs: Sequence[Mapping[str, Any]], recorded: Mapping[str, str]) -> str:
    """What the configurations prune: together where they begin before the one ahead of them has ended, or in turn."""
    text = _method(configs[0], recorded)
    for before, config in pairwise(configs):
        begin, end = config.get("begin"), before.get("end")
        together = begin is not None and end is not None and type(begin) is type(end) and begin < end
        text += f"{'; and' if together else '; then'} {_method(config, recorded)}"
    return text


def _method(config: Mapping[str, Any], recorded: Mapping[str, str]) -> str:
    unknown = {config["method"]: f"the weights that the method {code(config['method'])} selects"}
    what = words_of(config["method"], {**unknown, **recorded}, config.get("structure"))
    if config["method"] == "keep":
        return what
    pattern = parse_pattern(config["pattern"])
    if pattern.name == "n:m":
        return f"{what} of every group ({config['pattern']})"
    if config.get("structure"):
        reconstruction = RECONSTRUCTIONS.get(config.get("reconstruction") or "")
        return f"{what} ({reconstruction.words})" if reconstruction is not None else what
    blocks = f", in whole {config['pattern'].removeprefix('block:')} blocks" if pattern.name == "block" else ""
    return f"{what}{blocks}, {SCOPES[config['scope']].words}"


def _figure(value: float, sign: str = "") -> str:
    """A value with four decimals, or four digits where that would show next to nothing."""
    return f"{value:{sign}.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:{sign}.4g}"


def _headline(evaluation: Evaluation | None) -> str | None:
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


def _removed(figures: Figures) -> str | None:
    """What was removed, in a sentence; None if nothing was."""
    if figures.removed is None:
        return None
    before, after = map(_rounded, figures.removed.parameters)
    return f"{inline(figures.removed.words)} were removed: {before} parameters became {after}"


def _tokens(removed: RemovedTokens | None) -> str | None:
    """Which tokens left the vocabulary, and what that saves; None if none did."""
    if removed is None or removed.before <= removed.after:
        return None
    gone, saved = removed.before - removed.after, f"{_rounded(removed.parameters)} parameters"
    return (
        f"**{gone:,} of {removed.before:,} tokens were removed from the vocabulary**, which no text of the training "
        f"data has: {saved}, {removed.bytes / 1e6:,.1f} MB"
    )


def _rounded(number: int) -> str:
    """A number of parameters: `22.7M`, or exact below a million."""
    for size, sign in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.1f}{sign}"
    return f"{number:,}"


def _removed_rows(removed: Removed | None) -> list[tuple[str, str, str]]:
    """What there was, and what is left: parameters, units, layers."""
    if removed is None:
        return []
    rows = [("parameters", removed.parameters)]
    for structure in (name for name in removed.structures if name != "layers"):
        in_each = removed.in_each(structure)
        where = "" if structure == "hidden" else " of each layer" if in_each is not None else " of all layers"
        rows.append((f"{words_for(structure)}{where}", in_each or removed.totals(structure)))
    rows += [(f"layers of {code(stack.path)}", (stack.of, len(stack.kept))) for stack in removed.layers]
    return [(name, f"{before:,}", f"{after:,}") for name, (before, after) in rows]


def _searched(chosen: Chosen) -> str:
    """What was asked for, what was chosen, and what it reached."""
    conditions = chosen.conditions
    where = inline(conditions["processor"] if conditions["accelerator"] == "cpu" else conditions["accelerator"])
    text = (
        f"Asked for {chosen.target.words}; of the structures that reach it, {chosen.words_of(chosen.candidate)} were "
        "predicted to change the outputs least."
    )
    dense, small = chosen.reached if chosen.reached is not None else (chosen.dense.seconds, chosen.candidate.seconds)
    threads = f"{conditions['threads']} thread{'' if conditions['threads'] == 1 else 's'}"
    when = "after training" if chosen.reached is not None else "before training"
    return (
        f"{text} Measured {when}: {dense / small:.2f} times as fast, {1000 * small:.2f} ms where the dense model needs "
        f"{1000 * dense:.2f} ms (least of several passes in turns, inputs of {chosen.inputs_words}, {where}, "
        f"{threads}, {inline(conditions['dtype'])})."
    )


def _units_alt(removed: Removed | None) -> str:
    if removed is None:
        return ""
    units = " and ".join(map(words_for, removed.structures))
    return f"Bar chart of the {units} that are left: {inline(removed.words)} were removed"


def _how_pruned(figures: Figures) -> list[str]:
    """A line for each configuration: its method and its target tensors."""
    lines = [_configuration(config) for config in figures.pruning]
    if not lines and figures.prunable:
        lines.append(f"Prunable tensors: {_DEFAULT_TARGETS}.")
    if figures.frozen:
        number = f"{len(figures.frozen)} tensors, such as" if len(figures.frozen) > 1 else "the tensor"
        lines.append(f"Not pruned, because it was not trained: {number} {code(figures.frozen[0])}.")
    if figures.note and not figures.tensors:
        lines.append(f"The zeros are not counted: {inline(figures.note)}.")
    elif figures.note:
        lines.append(f"It is unknown which tensors are prunable: {inline(figures.note)}.")
    return lines


_DEFAULT_TARGETS = (
    "the linear layers and convolutions in the repeated stack of layers; not embeddings, norms, biases, poolers and "
    "heads"
)


def _configuration(config: Mapping[str, Any]) -> str:
    method = code(config["method"])
    if config["method"] != "keep":
        names = ("pattern", "scope", "schedule")
        method += "; " + "; ".join(f"{name}: {code(config[name])}" for name in names)
    targets = f"those matching {', '.join(map(code, config['targets']))}" if config["targets"] else _DEFAULT_TARGETS
    structure = config.get("structure")
    if structure and config["method"] != "keep":
        method = f"{code(config['method'])}; structure: {code(structure)}, {config['sparsity']:.2%} of them"
        method += ", ranked across all layers" if config["scope"] == "global" else ""
        method += "; schedule: "
        method += code(config["schedule"])
    if structure:
        matching = f" and that match {', '.join(map(code, config['targets']))}" if config["targets"] else ""
        targets = f"those that the {structure} are part of{matching}"
    line = f"Method: {method}. Prunable tensors: {targets}."
    if config["exclude"]:
        line += f" Excluded: {', '.join(map(code, config['exclude']))}."
    if config["overrides"]:
        others = ", ".join(f"{code(expression)} at {share:.2%}" for expression, share in config["overrides"].items())
        line += f" Overrides: {others}."
    return line


def _file_names(figures: Figures) -> str:
    return ", ".join(map(code, figures.files)) if len(figures.files) <= 3 else f"{len(figures.files)} files"


def _layers_alt(figures: Figures) -> str:
    shares = [tensor.sparsity for tensor in figures.prunable]
    if not shares:
        return ""
    return f"Bar chart of the zeros in each of {len(shares)} tensors, from {min(shares):.1%} to {max(shares):.1%}"


def _schedule_alt(history: Sequence[Mapping[str, float]]) -> str:
    if not history:
        return ""
    steps = int(history[-1]["step"])
    shares = [entry["sparsity"] for entry in history if "sparsity" in entry]
    rise = f"sparsity from {shares[0]:.1%} to {shares[-1]:.1%}, " if shares else ""
    return f"Line chart: {rise}losses and evaluations over {steps} optimizer steps"


def _evaluated_on(evaluation: Evaluation) -> str:
    samples = f", {evaluation.samples:,} samples" if evaluation.samples is not None else ""
    dataset = evaluation.dataset
    if evaluation.given_in is not None:
        on = f"on {_described(dataset)}" if dataset is not None else "on a data set of unknown name"
        return f"Evaluated {on}{samples}; the metrics are those of {code(evaluation.given_in)}, given by the author."
    if dataset is None:
        return f"Evaluated on the Trainer's {code(evaluation.part)} data{samples}; the name of the data set is unknown."
    return f"Evaluated on {_described(dataset)}{samples}."


def _described(dataset: Source) -> str:
    config = f", configuration {code(dataset.config)}" if dataset.config else ""
    split = f", split {code(dataset.split)}" if dataset.split else ""
    rows = f", {inline(dataset.rows)}" if dataset.rows else ""
    return f"{_shown(dataset, 'datasets/')}{config}{split}{rows}"


def _metric_rows(evaluation: Evaluation) -> list[tuple[str, str, str, str, str]]:
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


def _recovery_note(evaluations: Sequence[Evaluation]) -> str:
    note = "Recovery is the pruned model's value divided by the dense model's"
    compared = [one for one in evaluations if one.dense_metrics]
    errors = list(dict.fromkeys(name for one in compared for name in one.dense_metrics or () if lower_is_better(name)))
    if not compared:
        return ""
    if not errors:
        return f"{note}."
    return f"{note}; for {', '.join(map(code, errors))}, where lower is better, the inverse."


def _samples(generation: Generation | None) -> list[dict[str, str]]:
    """The cells of the table of samples."""
    samples = generation.samples if generation is not None else []
    return [
        {name: inline(_shortened(text)) for name, text in sample.model_dump().items() if text is not None}
        for sample in samples
    ]


def _shortened(text: str) -> str:
    text = single_line(text)
    return text if len(text) <= _MOST_SAMPLE else f"{text[:_MOST_SAMPLE]}…"


def _samples_note(generation: Generation | None) -> str:
    if generation is None:
        return ""
    which = "the dense and the pruned model" if generation.dense_tokens_per_second is not None else "the model"
    return (
        f"Texts that {which} generated, not selected by hand, for the prompts of the recipe and the first texts of the "
        f"test split. The options of generation are in `generation_config.json`."
    )


def _speed(record: RunRecord, is_smaller: bool) -> list[tuple[str, str]]:
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


def _speed_note(record: RunRecord, is_smaller: bool) -> str:
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


def _size_note(figures: Figures) -> str:
    """What zeros and removed units do for size and speed."""
    if figures.only_smaller:
        return "What was removed is in no file and is not computed: the model is a smaller dense one."
    of_zeros = "Zeros alone make neither the file smaller nor a dense kernel faster"
    if figures.removed is None:
        of_zeros += ": this model has the size and speed of a dense one"
    else:
        of_zeros += "; what was removed does both"
    return f"{of_zeros}.\n{_pattern_note(figures.pruning)}"


def _pattern_note(pruning: Sequence[Mapping[str, Any]]) -> str:
    patterns = {config["pattern"] for config in pruning}
    if "2:4" in patterns:
        return (
            "Zeros are useful for the 2:4 kernels of recent GPUs, sparse runtimes, compression, and further training."
        )
    return "Zeros are useful for sparse runtimes, compression, and further training."


# Tasks whose pipeline takes one text, and its arguments in the usage section.
_TEXT_PIPELINES = {
    "text-classification": '"A film that stays with you."',
    "token-classification": '"Ada Lovelace was born in London."',
    "text-generation": '"The film begins", max_new_tokens=20',
}


def _usage(figures: Figures, location: str) -> str:
    where = _as_python(location)
    task = task_of(figures.architecture)
    if task in _TEXT_PIPELINES and figures.has_tokenizer:
        return (
            f"{_first_import(figures)}from transformers import pipeline\n\n"
            f'pipe = pipeline("{task}", model={where})\n'
            f"print(pipe({_TEXT_PIPELINES[task]}))"
        )
    name = figures.architecture or "AutoModel"
    return f"{_first_import(figures)}from transformers import {name}\n\nmodel = {name}.from_pretrained({where})"


def _first_import(figures: Figures) -> str:
    """The import without which a model whose layers differ does not open."""
    return "import hf_prune  # builds each layer at its own size\n" if figures.needs_import else ""


def _check(figures: Figures, location: str) -> str:
    name = figures.architecture or "AutoModel"
    where = _as_python(location)
    if figures.only_smaller:
        return (
            f"{_first_import(figures)}from transformers import {name}\n\n"
            f"model = {name}.from_pretrained({where})\n"
            'print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")'
        )
    return (
        f"{_first_import(figures)}from transformers import {name}\n\n"
        f"model = {name}.from_pretrained({where})\n"
        "tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values()  # tied weights\n"
        "zeros = sum(int((tensor == 0).sum()) for tensor in tensors)\n"
        'print(f"{zeros / sum(tensor.numel() for tensor in tensors):.2%} of all weights are zero")'
    )


def _go_on(figures: Figures) -> str:
    choices = [
        {"method": "keep", "targets": config["targets"], "exclude": config["exclude"]}
        for config in figures.pruning
        if figures.removed is None or not config.get("structure")
    ] or [{"method": "keep"}]
    kept = list(dict.fromkeys(_call({key: value for key, value in choice.items() if value}) for choice in choices))
    config = kept[0] if len(kept) == 1 else f"[{', '.join(kept)}]"
    return (
        "from hf_prune import PruningConfig, PruningTrainer\n\n"
        "trainer = PruningTrainer(\n"
        "    model=model,\n"
        "    args=args,  # your own TrainingArguments and data\n"
        "    train_dataset=train_dataset,\n"
        f"    pruning_config={config},\n"
        ")\n"
        "trainer.train()"
    )


def _call(values: Mapping[str, Any]) -> str:
    return f"PruningConfig({', '.join(f'{name}={_as_python(value)}' for name, value in values.items())})"


def _trained(record: RunRecord) -> str:
    epochs = f", {record.epochs:.4g} {'epoch' if record.epochs == 1 else 'epochs'}" if record.epochs is not None else ""
    samples = f" of {record.train_samples:,} samples" if record.train_samples is not None else ""
    data = f" of {_described(record.training_data)}" if record.training_data is not None else ""
    seed = f"; seed {record.seed}" if record.seed is not None else ""
    kept = record.kept_step if record.kept_step not in (None, record.steps) else None
    best = f" The weights are those of step {kept:,}, which had the best evaluation." if kept is not None else ""
    return f"Trained for {record.steps:,} optimizer steps{epochs}{samples}{data}{seed}.{best}"


def _as_python(value: Any) -> str:
    """Strings, and lists of them, as Python literals: the notation of JSON is the same."""
    return json.dumps(_clean(value), ensure_ascii=False)


def _training_lines(record: RunRecord) -> list[str]:
    lines = []
    if record.steps:
        lines.append(_trained(record))
    if record.distillation is not None:
        lines.append(_distilled(record.distillation))
    logged = {name for entry in record.history for name, value in entry.items() if value}
    acted = [config for config in record.pruning if f"{config.get('penalty')}_penalty" in logged]
    lines += dict.fromkeys(map(_penalised, acted))
    if record.versions:
        lines.append(", ".join(f"{inline(name)} {inline(text)}" for name, text in record.versions.items()) + ".")
    machine = record.hardware
    if machine is not None:
        processes = f", {machine.processes} processes" if machine.processes > 1 else ""
        accelerator = f", {inline(machine.accelerator)}" if machine.accelerator else ""
        lines.append(f"On {inline(machine.processor)}, {machine.cores} cores{accelerator}{processes}.")
    emissions = record.emissions
    if emissions is not None:
        country = f" for the electricity of {inline(emissions.country)}" if emissions.country else ""
        lines.append(
            f"Emissions of the training, estimated by codecarbon{country}: {emissions.kilograms * 1000:.4g} g of "
            f"CO2 equivalent, {emissions.kilowatt_hours:.4g} kWh in {emissions.seconds:.0f} s."
        )
    return lines


def _distilled(distillation: Distillation) -> str:
    """The teacher, and the weights of the distillation losses."""
    if distillation.teacher is not None:
        teacher = _shown(distillation.teacher)
    elif distillation.teacher_base is not None:
        teacher = f"a model based on {_shown(distillation.teacher_base)}"
    else:
        teacher = "a teacher of unknown name"
    pairs = ", ".join(f"{one} with {other}" for one, other in distillation.hidden_layers or ())
    layers = f" (layers of the model with layers of the teacher: {pairs})" if pairs else ""
    hidden = (
        f", weight of the hidden-state loss {_plain(distillation.hidden_weight)}{layers}"
        if distillation.hidden_weight
        else ""
    )
    return (
        f"Distilled from {teacher}: weight of the distillation loss {_plain(distillation.weight)}, temperature "
        f"{_plain(distillation.temperature)}{hidden}."
    )


def _penalised(config: Mapping[str, Any]) -> str:
    """The penalty, and its weight."""
    return (
        f"A penalty on the weights to prune ({inline(config['penalty'])}) was added to the loss; its weight grew "
        f"towards {_plain(config['penalty_weight'])} with the sparsity."
    )


def _plain(value: float) -> str:
    return f"{value:g}"


def _as_yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def _limits(record: RunRecord) -> list[str]:
    lines = []
    if record.evaluation is None:
        lines.append("The model was not evaluated before this card was made; its quality is unknown.")
    else:
        lines.append(
            "Only the metrics under Evaluation were measured. Pruned models can lose more on rare groups and unusual "
            "inputs than an average shows; this was not examined."
        )
    if record.base_model is not None:
        lines.append(f"The limitations of {code(record.base_model.name)} apply to this model, too.")
    return lines


def _as_block(text: str) -> str:
    """Lines for a code block, of printable characters, in which nothing begins a part of the card."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text).replace("<!--", "<! --")


def _citations(figures: Figures, record: RunRecord) -> str | None:
    """BibTeX entries of the methods that were used."""
    distillation = record.distillation
    hidden = distillation is not None and distillation.hidden_weight > 0
    recorded = {name: _as_block(method.paper or "") or None for name, method in record.methods.items()}
    found = citations(figures.pruning, distillation is not None, hidden, recorded)
    return fence("\n\n".join(found), "bibtex") if found else None
