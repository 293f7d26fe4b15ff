"""Perplexity of a language model right after units are removed, before any training: which methods cost least.

python benchmarks/language_structures.py [--rows "neurons 1024 wanda least_squares" ...] [--tokens 6144]

The model and the film reviews are those of recipes/generation.yaml. Units are removed in one step, after
forward passes over calibration tokens of the training split; perplexity is that of the test split. Each row is written
into `rows.jsonl` of the folder `--output` as soon as it is measured, and not measured again.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import datasets
import torch
from transformers import PreTrainedModel, logging

from hf_prune import Pruner, PruningConfig
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import prepare

RECIPE = Path(__file__).parents[1] / "recipes" / "generation.yaml"

# Structure, units that are kept of 1536 neurons or 30 layers, method, reconstruction.
ROWS = [
    *(
        f"neurons {kept} {method} {reconstruction}"
        for kept in (1024, 1280, 768)
        for method in ("wanda", "activation")
        for reconstruction in ("least_squares", "none")
    ),
    *(
        f"layers {kept} {method} none"
        for kept in (28, 26, 24, 20)
        for method in ("block_influence", "wanda", "taylor", "activation", "magnitude")
    ),
]
UNITS = {"neurons": 1536, "layers": 30}


def config_of(row: str) -> PruningConfig:
    """What a row removes, after one step of calibration."""
    structure, kept, method, reconstruction = row.split()
    return PruningConfig(
        structure=structure,
        method=method,
        sparsity=1 - int(kept) / UNITS[structure],
        schedule="one_shot",
        begin=1,
        reconstruction=None if reconstruction == "none" else reconstruction,
    )


def prune(model: PreTrainedModel, config: PruningConfig, calibration: torch.Tensor) -> None:
    """Remove units, with what is read in passes over (blocks, tokens): forward alone, or backward for gradients."""
    pruner = Pruner(model.train(), config, total_steps=1)
    for blocks in calibration.split(8):
        with torch.set_grad_enabled(pruner.needs_gradients):
            loss = model(input_ids=blocks, labels=blocks).loss
        if pruner.needs_gradients:
            loss.backward()
    pruner.mask_gradients()
    pruner.step()
    pruner.shrink()
    model.zero_grad()


@torch.no_grad()
def perplexity_of(model: PreTrainedModel, test: torch.Tensor) -> float:
    """`exp` of the mean loss of a token, of blocks of tokens."""
    model.eval()
    losses = [float(model(input_ids=block[None], labels=block[None]).loss) for block in test]
    return math.exp(sum(losses) / len(losses))


def blocks_of(data: datasets.Dataset, tokens: int) -> torch.Tensor:
    """The first blocks of a split (blocks, tokens), with so many tokens in all."""
    blocks = torch.tensor(data["input_ids"])
    return blocks[: tokens // blocks.shape[1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=ROWS)
    parser.add_argument("--tokens", type=int, default=6144, help="of calibration")
    parser.add_argument("--test-tokens", type=int, default=16384)
    parser.add_argument("--output", type=Path, default=Path("outputs/language_structures"))
    options = parser.parse_args()
    logging.set_verbosity_error()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    setting = {"tokens": options.tokens, "test_tokens": options.test_tokens}
    measured = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {one["row"]: one["perplexity"] for one in measured if {key: one[key] for key in setting} == setting}
    missing = [row for row in ("dense", *options.rows) if row not in done]
    if missing:
        prepared = prepare(load_recipe(RECIPE, ["dense=null"]))
        calibration = blocks_of(prepared.data["train"], options.tokens)
        test = blocks_of(prepared.data["test"], options.test_tokens)
    for row in missing:
        began = time.process_time()
        model = copy.deepcopy(prepared.model)
        if row != "dense":
            prune(model, config_of(row), calibration)
        done[row] = perplexity_of(model, test)
        seconds = round(time.process_time() - began)
        line = json.dumps({"row": row, **setting, "perplexity": done[row], "cpu_seconds": seconds})
        with path.open("a") as file:
            file.write(f"{line}\n")
        print(f"{row}: {done[row]:.1f}, {done[row] / done['dense']:.3f} of dense ({seconds} s of CPU)", flush=True)
    print("\n| removed | perplexity | relative to dense |\n|---|---|---|")
    for row in ("dense", *options.rows):
        print(f"| {row} | {done[row]:.1f} | {done[row] / done['dense']:.2f} |")


if __name__ == "__main__":
    main()
