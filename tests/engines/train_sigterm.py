"""Run by processes of a group: train to the end, then until one gets SIGTERM, and go on. Write how each run ended."""

import faulthandler
import os
import signal
import time

import torch
import torch.distributed
from models import bert, bert_examples, training_arguments
from transformers import TrainerCallback, set_seed

from hf_prune import PruningConfig, PruningTrainer
from hf_prune.trainer.sigterm import SaveAtStepEnd

SIGNALLED_RANK, SIGNALLED_STEP = 1, 7


class SendSigterm(TrainerCallback):
    """SIGTERM to this process alone in the middle of a step, which goes on when the signal has been noticed."""

    def __init__(self, jit_manager):
        self.jit_manager = jit_manager

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step + 1 == SIGNALLED_STEP:
            os.kill(os.getpid(), signal.SIGTERM)
            while not self.jit_manager.is_checkpoint_requested:
                time.sleep(0.001)


def train(output, result, sends_sigterm=False, resume=False):
    set_seed(0)
    trainer = PruningTrainer(
        model=bert(),
        args=training_arguments(output, max_steps=12, enable_jit_checkpoint=True),
        train_dataset=bert_examples(64),
        pruning_config=PruningConfig(sparsity=0.5, scope="global", begin=2, end=10, frequency=2),
    )
    (saver,) = (each for each in trainer.callback_handler.callbacks if isinstance(each, SaveAtStepEnd))
    saver.jit_manager.kill_wait = 0
    rank = torch.distributed.get_rank()
    if sends_sigterm and rank == SIGNALLED_RANK:
        trainer.add_callback(SendSigterm(saver.jit_manager))
    trainer.train(resume_from_checkpoint=resume)
    ended = {
        "steps": trainer.state.global_step,
        "weights": {name: weight.clone() for name, weight in trainer.model.state_dict().items()},
        "masks": trainer.pruner.masks,
    }
    torch.save(ended, f"{result}-rank{rank}.pt")
    torch.distributed.barrier()


def main(directory):
    faulthandler.dump_traceback_later(180, exit=True)  # processes that parted ways would wait for each other for ever
    train(directory / "whole", directory / "whole")
    train(directory / "stopped", directory / "stopped", sends_sigterm=True)
    train(directory / "stopped", directory / "resumed", resume=True)
