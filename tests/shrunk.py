"""Tiny models out of which units were cut, saved as a loop of one's own saves them."""

import torch
from models import bert

from hf_prune import Pruner, PruningConfig
from hf_prune.structure.chosen import Chosen
from hf_prune.structure.search import Candidate

NEURONS = PruningConfig(structure="neurons", sparsity=0.75, begin=0, end=1, frequency=1)
LAYERS = PruningConfig(structure="layers", sparsity=0.5, begin=0, end=1, frequency=1)


def chosen_of(**changes):
    """A choice for twice the speed, as it lies beside a model: three quarters of the neurons and half of the layers."""
    dense = Candidate({}, 0.01, 5000, 0.0)
    between = Candidate({"neurons": 0.5}, 0.007, 4000, 0.1)
    candidate = Candidate({"neurons": 0.75, "layers": 0.5}, 0.004, 3000, 0.25)
    conditions = {"processor": "a processor", "accelerator": "cpu", "threads": 1, "dtype": "float32"}
    values = {
        "config": PruningConfig(target_speedup=2),
        "candidate": candidate,
        "dense": dense,
        "frontier": (dense, between, candidate),
        "units": {"neurons": 24, "layers": 4},
        "conditions": conditions | {"inputs": {"input_ids": [1, 64]}},
        "reached": (0.012, 0.005),
    }
    return Chosen(**values | changes)


def save_shrunk(folder, configs=(NEURONS, LAYERS), model=None):
    """A model without zeros, BERT with four layers unless one is given, out of which units are cut; its pruner."""
    model = bert(num_hidden_layers=4) if model is None else model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    pruner = Pruner(model, list(configs), total_steps=2)
    pruner.step()
    pruner.shrink()
    model.save_pretrained(folder)
    pruner.save(folder)
    return pruner
