"""Run by processes of a group: train on each process, push during training and at its end."""

from pathlib import Path

import torch.distributed
from models import bert, bert_examples, training_arguments
from transformers import set_seed

from hf_prune import PruningConfig, PruningTrainer
from hf_prune.errors import PushError
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.run import run


def print_refusal(recipe: Path) -> None:
    """Run a recipe that the Hub refuses at the start, and print why."""
    try:
        run(load_recipe(recipe))
    except PushError as error:
        print(error)


def main(directory: Path) -> None:
    set_seed(0)
    args = training_arguments(
        directory,
        push_to_hub=True,
        hub_model_id="somebody/replicated",
        hub_always_push=True,
        save_strategy="steps",
        save_steps=5,
    )
    trainer = PruningTrainer(
        model=bert(),
        args=args,
        train_dataset=bert_examples(64),
        eval_dataset=bert_examples(13),
        pruning_config=PruningConfig(sparsity=0.5),
    )
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    assert torch.distributed.get_world_size() == 2
    assert trainer.failed_pushes == []
    torch.distributed.barrier()
