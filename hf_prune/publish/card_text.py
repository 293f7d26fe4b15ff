"""The text of a model card: counted figures and the record of a run -> Markdown and metadata, by a template."""

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..methods.citations import citations
from ..methods.patterns import parse_pattern
from ..methods.reconstructions import RECONSTRUCTIONS
from ..methods.scopes import SCOPES
from ..methods.table import words_of
from ..saved.report import totals_of
from ..saved.zeros import TensorReport
from ..structure.chosen import Chosen
from ..structure.units import words_for
from .card_explained import Explained, explained_section
from .card_measured import (
    cost_note,
    cost_rows,
    evaluated_on,
    generation_rows,
    headline,
    limits,
    metric_columns,
    metric_rows,
    models_note,
    recovery_note,
    sample_rows,
    samples_note,
)
from .card_metadata import generated_metadata
from .card_removed import removed_rows, removed_words, search_alt, tokens_words, units_alt
from .card_training import training_lines
from .card_usage import continue_code, count_code, packed_code, usage_code
from .markdown import code, fence, inline, single_line
from .record import RunRecord
from .sources import linked
from .sparsity_json import Figures

_TEMPLATE = Path(__file__).with_name("card_template.md")

# The most rows of the table of tensors; a card must stay readable in a browser.
_MOST_ROWS = 500


def render_card(
    figures: Figures,
    record: RunRecord | None,
    location: str,
    chosen: Chosen | None = None,
    explained: Explained | None = None,
) -> str:
    """The text of a card, with its metadata, from figures and record alone.

    `location` is the model's name on the Hub or its folder, for the usage section; `chosen` the structure that was
    chosen for a target, and `explained` what was measured of these weights, if there is one.
    """
    record = record if record is not None else RunRecord(name=figures.model)
    values: dict[str, Any] = {
        "title": inline(figures.model),
        "summary": _summary(figures, record),
        "removed": removed_words(figures),
        "tokens": tokens_words(record.removed_tokens),
        "needs_import": figures.needs_import,
        "removed_rows": removed_rows(figures.removed),
        "units_alt": units_alt(figures.removed),
        "searched": chosen.told(inline) if chosen is not None else None,
        "search_alt": search_alt(chosen) if chosen is not None else "",
        "only_smaller": figures.only_smaller,
        "headline": headline(record.evaluation, figures.is_pruned),
        "prunable": totals_of(figures.prunable) if figures.prunable else None,
        "overall": totals_of(figures.tensors) if figures.tensors else None,
        "others": totals_of([tensor for tensor in figures.tensors if not tensor.prunable]),
        "target": figures.target_sparsity if figures.removed is None else None,
        "how_pruned": _how_pruned(figures, record.calibration is not None),
        "weight_files": _file_names(figures),
        "tensors": [] if figures.only_smaller else figures.prunable,
        "most_rows": _MOST_ROWS,
        "layers_alt": _layers_alt(figures),
        "history": record.history,
        "schedule_alt": _schedule_alt(record.history),
        "evaluations": [
            {
                "on": evaluated_on(one),
                "columns": metric_columns(one, figures.is_pruned),
                "rows": metric_rows(one),
                "compared": one.dense_metrics or not figures.is_pruned,
            }
            for one in record.evaluations
        ],
        "models_note": models_note(record),
        "recovery_note": recovery_note(record.evaluations),
        "explained": explained_section(explained),
        "samples": sample_rows(record.generation),
        "samples_dense": record.generation is not None and record.generation.dense_tokens_per_second is not None,
        "samples_note": samples_note(record.generation),
        "file_bytes": figures.file_bytes,
        "dense_bytes": figures.dense_bytes,
        "packed_bytes": figures.packed_bytes,
        "rounded_embeddings": figures.rounded_embeddings,
        "generation_speed": generation_rows(record.generation),
        "costs": cost_rows(record.costs, figures.removed is not None),
        "costs_dense": any(cost.dense is not None for cost in record.costs),
        "cost_note": cost_note(record, figures.removed is not None, explained is not None),
        "size_note": _size_note(figures),
        "report": f"hf-prune report {shlex.quote(single_line(location))}",
        "usage": usage_code(figures, location),
        "usage_packed": packed_code(figures, location),
        "check": count_code(figures, location),
        "go_on": continue_code(figures),
        "training_lines": training_lines(record),
        "recipe": fence(_as_yaml(record.recipe), "yaml") if record.recipe else None,
        "pruning_yaml": fence(_as_yaml({"pruning": figures.pruning}), "yaml") if figures.pruning else None,
        "arguments": list(record.training_arguments.items()),
        "limits": limits(record, explained is not None),
        "citations": _citations(figures, record),
        "cell": code,
        "number": lambda value: f"{value:,}",
        "percent": lambda value: f"{value:.2%}",
        "shape": lambda sides: "×".join(map(str, sides)) or "–",
    }
    metadata = generated_metadata(figures, record)
    return str(ModelCard.from_template(ModelCardData(**metadata), str(_TEMPLATE), **values))


