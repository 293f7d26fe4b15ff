"""SIGTERM with `enable_jit_checkpoint`: every process saves and stops at the end of the same optimizer step."""

from typing import Any

import torch
from transformers import Trainer, TrainerControl

from ..engines.processes import all_reduce
from ..foreign.transformers import JITCheckpointCallback, jit_parts


class SaveAtStepEnd(JITCheckpointCallback):
    """Saves and stops on SIGTERM, as `enable_jit_checkpoint` requests, but only at the end of an optimizer step.

    The Trainer's own callback saves before the optimizer step, with the random state of a batch that will be drawn
    again: a resumed run would differ. It also creates the checkpoint's folder empty. And it considers its own process
    only: a process that got the signal would save, and wait for others that continue to train.

    Args:
        stock: the Trainer's own callback, which has installed the signal handler.
    """

    def __init__(self, stock: JITCheckpointCallback):
        super().__init__()
        self.trainer, self.jit_manager = jit_parts(stock)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the end of the step."""

    on_step_begin = on_epoch_end = on_pre_optimizer_step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Make the Trainer save and stop if any process got the signal; every process must call it after each step."""
        if self.jit_manager is None:
            return
        requests = torch.tensor([int(self.jit_manager.is_checkpoint_requested)])
        if int(all_reduce(requests)) > 0:
            self.jit_manager.is_checkpoint_requested = False
            control.should_save = True
            control.should_training_stop = True


def save_on_sigterm_at_step_end(trainer: Trainer) -> None:
    """Replace the Trainer's own callback with `SaveAtStepEnd`, if `enable_jit_checkpoint` is set."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, JITCheckpointCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(SaveAtStepEnd(callback))
