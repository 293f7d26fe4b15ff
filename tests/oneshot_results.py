"""What architecture_oneshot.py found, a line for each class in architecture_oneshot.jsonl, and its words."""

from pathlib import Path

from structure_results import read_results, versions

RESULTS = Path(__file__).with_name("architecture_oneshot.jsonl")
METHODS = ("sparsegpt", "wanda")
MOST_INPUTS = 2048  # of a layer that `sparsegpt` is tried with: its work grows with their cube

# What a result says: the word in the table, and what it means.
WORDS = {
    "yes": "All tensors were pruned, and outputs and inputs are equal bit for bit.",
    "unreached": (
        "Some weights are used without calling their layers, or not at all. An error names one of them; with "
        "`leave_unreached=True` they stay dense, the others are pruned, and outputs and inputs are equal."
    ),
    "random": (
        "The class draws random numbers in evaluation mode: counts and zeros are right, and nothing can be compared."
    ),
}

HEAD = """\
The column "At once" says whether a class can be [pruned at once](one_shot.md#architectures): the tiny model is pruned
by half with `hf_prune.prune` from two batches, once by `wanda`, and once by `sparsegpt`, without layers of more than
{:,} inputs, which take long. The number of masked weights of each tensor is exact, all of them are zero, and nothing
that was not to be pruned has changed. The forward passes that are stopped before each layer must have the outputs, and
each layer the inputs, of plain forward passes of the pruned model and of the dense one. `make test-all` tries every
20th class again.

**{} of {} classes can be pruned at once.**
"""


def kept_results():
    """Class name -> the result, of the versions that are installed; nothing where all results are of others."""
    made_with, results = read_results(RESULTS)
    return results if made_with == versions() else {}


def can_be_pruned(result):
    """Whether a class was pruned as asked for, at least in part."""
    return result.get("result") in WORDS


def at_once_lines(rows):
    """What the column says, and how many of these results there are of each word."""
    lines = ["", *HEAD.format(MOST_INPUTS, sum(map(can_be_pruned, rows)), len(rows)).splitlines(), ""]
    for word, meaning in WORDS.items():
        number = sum(row.get("result") == word for row in rows)
        if number:
            lines.append(f"- **{word}** ({number}): {meaning}")
    return lines


def failures(results):
    """The classes that could not be pruned, or were pruned otherwise than asked for."""
    return sorted(name for name, one in results.items() if one and not can_be_pruned(one))
