"""Tiny models out of which units were cut, saved as a loop of one's own saves them."""

import torch
from models import bert

from hf_prune import Pruner, PruningConfig

NEURONS = PruningConfig(structure="neurons", sparsity=0.75, begin=0, end=1, frequency=1)
LAYERS = PruningConfig(structure="layers", sparsity=0.5, begin=0, end=1, frequency=1)


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
