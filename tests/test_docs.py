"""What README and docs show is so: their Python blocks run, their commands, links and tables of fields are true."""

import ast
import dataclasses
import re
import shlex
import sys
from pathlib import PurePosixPath

import pytest
import yaml
from pages import PAGES, ROOT, blocks_of, names_for, run_page
from typer.main import get_command

import hf_prune
from hf_prune import CalibrationConfig, DistillationConfig, PruningConfig
from hf_prune.cli.commands import app

README = PAGES["README.md"]
SCRIPT = ["script.py", "--output_dir", "outputs", "--max_steps", "2", "--use_cpu", "true", "--report_to", "none"]
WITH_PYTHON = [name for name, text in PAGES.items() if any(block.language == "python" for block in blocks_of(text))]


def test_the_pages_are_found():
    assert {"README.md", "docs/configuration.md", "docs/reference/pruner.md"} <= set(WITH_PYTHON)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.widths_per_layer] if "per_layer_config" in PAGES[name] else [])
        for name in WITH_PYTHON
        if not name.startswith("docs/reference/")
    ],
)
def test_python_blocks_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*SCRIPT, "--sparsity", "0.8"])
    names, _ = run_page(name, tmp_path)
    if name == "README.md":
        assert names["trainer"].pruner.target_sparsity == pytest.approx(0.8, abs=0.01)
        assert names["pruner"].sparsity == pytest.approx(0.8, abs=0.01)
        assert (tmp_path / "outputs" / "trained" / "model.safetensors").exists()


def test_the_script_in_the_readme_trains_dense_without_a_sparsity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", SCRIPT)
    (block,) = (block for block in blocks_of(README) if "HfArgumentParser" in block.text)
    assert len([line for line in block.text.splitlines() if line]) == 6
    names = names_for(tmp_path)
    exec(block.text, names)
    assert names["trainer"].pruner is None
    assert names["trainer"].state.global_step == 2


def test_few_python_blocks_are_not_run():
    blocks = [block for text in PAGES.values() for block in blocks_of(text) if block.language == "python"]
    assert sum(block.not_run is not None for block in blocks) <= 3
    assert not [block for text in PAGES.values() for block in blocks_of(text) if block.language in ("py", "pycon")]


def commands_of(text):
    """Lines of blocks, and code in sentences and tables, that call this project's commands or make."""
    lines = [line for block in blocks_of(text) if not block.language for line in block.text.splitlines()]
    return [*lines, *re.findall(r"`((?:hf-prune|make) [^`\n]+)`", text)]


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name):
    commands = get_command(app).commands
    for line in commands_of(PAGES[name]):
        if line.startswith("hf-prune "):
            _, command, *words = shlex.split(line, comments=True)
            if command in ("--help", "--version"):
                continue
            assert command in commands, line
            options = {option for parameter in commands[command].params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = [line for text in PAGES.values() for line in commands_of(text)]
    targets = {target for line in lines if line.startswith("make ") for target in re.split(r"[ /]", line)[1:2]}
    assert targets >= {"quickstart", "test", "check", "docs"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_readme_names_what_a_visitor_runs():
    lines = commands_of(README)
    assert {"make quickstart", "make test", "make check"} <= {line.split("#")[0].strip() for line in lines}


@pytest.mark.parametrize(
    ("page", "heading", "config"),
    [
        ("docs/configuration.md", "## Fields", PruningConfig),
        ("docs/distillation.md", "## The loss", DistillationConfig),
        ("docs/one_shot.md", "## Calibration", CalibrationConfig),
    ],
)
def test_the_tables_of_fields_name_every_field(page, heading, config):
    table = PAGES[page].split(heading)[1].split("| Field |")[1].split("\n\n")[0]
    rows = "\n".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == {field.name for field in dataclasses.fields(config)}


# ---- Links ----


def anchors_of(path):
    """The anchors of a Markdown file: those of its headings, as on GitHub, and of entries of the reference."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {*(re.sub(r"\s", "-", heading) for heading in words), *re.findall(r"^::: (\S+)", text, flags=re.MULTILINE)}


def links_of(name):
    """Where the relative links of a page lead: path from the root, and anchor."""
    text = re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", PAGES[name], flags=re.MULTILINE | re.DOTALL))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"\w+:", target):
            path, _, anchor = target.partition("#")
            yield PurePosixPath(name).parent / path if path else PurePosixPath(name), anchor


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in links_of(name):
        path = (ROOT / target).resolve()
        assert path.is_file(), target
        assert path.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors_of(path), f"{target}#{anchor}"


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), ["README.md"]
    while ahead:
        name = ahead.pop()
        if name in PAGES and name not in reached:
            reached.add(name)
            ahead += [(ROOT / target).resolve().relative_to(ROOT).as_posix() for target, _ in links_of(name)]
    assert reached == set(PAGES)


def test_every_page_is_in_the_navigation_of_the_site():
    """What `make docs` refuses takes minutes to find out there."""

    def leaves(entry):
        if isinstance(entry, str):
            return [entry]
        return [leaf for one in (entry if isinstance(entry, list) else entry.values()) for leaf in leaves(one)]

    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    cards = {path.relative_to(ROOT).as_posix() for path in (ROOT / "model_cards").glob("*/*.md")}
    assert sorted(leaves(site["nav"])) == sorted({*PAGES, *cards})


# ---- The map of the code ----

CONTRIBUTING = PAGES["CONTRIBUTING.md"]


def test_the_map_names_every_wing():
    section = CONTRIBUTING.split("hf_prune/\n")[1].split("recipes/")[0]
    package = ROOT / "hf_prune"
    wings = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert set(re.findall(r"^  (\S+)", section, flags=re.MULTILINE)) == {*wings, "errors.py"}


def test_what_the_map_names_is_in_the_code():
    named = re.findall(r"`(\w+/\w+\.py)(?:: ([\w.]+))?`", CONTRIBUTING)
    assert len(named) > 20
    for file, symbol in named:
        folder = ROOT if file.startswith("tests/") else ROOT / "hf_prune"
        body = ast.parse((folder / file).read_text(encoding="utf-8")).body
        for part in filter(None, symbol.split(".")):
            found = [node for node in body if part in _names_in(node)]
            assert found, f"{file}: {symbol}"
            body = getattr(found[0], "body", [])


def _names_in(node):
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


def test_the_changelog_begins_with_this_release_if_any():
    released = re.findall(r"^## \[(\d[\w.]*)\]", PAGES["CHANGELOG.md"], flags=re.MULTILINE)
    assert not released or released[0] == hf_prune.__version__


def test_what_is_refused_and_held_has_tests():
    rows = [line for line in PAGES["docs/robustness.md"].splitlines() if re.match(r"\| (?!Input|-)", line)]
    assert rows
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^def {test}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE), test
