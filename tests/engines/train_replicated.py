"""Run by torchrun: train and prune a tiny model on each process; write what each ended with."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed
from models import ARCHITECTURES, bert_examples, training_arguments
from transformers import set_seed

from hf_prune import PruningConfig, PruningTrainer


def main(directory: Path, scope: str) -> None:
    set_seed(0)
    model = ARCHITECTURES["bert"].build()
    args = training_arguments(directory, save_strategy="steps", save_steps=5, gradient_accumulation_steps=2)
    config = PruningConfig(sparsity=0.5, scope=scope, begin=2, end=8, frequency=2)
    trainer = PruningTrainer(model=model, args=args, train_dataset=bert_examples(64), pruning_config=config)
    trainer.train()
    assert torch.distributed.get_world_size() == 2
    rank = torch.distributed.get_rank()
    weights = {name: parameter.tolist() for name, parameter in trainer.pruner.parameters.items()}
    masks = {name: mask.tolist() for name, mask in trainer.pruner.masks.items()}
    (directory / f"rank{rank}.json").write_text(json.dumps({"weights": weights, "masks": masks}))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    # Without taking the process group down: torch 2.13 joins gloo's thread with the interpreter's lock held, and that
    # thread, about to free a tensor, may be waiting for the lock. One run in three then never ended.
    os._exit(0)
