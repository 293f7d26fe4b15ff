"""A training loop with accelerate and `Pruner`; run it again, and it resumes from what it saved last.

With a network: `python recipes/accelerate_loop.py --output_dir outputs/loop --sparsity 0.5`, or `accelerate launch`.
Without a network, give folders with `--model_name` and `--dataset_name`. All flags of `hf_prune.PruningConfig` work.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, HfArgumentParser

from hf_prune import Pruner, PruningConfig


@dataclass
class Arguments:
    output_dir: str
    model_name: str = "HuggingFaceTB/SmolLM2-135M"
    dataset_name: str = "roneneldan/TinyStories"
    batch_size: int = 8
    learning_rate: float = 1e-4
    steps: int = 1000
    save_every: int = 100
    cpu: bool = False


def main() -> None:
    args, pruning_config = HfArgumentParser((Arguments, PruningConfig)).parse_args_into_dataclasses()
    set_seed(0)
    # The order of the data must not depend on when the run is resumed.
    accelerator = Accelerator(cpu=args.cpu, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model_name)
    data = load_dataset(args.dataset_name, split=f"train[:{args.batch_size * args.steps}]")
    data = data.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=256), remove_columns=data.column_names
    )
    batches = DataLoader(
        data, args.batch_size, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)

    pruner = Pruner(accelerator.unwrap_model(model), pruning_config)
    checkpoint = Path(args.output_dir, "checkpoint")
    if checkpoint.exists():
        accelerator.load_state(checkpoint)
        pruner.resume(len(batches), checkpoint, optimizer=optimizer)
    else:
        pruner.start(len(batches), optimizer=optimizer)

    model.train()
    for batch in accelerator.skip_first_batches(batches, pruner.completed_steps):
        accelerator.backward(model(**batch).loss)
        pruner.mask_gradients()  # before gradients are clipped
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        if pruner.completed_steps % args.save_every == 0:
            accelerator.save_state(checkpoint)
            pruner.save_from_all(checkpoint, accelerator.is_main_process)
    accelerator.print(f"{pruner.sparsity:.2%} of the weights in {len(pruner.targets)} tensors are zero")

    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.output_dir)
    pruner.save_from_all(args.output_dir, accelerator.is_main_process)


if __name__ == "__main__":
    main()
