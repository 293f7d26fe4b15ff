"""Every public name has a page in the reference, with what its docstring says and an example, which runs here."""

import inspect
import re
import sys
import types

import pytest
from pages import PAGES, blocks_of, run_page
from transformers import Trainer, TrainerCallback

import hf_prune

REFERENCE = {name: text for name, text in PAGES.items() if name.startswith("docs/reference/")}


def sections():
    """Public name -> (page, what follows its entry up to the next)."""
    found = {}
    for page, text in REFERENCE.items():
        _, *parts = re.split(r"^::: ", text, flags=re.MULTILINE)
        for part in parts:
            entry, _, rest = part.partition("\n")
            found[entry.removeprefix("hf_prune.")] = (page, rest)
    return found


SECTIONS = sections()


def examples(text):
    return "\n".join(block.text for block in blocks_of(text) if block.language == "python" and not block.not_run)


@pytest.mark.parametrize("name", hf_prune.__all__)
def test_every_public_name_has_a_page_and_an_example(name):
    assert name in SECTIONS, f"docs/reference/ has no entry `::: hf_prune.{name}`"
    assert re.search(rf"\b{name}\b", examples(SECTIONS[name][1])), f"no example of {name} follows its entry"
    assert inspect.getdoc(getattr(hf_prune, name))


def ours(cls):
    """The classes of this package that a class consists of."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "hf_prune"]


def public_members(cls):
    """The public methods and properties that this package gives a class: name -> its code."""
    members = {}
    for base in reversed(ours(cls)):
        for name, member in vars(base).items():
            if isinstance(member, property):
                member = member.fget
            member = inspect.unwrap(getattr(member, "__func__", member))
            if isinstance(member, types.FunctionType) and not name.startswith("_"):
                members[name] = member.__code__
    return members


def is_called_by_others(cls, name):
    """Whether a member is an override, which the Trainer calls, and a user need not."""
    overridden = Trainer if issubclass(cls, hf_prune.PruningMixin) else TrainerCallback
    return issubclass(cls, (hf_prune.PruningMixin, TrainerCallback)) and hasattr(overridden, name)


CLASSES = [
    value
    for value in (getattr(hf_prune, name) for name in hf_prune.__all__)
    if inspect.isclass(value) and not issubclass(value, Exception)
]


@pytest.mark.parametrize("cls", CLASSES)
def test_examples_call_every_public_method_of_a_class(cls):
    shown = examples(PAGES[SECTIONS[cls.__name__][0]])
    for name in public_members(cls):
        if not is_called_by_others(cls, name):
            assert re.search(rf"\.{name}\b", shown), f"no example of {cls.__name__}.{name}"


@pytest.mark.parametrize("page", sorted(name for name in REFERENCE if blocks_of(REFERENCE[name])))
def test_examples_run(tmp_path, monkeypatch, page):
    """They run, methods that the Trainer calls are called by it, and examples of errors raise them."""
    monkeypatch.chdir(tmp_path)
    run = set()

    def note(frame, event, argument):
        if event == "call":
            run.add(frame.f_code)

    sys.setprofile(note)
    try:
        _, printed = run_page(page, tmp_path)
    finally:
        sys.setprofile(None)
    for name in [name for name, (where, _) in SECTIONS.items() if where == page]:
        cls = getattr(hf_prune, name, None)
        if cls in CLASSES:
            never = {member for member, code in public_members(cls).items() if code not in run}
            assert never <= NEVER_RUN, f"{name}: {never} never run"
    for block, lines in printed:
        if "except " in block.text:
            assert lines, f"{page}, line {block.line}: no error was raised"


# The push has an example that needs the Hub; optimizers that change weights in backward are not installed everywhere.
NEVER_RUN = {"push_to_hub", "on_substep_end"}


@pytest.mark.parametrize("name", [name for name in hf_prune.__all__ if name.endswith("Error")])
def test_examples_of_errors_catch_them(name):
    assert f"except {name} as error:" in examples(SECTIONS[name][1])
