"""Runs in processes of their own for test_crashes.py: training that is killed at a chosen moment of writing."""

import os
import signal
import sys
import warnings
from pathlib import Path

import torch
from models import bert, bert_examples, training_arguments
from transformers import TrainerCallback, set_seed

from hf_prune import PruningConfig, PruningTrainer

WATCHED_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Watch:
    """Counts what is done to files in a directory, and ends the process without warning at the chosen count."""

    def __init__(self, directory: Path, kill_at: int | None):
        self.directory, self.kill_at, self.count = str(directory), kill_at, 0
        sys.addaudithook(self.notice)

    def notice(self, event, arguments):
        if event not in WATCHED_EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if not str(arguments[0]).startswith(self.directory):
            return
        if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


class SendSigterm(TrainerCallback):
    """SIGTERM to the process itself, in the middle of a step."""

    def __init__(self, step: int):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def train(
    directory: Path, resume: bool = False, kill_at: int | None = None, sigterm_at: int | None = None, **changes
) -> None:
    """Train to the end and write `result.pt` beside the checkpoints: weights, masks, optimizer state, file events."""
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    output = directory / "out"
    output.mkdir(parents=True, exist_ok=True)
    watch = Watch(output, kill_at)
    set_seed(0)
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2} | changes
    trainer = PruningTrainer(
        model=bert(),
        args=training_arguments(output, **arguments),
        train_dataset=bert_examples(),
        pruning_config=PruningConfig(sparsity=0.7, scope="global", begin=1, end=7, frequency=2),
    )
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "jit_manager", None) is not None:
            callback.jit_manager.kill_wait = 0
    if sigterm_at is not None:
        trainer.add_callback(SendSigterm(sigterm_at))
    trainer.train(resume_from_checkpoint=resume)
    result = {
        "weights": trainer.model.state_dict(),
        "masks": trainer.pruner.masks,
        "optimizer": trainer.optimizer.state_dict()["state"],
        "events": watch.count,
        "steps": trainer.state.global_step,
    }
    torch.save(result, directory / "result.pt")