def _summary(figures: Figures, record: RunRecord) -> str:
    base = linked(record.base_model) if record.base_model is not None else "A model"
    if figures.pruning and (record.steps or record.calibration is not None):
        recorded = {name: inline(method.words) for name, method in record.methods.items()}
        methods = _methods(figures.pruning, recorded)
        trained = "distilled" if record.distillation is not None else "fine-tuned"
        pruned = "pruned with hf-prune"
        if record.calibration is not None:
            pruned += " from calibration data" if record.calibration.samples else " at once"
        missed = figures.missed_target
        note = f" Its target sparsity of {missed:.2%} was not reached." if missed is not None else ""
        note += "".join(f" Not every group of weights has the pattern {one}." for one in figures.missed_patterns)
        if record.calibration is not None:
            done = f"{pruned}, then {trained}" if record.steps else pruned
        else:
            done = f"{trained} and {pruned}"
        return f"{base}, {done}: {methods}.{note}"
    return f"{base}, {'pruned' if figures.is_pruned else 'dense'}."


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
    solved = RECONSTRUCTIONS.get(config.get("reconstruction") or "")
    anew = "; the weights that are kept were solved anew by least squares" if solved is not None else ""
    return f"{what}{blocks}, {SCOPES[config['scope']].words}{anew}"


def _how_pruned(figures: Figures, at_once: bool) -> list[str]:
    """A line for each configuration: its method and its target tensors; without a schedule if pruned at once."""
    lines = [_configuration(config, at_once) for config in figures.pruning]
    lines += [_values_line(figures)] if _sharing_tensors(figures) else []
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


def _values_line(figures: Figures) -> str:
    """How many distinct values were counted in the tensors that have few, or in their groups of weights."""
    sharing = _sharing_tensors(figures)
    kind = "prunable tensor" if all(tensor.prunable for tensor in sharing) else "tensor"
    where = f"each {kind}" if sharing == figures.prunable else f"{len(sharing)} {kind}s"
    groups = sorted({str(tensor.group) for tensor in sharing if tensor.values_in_group is not None})
    where = f"each {' or '.join(groups)} of {where}" if groups else where
    most = max(tensor.values_in_group or tensor.distinct_values or 0 for tensor in sharing)
    return f"Distinct values: at most {most} other than zero in {where}, counted in the saved files."


def _sharing_tensors(figures: Figures) -> list[TensorReport]:
    """The tensors with few values, among the prunable ones and those whose weights were made to share values."""
    return [tensor for tensor in figures.tensors if (tensor.prunable or tensor.group) and tensor.shares_values]


_DEFAULT_TARGETS = (
    "the linear layers and convolutions in the repeated stack of layers; not embeddings, norms, biases, poolers and "
    "heads"
)


def _configuration(config: Mapping[str, Any], at_once: bool) -> str:
    method = code(config["method"])
    if config["method"] != "keep":
        names = ("pattern", "scope") if at_once else ("pattern", "scope", "schedule")
        method += "; " + "; ".join(f"{name}: {code(config[name])}" for name in names)
    targets = f"those matching {', '.join(map(code, config['targets']))}" if config["targets"] else _DEFAULT_TARGETS
    structure = config.get("structure")
    if structure and config["method"] != "keep":
        of_which = "of those of all layers" if config["overrides"] else "of them"
        method = f"{code(config['method'])}; structure: {code(structure)}, {config['sparsity']:.2%} {of_which}"
        method += ", ranked across all layers" if config["scope"] == "global" else ""
        method += f", {_shares_of_layers(config['overrides'])}" if config["overrides"] else ""
        method += f", in multiples of {config['round_to']}" if config.get("round_to") else ""
        method += "; schedule: "
        method += code(config["schedule"])
    if structure:
        matching = f" and that match {', '.join(map(code, config['targets']))}" if config["targets"] else ""
        targets = f"those that the {words_for(structure)} are part of{matching}"
    line = f"Method: {method}. Prunable tensors: {targets}."
    if config["exclude"]:
        line += f" Excluded: {', '.join(map(code, config['exclude']))}."
    if config["overrides"] and not structure:
        others = ", ".join(f"{code(expression)} at {share:.2%}" for expression, share in config["overrides"].items())
        line += f" Overrides: {others}."
    return line


def _shares_of_layers(overrides: Mapping[str, float]) -> str:
    """The shares of the layers that have one of their own."""
    layers = "1 layer that has a share" if len(overrides) == 1 else f"{len(overrides)} layers that have shares"
    return f"from {min(overrides.values()):.2%} to {max(overrides.values()):.2%} in the {layers} of their own"


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


def _size_note(figures: Figures) -> str:
    """What zeros and removed units do for size and speed."""
    if figures.only_smaller:
        return "What was removed is in no file and is not computed: the model is a smaller dense one."
    if figures.dense_bytes is not None:
        return (
            "The weights are packed: zeros take almost no room in the files, and nothing of the other weights is lost. "
            "In memory the model is dense, as large and as fast as it was before it was packed; `hf-prune unpack` "
            "writes the dense files."
        )
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


def _as_yaml(content: Any) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)


def _as_block(text: str) -> str:
    """Lines for a code block, of printable characters, in which nothing begins a part of the card."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text).replace("<!--", "<! --")


def _citations(figures: Figures, record: RunRecord) -> str | None:
    """BibTeX entries of the methods that were used."""
    distillation = record.distillation
    hidden = distillation is not None and distillation.hidden_weight > 0
    recorded = {name: _as_block(method.paper or "") or None for name, method in record.methods.items()}
    found = citations(figures.pruning, distillation is not None, hidden, recorded, record.calibration is not None)
    return fence("\n\n".join(found), "bibtex") if found else None
