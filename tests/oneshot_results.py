"""What architecture_oneshot.py found, a line for each class in architecture_oneshot.jsonl, and its words."""

from pathlib import Path

RESULTS = Path(__file__).with_name("architecture_oneshot.jsonl")
METHODS = ("sparsegpt", "wanda")

# What a result says: the word in the table, and what it means.
WORDS = {
    "yes": "Every tensor was pruned, and the outputs are equal bit for bit.",
    "rounding": "The same, but some of the outputs differ by rounding.",
    "unreached": (
        "The class uses some weights without calling their layers. Without `leave_unreached=True`, it is an error that "
        "names one; with it, these stay dense, and the outputs are equal bit for bit."
    ),
    "random": "The class draws random numbers while it is evaluated: counts and zeros are right, outputs cannot be compared.",
    "none": "It has no weights of the kinds that are pruned by default.",
}
PRUNED = ("yes", "rounding", "unreached", "random")


def failures(results):
    """The classes that could not be pruned, or were pruned otherwise than asked for."""
    return sorted(name for name, one in results.items() if one and one.get("result") not in WORDS)
