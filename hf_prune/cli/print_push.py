"""The output of `hf-prune push`: what it would upload, and where it is then."""

from typing import TYPE_CHECKING

from .tables import console, make_table

if TYPE_CHECKING:
    from ..publish.push import PushResult
    from ..publish.push_plan import PushPlan


def print_push_plan(plan: "PushPlan") -> None:
    """Print what a push would upload, file by file."""
    state = {True: " (will be created)", False: "", None: " (not known whether it exists)"}
    console.print(f"{plan.repo_id}{state[plan.is_new]}", soft_wrap=True)
    table = make_table("", "file", "bytes", "")
    for name in plan.files:
        table.add_row(name, f"{plan.size_of(name):,}", "" if name in plan.changed else "unchanged")
    for name in plan.removed:
        table.add_row(name, "", "will be removed")
    console.print(table)
    if plan.left_out:
        console.print()
        left_out = make_table("Not uploaded", "", "")
        for name, reason in plan.left_out.items():
            left_out.add_row(name, reason)
        console.print(left_out)
        console.print("\nhf-prune push --include NAME uploads a file of these too.", soft_wrap=True)
    if plan.sparsity is not None:
        console.print(f"\n{plan.sparsity:.2%} of all weights are zero, counted in these files.")
    else:
        console.print("\nThe zeros in these files could not be counted; the card says why.")
    if plan.shown_texts:
        console.print(f"explain/ shows the texts of {plan.shown_texts} samples of the data.", soft_wrap=True)


def print_push(result: "PushResult") -> None:
    """Print the address of a commit or pull request."""
    console.print(result.commit.pr_url or result.commit.commit_url, soft_wrap=True)
