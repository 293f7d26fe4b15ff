"""Pages of models: `hf-prune space`, which writes one into a folder, and what `hf-prune push --space` does."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import PushError, ReportError, SpaceError
from .messages import errors_as_lines, quiet
from .tables import console, make_table

if TYPE_CHECKING:
    from ..publish.push_plan import PushPlan

Dense = Annotated[
    str | None,
    typer.Option(metavar="USER/DENSE", help="The dense model of the page (default: the one that is recorded)."),
]
Examples = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="An example of the page, instead of its own; can be repeated.")
]


def space_command(
    model: Annotated[Path, typer.Argument(help="A folder with a saved model.")],
    output: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    model_name: Annotated[
        str | None, typer.Option("--model", metavar="USER/MODEL", help="The model's name on the Hub, for a Space.")
    ] = None,
    dense: Dense = None,
    example: Examples = None,
) -> None:
    """Write a page that answers with a model.

    It shows the answers of the pruned and the dense model side by side, and how long they take: `python app.py` in the
    folder starts it, where gradio is installed. Without --model it opens the folders of this machine, and --dense may
    be a folder, too. hf-prune push --space makes such a page on the Hub.
    """
    with errors_as_lines():
        if not model.is_dir():
            raise ReportError(f"{model}: expected a folder with a saved model, found nothing, or a file")
        quiet()
        from ..publish.commits import api_of
        from ..publish.sources import is_hub_name
        from ..saved.model import SavedModel
        from ..saved.packing import complete_folder
        from ..space.files import make_page, write_page
        from ..space.settings import find_dense, make_settings, task_for

        if model_name is not None and not is_hub_name(model_name):
            raise SpaceError("--model", f"expected the name of a model on the Hub, got {model_name!r}")
        saved = SavedModel(model)
        task_for(saved)
        found = find_dense(saved, dense, api_of(None), is_local=model_name is None)
        files = make_page(saved, make_settings(saved, model_name or str(model.resolve()), found, example or []))
        with complete_folder(output) as unfinished:
            write_page(unfinished, files)
    _print_why_alone(found.why_not if found.name is None else ())
    console.print(str(output), soft_wrap=True)
    console.print(
        "Start the page with `python app.py` in that folder: pip install 'hf-prune[space]' has what it needs."
    )
    if model_name is None:
        console.print("Its space.json has paths of this machine: for the Hub, use hf-prune push --space.")


@dataclass(frozen=True)
class Page:
    """The files of a page, the Space that they are for, and the model on the Hub."""

    files: dict[str, Path | bytes]
    space: str
    model: str

    def check(self, private: bool) -> None:
        """Raise what a push of the page would be refused for."""
        from ..space.push import plan_page

        plan_page(self.files, self.space, private or None)

    def print_plan(self, private: bool) -> None:
        """Print what a push would upload; if the Hub cannot be read, that of a push to a new Space, with a note."""
        from ..publish.push_plan import UNKNOWN
        from ..space.push import page_plan, plan_page

        try:
            plan = plan_page(self.files, self.space, private or None)
        except PushError as error:
            if error.problems[0][0]:
                raise
            console.print(f"\nThe state of the Space on the Hub is unknown. {error}", soft_wrap=True)
            plan = page_plan(self.files, self.space, UNKNOWN, {})
        console.print()
        _print_plan(plan)

    def push(self, private: bool) -> None:
        """Push the page, and say what its Space still needs."""
        from ..publish.commits import api_of
        from ..publish.hub_errors import explained
        from ..space.push import push_page

        pushed = push_page(self.files, self.space, private or None, say=console.print)
        console.print(pushed.address, soft_wrap=True)
        with explained(f"{self.model} was pushed, but could not be read again", None):
            is_private = api_of(None).model_info(self.model).private
        if is_private:
            console.print(
                f"{self.model} is private: add a token that may read it as HF_TOKEN to the Space's secrets.",
                soft_wrap=True,
            )


def read_page(
    model: Path,
    repo: str,
    space: str | None,
    dense: str | None,
    examples: list[str],
    revision: str | None,
    create_pr: bool,
) -> Page | None:
    """The page that a push is to have, complete before anything is uploaded; None without --space."""
    if space is None:
        for option, value in (("--dense", dense), ("--example", examples)):
            if value:
                raise SpaceError(option, "must not be set without --space")
        return None
    if create_pr:
        raise SpaceError("--space", "must not be set with --create-pr: a page opens what is merged; push it afterwards")
    from ..publish.commits import api_of
    from ..publish.push import full_name
    from ..saved.model import SavedModel
    from ..space.files import make_page
    from ..space.settings import find_dense, make_settings, task_for

    saved, api = SavedModel(model), api_of(None)
    task_for(saved)
    found = find_dense(saved, dense, api)
    name = full_name(api, repo, None)
    files = make_page(saved, make_settings(saved, name, found, examples, revision))
    _print_why_alone(found.why_not if found.name is None else ())
    return Page(files, space, name)


def _print_why_alone(reasons: tuple[str, ...]) -> None:
    """Say why the pruned model is shown without a dense one, and how to name one."""
    if reasons:
        why = "; ".join(reason.rstrip(".") for reason in reasons)
        console.print(f"The page has no dense model: {why}. Name one with --dense.", soft_wrap=True)


def _print_plan(plan: "PushPlan") -> None:
    """Print what a push of a page would upload, file by file."""
    state = {True: " (will be created)", False: "", None: " (not known whether it exists)"}
    console.print(f"Space {plan.repo_id}{state[plan.is_new]}", soft_wrap=True)
    table = make_table("", "file", "bytes", "")
    for name in plan.files:
        table.add_row(name, f"{plan.size_of(name):,}", "" if name in plan.changed else "unchanged")
    for name in plan.removed:
        table.add_row(name, "", "will be removed")
    for name, reason in plan.left_out.items():
        table.add_row(name, "", reason)
    console.print(table)
