"""The page of an explanation, its pictures and its Markdown, made of `explanation.json` alone and written beside it."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..publish.explanation import Explanation
from ..publish.explanation_words import (
    answers_words,
    as_number,
    as_share,
    change,
    command_words,
    complement,
    dead_units,
    figure,
    is_of_language,
    layers_words,
    main_metric,
    percent,
    slices_words,
    summary,
)
from ..publish.markdown import code, fence, inline
from ..publish.page_style import breakable, page_style
from ..saved.files import write_file
from .page_colors import STEPS, palette, step_of
from .page_heat import heads_by_layer, ranks_by_layer, shapes_by_layer, zeros_by_layer
from .page_pictures import drift_bars, lowest_confidence, reliability
from .page_plots import make_plots
from .page_rows import (
    class_rows,
    complexity_rows,
    cost_words,
    direction_of,
    flip_rows,
    metric_tables,
    neuron_rows,
    perturbation_rows,
    shape_words,
    slice_tables,
    source_words,
)

_FOLDER = Path(__file__).parent

# Control characters, halves of pairs of surrogates, and what is no character.
_NOT_IN_PAGES = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def write_page(folder: Path, explanation: Explanation) -> list[Path]:
    """Write `explain/index.html`, `explain/explanation.md` and PNGs into a saved model's folder. Returns their paths.

    Pictures of an earlier explanation are deleted.
    """
    plots = make_plots(explanation)
    pictures = [name for name, content in plots.items() if content is not None]
    files: dict[str, bytes | None] = {
        "index.html": make_page(explanation),
        "explanation.md": make_markdown(explanation, pictures),
    }
    paths = []
    for name, content in (files | plots).items():
        path = Path(folder, "explain", name)
        if content is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, content)
        paths.append(path)
    return paths


def make_page(explanation: Explanation) -> bytes:
    """The HTML page: one file that asks for no other, and has no script."""
    return _render("page_template.html", True, _values(explanation))


def make_markdown(explanation: Explanation, pictures: Collection[str]) -> bytes:
    """The same in Markdown, which shows the `pictures` beside it."""
    return _render("page_template.md", False, _values(explanation) | {"pictures": pictures})


def _render(template: str, is_html: bool, values: Mapping[str, Any]) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=is_html, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["breakable"] = breakable
    text = environment.get_template(template).render(values)
    return _NOT_IN_PAGES.sub("\N{REPLACEMENT CHARACTER}", text).encode()


def _values(explanation: Explanation) -> dict[str, Any]:
    """What the templates show."""
    answers, complexity = explanation.answers, explanation.complexity
    both = (("d", "dense", answers.dense_calibration), ("p", "pruned", answers.calibration))
    calibrated = [(kind, name, one) for kind, name, one in both if one is not None]
    sizes = complexity_rows(complexity)
    lowest = lowest_confidence([one for _, _, one in calibrated])
    has_zeros = any(matrix.zeros for matrix in explanation.matrices)
    values: dict[str, Any] = {
        "it": explanation,
        "style": _style(),
        "steps": STEPS,
        "is_language": is_of_language(explanation),
        "unit": "tokens" if is_of_language(explanation) else "samples",
        "is_compared": explanation.dense_model is not None,
        "data": source_words(explanation.data),
        "sentences": summary(explanation),
        "key_figures": _key_figures(explanation),
        "taken": _taken(explanation),
        "layers_words": layers_words(explanation),
        "zeros": zeros_by_layer(explanation.matrices) if has_zeros else [],
        "shapes": shapes_by_layer(explanation.matrices),
        "heads": heads_by_layer(explanation.units) if has_zeros else [],
        "neurons": neuron_rows(explanation.units) if has_zeros else [],
        "ranks": ranks_by_layer(explanation.matrices),
        "ranks_compared": any(one.dense_effective_rank is not None for one in explanation.matrices),
        "answers": answers_words(explanation),
        "flip_rows": flip_rows(explanation),
        "has_texts": any(one.text is not None for one in answers.flipped),
        "metrics": metric_tables(explanation.metrics),
        "metric_name": f"{explanation.metric[:1].upper()}{explanation.metric[1:]}",
        "classes": class_rows(explanation),
        "slices": slice_tables(explanation),
        "slices_words": slices_words(explanation),
        "calibrations": [(kind, name, reliability(one, lowest, name)) for kind, name, one in calibrated],
        "drift": drift_bars(explanation.drift),
        "perturbed": perturbation_rows(explanation),
        "complexity": sizes,
        "is_compared_in_size": any(dense for _, dense, _, _ in sizes),
        "cost_words": cost_words(complexity.costs),
        "command_words": command_words(explanation),
        "intervals": _intervals(explanation),
        "step": step_of,
        "percent": percent,
        "as_share": as_share,
        "as_number": as_number,
        "figure": figure,
        "change": change,
        "shape": shape_words,
        "direction": direction_of,
        "number_of": lambda value: f"{value:,}",
        "inline": inline,
        "cell": code,
        "fence": fence,
    }
    return values | {"contents": _contents(values)}


def _contents(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The sections of the page: (id, name)."""
    sections = [
        ("summary", "Summary", True),
        ("taken", "What was taken", True),
        ("answers", "What changed in the answers", True),
        ("slices", "Where it changed most", True),
        ("calibration", "Calibration", values["calibrations"]),
        ("depth", "Hidden states by depth", values["drift"]),
        ("generalisation", "Generalisation", values["it"].gaps),
        ("robustness", "Robustness", values["perturbed"]),
        ("complexity", "Size and speed", True),
        ("notes", "Notes", values["it"].notes),
        ("method", "How this was measured", True),
    ]
    return [(id, name) for id, name, is_there in sections if is_there]


