"""Accuracy of PruningTrainer against the same schedule written by hand with `torch.nn.utils.prune`, at equal budget.

python benchmarks/quality.py [--sparsities 0.6 0.8 0.9] [--seeds 42 1 2] [--threads 2]

The model, data and training are those of recipes/quickstart.yaml. For each seed one dense run is made; from there both
prune at each sparsity in one ranking of all layers, after the same steps, with the same batches in the same order.
"""

import argparse
import copy
import statistics
from pathlib import Path

import torch
from torch.nn.utils import prune
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, logging

from hf_prune import PruningTrainer
from hf_prune.recipe import load_recipe
from hf_prune.run import prepare

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"


class PruneByHand(TrainerCallback):
    """What is written without a library for it: `global_unstructured` at each step that the schedule names."""

    def __init__(self, tensors, updates):
        self.tensors = tensors  # (module, "weight")
        self.weights = sum(module.weight.numel() for module, _ in tensors)
        self.updates = {update.step: update.sparsity for update in updates}
        self.dropped = 0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.updates:
            more = round(self.updates[state.global_step] * self.weights) - self.dropped
            prune.global_unstructured(self.tensors, pruning_method=prune.L1Unstructured, amount=more)
            self.dropped += more

    def on_train_end(self, args, state, control, **kwargs):
        for module, name in self.tensors:
            prune.remove(module, name)


def train(prepared, dense=False, by_hand=False):
    """Train the prepared model as the recipe says; its accuracy on the test part and its share of zeros."""
    recipe, model = prepared.recipe, prepared.model
    keywords = {
        "model": model,
        "args": recipe.training_arguments(dense, eval_strategy="no", logging_strategy="no", disable_tqdm=True),
        "train_dataset": prepared.data["train"],
        "processing_class": prepared.tokenizer,
        "data_collator": DataCollatorWithPadding(prepared.tokenizer),
        "compute_metrics": prepared.compute_metrics,
    }
    plan = prepared.plan()
    modules = [model.get_submodule(tensor.name.removesuffix(".weight")) for tensor in plan.tensors]
    if by_hand:
        callback = PruneByHand([(module, "weight") for module in modules], plan.updates)
        trainer = Trainer(**keywords, callbacks=[callback])
    elif dense:
        trainer = Trainer(**keywords)
    else:
        trainer = PruningTrainer(**keywords, pruning_config=recipe.pruning_configs)
    trainer.train()
    accuracy = trainer.predict(prepared.data["test"]).metrics["test_accuracy"]
    zeros = sum(int((module.weight == 0).sum()) for module in modules)
    return accuracy, zeros / sum(module.weight.numel() for module in modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.8, 0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found: dict[tuple[float, str], list[float]] = {}
    for seed in options.seeds:
        prepared = prepare(load_recipe(RECIPE, [f"training.seed={seed}"]))
        accuracy, _ = train(prepared, dense=True)
        print(f"seed {seed}: dense {accuracy:.4f}", flush=True)
        dense = copy.deepcopy(prepared.model.state_dict())
        for sparsity in options.sparsities:
            for name in ("PruningTrainer", "by hand"):
                recipe = load_recipe(RECIPE, [f"training.seed={seed}", f"pruning.sparsity={sparsity}"])
                pruned = prepare(recipe)
                pruned.model.load_state_dict(dense)
                accuracy, zeros = train(pruned, by_hand=name == "by hand")
                found.setdefault((sparsity, name), []).append(accuracy)
                print(f"seed {seed}: {zeros:.4%} zeros, {name}: {accuracy:.4f}", flush=True)
    print(f"accuracy over seeds {options.seeds}: mean, and spread as highest less lowest")
    for (sparsity, name), values in found.items():
        print(f"{sparsity:.0%} {name:>14}: {statistics.mean(values):.4f}, {max(values) - min(values):.4f}")


if __name__ == "__main__":
    main()
