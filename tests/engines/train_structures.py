"""Run by processes of a group: remove structures from a tiny BERT under an engine, and save what is left."""

import json
from pathlib import Path

import torch
from models import bert, bert_examples
from train import make_arguments, whole_weights
from transformers import set_seed

from hf_prune import PruningConfig, PruningTrainer, StructureError

WINDOW = {"method": "taylor", "begin": 1, "end": 5, "frequency": 1}
CONFIGS = {
    "small": [{"structure": "neurons", "sparsity": 0.75, **WINDOW}, {"structure": "layers", "sparsity": 0.5, **WINDOW}],
    "different": [
        {"structure": "neurons", "scope": "global", "sparsity": 0.75, **WINDOW},
        {"structure": "layers", "sparsity": 0.25, **WINDOW},
    ],
    "narrow": [{"structure": "hidden", "sparsity": 0.5, **WINDOW}],
    "target": [{"target_parameters": 0.6, **WINDOW}],
    "target_per_layer": [{"target_parameters": 0.6, "scope": "global", **WINDOW}],
}


def dense():
    set_seed(0)
    return bert(num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def main(directory, engine, kind):
    case = {"engine": engine, "model": "bert", "arguments": {"max_steps": 8}}
    trainer = PruningTrainer(
        model=dense(),
        args=make_arguments(directory, case),
        train_dataset=bert_examples(48),
        pruning_config=[PruningConfig(**config) for config in CONFIGS[kind]],
    )
    trainer.train()
    trainer.save_model(str(directory / "saved"))
    weights = whole_weights(trainer.model)
    left = None if trainer.pruner.chosen is None else trainer.pruner.chosen.candidate.parameters
    if torch.distributed.get_rank() == 0:
        torch.save({"weights": weights, "sparsity": trainer.pruner.sparsity, "left": left}, directory / "result.pt")


class Spoiling(PruningTrainer):
    """Writes another number of neurons into the configuration that it saves."""

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if torch.distributed.get_rank() == 0:
            path = Path(output_dir, "config.json")
            content = json.loads(path.read_text())
            path.write_text(json.dumps(content | {"intermediate_size": content["intermediate_size"] + 1}))


def refused_save(directory):
    """Write into a file what each process raises that saves the smaller model of a sharded one, spoilt."""
    case = {"engine": "fsdp", "model": "bert", "arguments": {"max_steps": 6}}
    trainer = Spoiling(
        model=dense(),
        args=make_arguments(directory, case),
        train_dataset=bert_examples(48),
        pruning_config=[PruningConfig(**config) for config in CONFIGS["small"]],
    )
    trainer.train()
    try:
        trainer.save_model(str(directory / "saved"))
    except StructureError as error:
        (directory / f"{torch.distributed.get_rank()}.txt").write_text(str(error))