def _key_figures(explanation: Explanation) -> list[tuple[str, str, list[str]]]:
    """(name, value, lines that belong to it) of the figures that a reader looks for first."""
    found: list[tuple[str, str, list[str]]] = []
    metric = main_metric(explanation)
    if metric is not None:
        dense = f"dense {figure(metric.name, metric.dense)}" if metric.dense is not None else ""
        value, _, interval = figure(metric.name, metric.pruned).partition(" (")
        found.append((metric.name, value, list(filter(None, (f"({interval}" if interval else "", dense)))))
    if explanation.answers.agreement is not None:
        value, _, interval = as_share(complement(explanation.answers.agreement)).partition(" (")
        what = "next tokens changed" if is_of_language(explanation) else "answers changed"
        found.append((what, value, [f"({interval}"] if interval else []))
    weights = sum(matrix.weights for matrix in explanation.matrices)
    zeros = sum(matrix.zeros for matrix in explanation.matrices)
    if zeros:
        found.append(("zeros in the prunable weights", percent(zeros / weights), [f"{zeros:,} of {weights:,}"]))
    complexity = explanation.complexity
    if complexity.dense_file_bytes and complexity.dense_file_bytes != complexity.file_bytes:
        share = percent(complexity.file_bytes / complexity.dense_file_bytes)
        found.append(("size of the dense model's files", share, [f"{complexity.file_bytes / 1e6:,.1f} MB"]))
    elif (dead := [one for one in dead_units(explanation.units) if one[1]]) and zeros:
        structure, gone, of = dead[0]
        found.append((f"{structure} with only zero weights", f"{gone:,}", [f"of {of:,}"]))
    return found


def _taken(explanation: Explanation) -> str:
    """What there was to take and what went: units, weights, whole rows and columns."""
    matrices = explanation.matrices
    removed = f"{explanation.removed_words} were removed. " if explanation.removed_words else ""
    if not matrices:
        return f"{removed}No tensor of this model is prunable."
    weights, zeros = sum(one.weights for one in matrices), sum(one.zeros for one in matrices)
    one_or_more = "The prunable tensor has" if len(matrices) == 1 else f"The {len(matrices):,} prunable tensors have"
    told = f"{removed}{one_or_more} {weights:,} weights"
    if not zeros:
        return f"{told}, none of which is zero."
    told += f", of which {zeros:,} ({percent(zeros / weights)}) are zero"
    rows, columns = sum(one.zero_rows for one in matrices), sum(one.zero_columns for one in matrices)
    if not rows and not columns:
        return f"{told}; no row or column is entirely zero."
    none_or = [f"{number:,}" if number else "none" for number in (rows, columns)]
    return f"{told}; {none_or[0]} of their rows and {none_or[1]} of their columns are entirely zero."


def _intervals(explanation: Explanation) -> str:
    """How intervals were made, and where tokens were counted."""
    counted = explanation.tokens_counted_in
    of_tokens = f" How rare tokens are was counted in {counted}." if counted is not None else ""
    if not explanation.resamples:
        return f"There are no intervals: nothing was resampled.{of_tokens}"
    told = (
        f"In brackets are 95% bootstrap intervals: the samples were redrawn with replacement "
        f"{explanation.resamples:,} times (seed {explanation.seed})."
    )
    if explanation.dense_model is None:
        return told + of_tokens
    told += " Differences are pruned − dense, and both models are compared on the same drawn samples."
    if explanation.slices:
        told += " Slices were tested together, by Holm's method at a level of 5%."
    return told + of_tokens


def _style() -> str:
    """The style sheets, with the colours of heat maps."""

    def rules(is_dark: bool) -> str:
        colors = enumerate(palette(is_dark))
        return "\n".join(f".h{step} {{ background: {fill}; color: {text}; }}" for step, (fill, text) in colors)

    sheet = (_FOLDER / "page_style.css").read_text(encoding="utf-8")
    dark = f"@media screen and (prefers-color-scheme: dark) {{\n{rules(True)}\n}}"
    return f"{page_style()}\n{sheet}\n{rules(False)}\n{dark}"
