"""The files of a comparison: a page that needs no network, a picture, and the same as JSON and Markdown."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined

from ..errors import CompareError, one_line
from ..publish.explanation import ELSEWHERE, Answers, Estimate
from ..publish.explanation_words import complement, percent
from ..publish.markdown import code, fence, inline, single_line
from ..publish.page_style import breakable, page_style
from .charts import HEIGHT, WIDTH, charts_of, draw_png
from .comparison import Comparison, figure, shown_with_spread
from .models import ComparedModel

PAGE_NAME, JSON_NAME, MARKDOWN_NAME, PICTURE_NAME = "index.html", "compare.json", "compare.md", "compare.png"

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Row:
    """A model in the table: its number, its name, its cells, and whether it is the best."""

    number: int
    name: str
    cells: tuple[str, ...]
    is_best: bool


def columns_of(comparison: Comparison) -> list[str]:
    """The columns of the table, after number and name."""
    measure = comparison.measure
    metrics = []
    if measure is not None:
        metrics = [f"{measure.name} ({measure.part})", *([f"{measure.name} (test)"] if measure.tested else [])]
    axes = [_SHORT.get(axis.key, axis.words.replace("milliseconds", "ms")) for axis in comparison.axes]
    changed = [name for name in _CHANGED if _has_changed(comparison, name)]
    return [*metrics, *axes, *(["speed"] if _has_speed(comparison) else []), "parameters", *changed]


_SHORT = {"sparsity": "sparsity", "megabytes": "MB", "tokens_per_second": "tokens/s"}


# The columns of what changed in the answers.
_CHANGED: dict[str, Callable[[Answers], Estimate | None]] = {
    "answers changed": lambda answers: complement(answers.agreement) if answers.agreement is not None else None,
    "right to wrong": lambda answers: answers.to_wrong,
}


def _changed(model: ComparedModel, name: str) -> Estimate | None:
    return _CHANGED[name](model.explanation.answers) if model.explanation is not None else None


def _has_changed(comparison: Comparison, name: str) -> bool:
    return any(_changed(model, name) is not None for model in comparison.models)


def _has_speed(comparison: Comparison) -> bool:
    return any(model.speedup(1) is not None for model in comparison.models)


def rows_of(comparison: Comparison) -> list[Row]:
    """The rows of the table, for `columns_of`."""
    measure, rows = comparison.measure, []
    for number, model in enumerate(comparison.models, start=1):
        metrics = []
        if measure is not None:
            metrics = [figure(measure.value(model)), *([figure(measure.test_value(model))] if measure.tested else [])]
        parameters = f"{model.parameters:,}" if model.parameters is not None else "–"
        speedup = model.speedup(1)
        speed = [f"{speedup:.2f}x" if speedup is not None else "–"] if _has_speed(comparison) else []
        shares = [_changed(model, name) for name in _CHANGED if _has_changed(comparison, name)]
        changed = [percent(share.value) if share is not None else "–" for share in shares]
        cells = (*metrics, *(shown_with_spread(axis, model) for axis in comparison.axes), *speed, parameters, *changed)
        rows.append(Row(number, model.name, cells, model is comparison.choice.best))
    return rows


def render_page(comparison: Comparison, output: Path) -> str:
    """The page, whose links lead from the folder `output` to the cards."""
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["breakable"] = breakable
    content = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        style=page_style(),
        title=comparison.title,
        verdict=comparison.verdict,
        push=comparison.push_command(output),
        charts=charts_of(comparison),
        width=WIDTH,
        height=HEIGHT,
        links=_links(comparison, output),
        explained=_explained(comparison, output),
        columns=columns_of(comparison),
        rows=rows_of(comparison),
        failed={name: single_line(error) for name, error in comparison.failed.items()},
        notes=comparison.notes,
        command=comparison.command,
        where=_where(comparison, output),
    )
    return content + "\n"


def _links(comparison: Comparison, output: Path) -> dict[int, str]:
    """The relative address of each model's card, by its number; empty for a model without one."""
    return {number: _address(model.card, output) for number, model in enumerate(comparison.models, start=1)}


