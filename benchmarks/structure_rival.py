"""Models that Torch-Pruning has pruned, for the rows of `structure.py`.

Torch-Pruning runs in an environment of its own (`structure_torch_pruning.py`). It gets the folder of the dense model
and ten batches of the training data, and hands over weights, the widths of its modules, and the answers to the first
batch. The model is built here with these widths in its configuration, and has to give the same answers.
"""

import json
import os
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from hf_prune.recipe.prepare import Prepared

ROOT = Path(__file__).parents[1]
PACKAGE = "torch-pruning==1.6.1"

# As in the examples of Torch-Pruning for transformers.
BATCHES, BATCH_SIZE = 10, 64

# The largest difference of a logit that two builds of the same sums may have.
CLOSE = 1e-4


def make_environment(folder: Path) -> None:
    """Make the environment of Torch-Pruning in a folder, with our versions of torch and transformers; once."""
    installed = folder / "installed"
    if installed.exists() and installed.read_text(encoding="utf-8") == PACKAGE:
        return
    print(f"installing {PACKAGE} into {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    pip = [python_of(folder), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, PACKAGE, "transformers", "safetensors"], check=True)
    installed.write_text(PACKAGE, encoding="utf-8")


def python_of(environment: Path) -> str:
    """The interpreter of an environment."""
    return str(environment.absolute() / "bin" / "python")


def pruned_by_torch_pruning(
    prepared: Prepared, dense: Path, options: Sequence[str], environment: Path, folder: Path
) -> PreTrainedModel:
    """What Torch-Pruning makes of the dense model of a folder with these options of `structure_torch_pruning.py`.

    What it hands over is kept in `folder`. Parameters are frozen where they are in `prepared.model`. Raises
    RuntimeError if the model that is built here gives other answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = training_batches(prepared)
    save_file(
        {f"{index}.{name}": one for index, batch in enumerate(batches) for name, one in batch.items()},
        folder / "batches.safetensors",
    )
    script = ROOT / "benchmarks" / "structure_torch_pruning.py"
    files = ["--dense", str(dense), "--batches", str(folder / "batches.safetensors"), "--output", str(folder)]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    found = subprocess.run(
        [python_of(environment), str(script), *options, *files],
        env=os.environ | threads,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise RuntimeError(f"Torch-Pruning has failed:\n{found.stderr}")
    model = read_pruned(prepared.model, folder)
    difference = difference_of_answers(model, batches[0], folder)
    if not difference <= CLOSE:
        raise RuntimeError(f"expected the pruned model's answers up to {CLOSE}, got a difference of {difference:.1e}")
    return model


def training_batches(prepared: Prepared) -> list[dict[str, torch.Tensor]]:
    """The first batches of the training samples in the order of the seed, as tensors."""
    shuffled = prepared.data["train"].shuffle(seed=prepared.recipe.training["seed"])
    collate = prepared.task.collator(prepared.tokenizer, prepared.model)
    batches = []
    for start in range(0, min(BATCHES * BATCH_SIZE, len(shuffled)), BATCH_SIZE):
        samples = [shuffled[index] for index in range(start, min(start + BATCH_SIZE, len(shuffled)))]
        batches.append({name: one.contiguous() for name, one in collate(samples).items()})
    return batches


def read_pruned(dense: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model that was handed over in a folder, in evaluation mode; frozen where the dense one is."""
    widths = json.loads((folder / "widths.json").read_text(encoding="utf-8"))
    model = type(dense)(config_of(dense.config, widths)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for name, parameter in dense.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    return model


def config_of(dense: PreTrainedConfig, widths: dict[str, Any]) -> PreTrainedConfig:
    """The configuration of a model with these widths; where it has one number for all layers, `per_layer_config`."""
    fields: dict[str, Any] = {
        "hidden_size": widths["hidden"],
        "num_attention_heads": widths["hidden"] // widths["head_size"],
        "intermediate_size": max(widths["neurons"]),
    }
    own = [
        {"intermediate_size": neurons, "num_attention_heads": heads}
        for neurons, heads in zip(widths["neurons"], widths["heads"], strict=True)
    ]
    if any(layer[name] != fields[name] for layer in own for name in layer):
        fields |= {"head_dim": widths["head_size"], "per_layer_config": {str(i): layer for i, layer in enumerate(own)}}
    return type(dense).from_dict(dense.to_dict() | fields)


def difference_of_answers(model: PreTrainedModel, batch: dict[str, torch.Tensor], folder: Path) -> float:
    """The largest difference of a logit from those that were handed over in a folder."""
    inputs = {name: one for name, one in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits
    return float((logits - load_file(folder / "answers.safetensors")["logits"]).abs().max())
