"""What architecture_structures.py found, a line for each class in architecture_structures.jsonl, and its words."""

import json
from pathlib import Path

import peft
import torch
import transformers

RESULTS = Path(__file__).with_name("architecture_structures.jsonl")
STRUCTURES = ("neurons", "heads", "layers", "hidden")

# What a result says: the words in the table, and what they mean.
OPENED = {
    "yes": "Half of them were removed, and a plain `from_pretrained` opens the smaller model.",
    "with import": "The same, but it opens after `import hf_prune`; without it, `from_pretrained` raises an error.",
}
# Why a structure is refused: the word in the table -> what it means, and what the StructureError says.
REFUSED = {
    "no field": (
        "No field of the configuration sets their number without changing something else.",
        r"no field of .* sets the number",
    ),
    "only one": (
        "The tiny model has only one of them.",
        r"there is only one",
    ),
    "outputs": (
        "On a twin with random weights, the smaller model does not answer as the whole one without them.",
        r"outputs differ|outputs of other shapes|does not run",
    ),
    "shapes": (
        "The class builds other tensors from the changed configuration than those that are left, or none at all.",
        r"cannot be built without|without which .* can be built|expected the shape|cannot be built to try",
    ),
    "rows": (
        "Half of the neurons are a number with which these experts cannot be computed together.",
        r"a number of neurons that \d+ divides",
    ),
    "unseen": (
        "They do not change the outputs for the inputs that were tried, so nothing can be compared.",
        r"they do not change the outputs",
    ),
    "widths": (
        "The layers of the model have different widths already.",
        r"all of whose layers have the same widths",
    ),
    "inputs": (
        "No inputs were found to try it with.",
        r"no inputs were found",
    ),
    "class": (
        "The class does not build the same model from the configuration that it has.",
        r"cannot be built from its configuration alone|expected a model as",
    ),
}


def versions():
    """What results are made with."""
    return {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def read_results(path=RESULTS):
    """The versions that the results were made with, and class name -> the result of each structure, and why.

    A class without a tiny model has no results.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [versions()]
    return lines[0], {line.pop("class"): line for line in lines[1:]}


def write_results(results, path=RESULTS):
    """Write the results of these versions, a line for each class, in the order of their names."""
    lines = [versions(), *({"class": name, **results[name]} for name in sorted(results))]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def failures(results):
    """The classes of which something failed that was not refused."""
    return sorted(name for name, one in results.items() if "error" in one or "fails" in one.values())
