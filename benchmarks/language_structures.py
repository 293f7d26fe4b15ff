"""Perplexity of a language model right after units are removed, before any training, and how much faster it writes.

python benchmarks/language_structures.py [--rows "neurons 1024 wanda least_squares" ...] [--tokens 6144]

The model and the film reviews are those of recipes/generation.yaml. Units are removed in one step, after
forward passes over calibration tokens of the training split; perplexity is that of the test split. Speeds are measured
in turns with the dense model: 32 tokens written one by one after 16, in CPU time on one thread, the most of three. Each
row is written into `rows.jsonl` of the folder `--output` as soon as it is measured, and not measured again.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
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
    "neurons 1280 wanda least_squares + layers 28 block_influence none",
    "neurons 1024 wanda least_squares + layers 26 block_influence none",
]
UNITS = {"neurons": 1536, "layers": 30}


PROMPT, WRITTEN = 16, 32  # tokens that are read, and then written one by one


def configs_of(row: str) -> list[PruningConfig]:
    """What a row removes, after one step of calibration: one structure, or several with ` + ` between."""
    return [config_of(part) for part in row.split(" + ")]


def config_of(part: str) -> PruningConfig:
    """How one structure is removed."""
    structure, kept, method, reconstruction = part.split()
    return PruningConfig(
        structure=structure,
        method=method,
        sparsity=1 - int(kept) / UNITS[structure],
        schedule="one_shot",
        begin=1,
        reconstruction=None if reconstruction == "none" else reconstruction,
    )


def prune(model: PreTrainedModel, configs: list[PruningConfig], calibration: torch.Tensor) -> None:
    """Remove units, with what is read in passes over (blocks, tokens): forward alone, or backward for gradients."""
    pruner = Pruner(model.train(), configs, total_steps=1)
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


def tokens_a_second(models: Sequence[PreTrainedModel], prompt: torch.Tensor) -> list[float]:
    """Tokens that each model writes after a prompt (1, tokens) in a second of CPU time, in turns: the most of three."""
    most = [0.0 for _ in models]
    for _ in range(1 + 3):  # the first warms up
        for index, model in enumerate(models):
            began = time.process_time()
            model.eval().generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=WRITTEN,
                max_new_tokens=WRITTEN,
                do_sample=False,
                pad_token_id=0,
            )
            most[index] = max(most[index], WRITTEN / (time.process_time() - began))
    return most


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
    done = {one["row"]: one for one in measured if {key: one[key] for key in setting} == setting}
    missing = [row for row in ("dense", *options.rows) if row not in done]
    torch.set_num_threads(1)
    if missing:
        prepared = prepare(load_recipe(RECIPE, ["dense=null"]))
        calibration = blocks_of(prepared.data["train"], options.tokens)
        test = blocks_of(prepared.data["test"], options.test_tokens)
    for row in missing:
        began = time.process_time()
        model = copy.deepcopy(prepared.model)
        if row != "dense":
            prune(model, configs_of(row), calibration)
        perplexity = perplexity_of(model, test)
        of_dense, written = tokens_a_second([prepared.model, model], test[:1, :PROMPT])
        done[row] = {
            "row": row,
            **setting,
            "perplexity": perplexity,
            "tokens_a_second": written,
            "times_faster": written / of_dense,
            "parameters": model.num_parameters(),
            "cpu_seconds": round(time.process_time() - began),
        }
        with path.open("a") as file:
            file.write(f"{json.dumps(done[row])}\n")
        print(f"{row}: {perplexity:.1f} ({done[row]['cpu_seconds']} s of CPU)", flush=True)
    print("\n| removed | parameters | perplexity | relative to dense | tokens a second | times faster |")
    print("|---|---|---|---|---|---|")
    for row in ("dense", *options.rows):
        one = done[row]
        print(
            f"| {row} | {one['parameters'] / 1e6:.1f} million | {one['perplexity']:.1f} "
            f"| {one['perplexity'] / done['dense']['perplexity']:.2f} | {one['tokens_a_second']:.1f} "
            f"| {one['times_faster']:.2f} |"
        )


if __name__ == "__main__":
    main()