def _explained(comparison: Comparison, output: Path) -> dict[int, str]:
    """The relative address of the page of each model's explanation, by its number; empty for a model without one."""
    return {number: _address(model.explained_page, output) for number, model in enumerate(comparison.models, start=1)}


def _address(path: Path | None, output: Path) -> str:
    return quote(Path(os.path.relpath(path, output)).as_posix()) if path is not None else ""


def _where(comparison: Comparison, output: Path) -> str:
    """Where the command is run that makes a page again; no other folders of this machine are named."""
    place, folder = Path(os.path.abspath(output)), "in which it was run"
    if place.is_relative_to(Path.cwd()) and place != Path.cwd():
        folder = f"that has {place.relative_to(Path.cwd()).as_posix()}"
    real = f"; put the real paths where it says {ELSEWHERE}" if ELSEWHERE in comparison.command else ""
    return f"This command makes this page again. Run it in the folder {folder}{real}:"


def render_markdown(comparison: Comparison, output: Path, has_picture: bool) -> str:
    """The same as Markdown, whose links lead from the folder `output` to the cards."""
    links, explained = _links(comparison, output), _explained(comparison, output)
    lines = [f"# {inline(comparison.title)}", "", *(f"{inline(sentence)}\n" for sentence in comparison.verdict)]
    push = comparison.push_command(output)
    if push is not None:
        lines += ["To push it, run in the folder of this page:", "", fence(push, ""), ""]
    if has_picture:
        lines += [f"![Charts of the metric over what it is traded for]({PICTURE_NAME})", ""]
    columns = columns_of(comparison)
    lines += [f"| # | model | {' | '.join(map(inline, columns))} |", f"|--:|---|{'--:|' * len(columns)}"]
    for row in rows_of(comparison):
        name = f"[{inline(row.name)}]({links[row.number]})" if links[row.number] else inline(row.name)
        best = " (best)" if row.is_best else ""
        more = f" ([what changed]({explained[row.number]}))" if explained[row.number] else ""
        lines.append(f"| {row.number} | {name}{best}{more} | {' | '.join(row.cells)} |")
    lines += ["", *(f"- {inline(note)}" for note in comparison.notes)]
    if comparison.failed:
        lines += ["", "Failed:", ""]
        lines += [f"- {code(name)}: {inline(error)}" for name, error in comparison.failed.items()]
    if comparison.command:
        lines += ["", inline(_where(comparison, output)), "", fence(comparison.command, "")]
    return "\n".join(lines) + "\n"


def check_output(output: Path) -> None:
    """Raise CompareError for a folder that the files cannot be written into: a model's, or one that is a file."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise CompareError("--output", f"expected a folder, found a file at {there}")
    if (output / "config.json").exists():
        raise CompareError("--output", f"expected a folder of its own, got {output}, which has a model")


def write_comparison(comparison: Comparison, output: Path) -> list[Path]:
    """Write page, picture, JSON and Markdown into a folder; returns their paths. Raises CompareError."""
    check_output(output)
    picture = draw_png(comparison)
    files: dict[str, bytes] = {
        PAGE_NAME: render_page(comparison, output).encode(),
        MARKDOWN_NAME: render_markdown(comparison, output, picture is not None).encode(),
        JSON_NAME: (_as_json(comparison.to_dict()) + "\n").encode(),
        **({PICTURE_NAME: picture} if picture is not None else {}),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (output / name).write_bytes(content)
    except OSError as error:
        raise CompareError("--output", f"{output} cannot be written: {one_line(error)}") from error
    if picture is None:
        (output / PICTURE_NAME).unlink(missing_ok=True)
    return [output / name for name in files]


def _as_json(content: dict[str, Any]) -> str:
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False)
    return re.sub("[\ud800-\udfff]", " ", text)  # halves of pairs of surrogates, which UTF-8 cannot hold
