"""SIGTERM with `enable_jit_checkpoint`: every process saves and stops at the end of the same optimizer step."""

from typing import Any

import torch
from transformers import Trainer, TrainerControl

from ..engines.processes import all_reduce
from ..foreign.transformers import JITCheckpointCallback, jit_parts


class SaveAtStepEnd(JITCheckpointCallback):
    """Saves and stops on SIGTERM as `enable_jit_checkpoint` asks for, but only when the step is wholly done.

    The Trainer's own saves before the optimizer step, with the random state of a batch that will be drawn again: a
    resumed run would differ. It also makes the checkpoint's folder before anything is in it. And it looks at its own
    process alone: one that got the signal would save and wait there for others that go on.

    Args:
        stock: the Trainer's own callback, which has installed the handler of the signal.
    """

    def __init__(self, stock: JITCheckpointCallback):
        super().__init__()
        self.trainer, self.jit_manager = jit_parts(stock)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the end of the step."""

    on_step_begin = on_epoch_end = on_pre_optimizer_step

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Let the Trainer save and stop if any process got the signal; every process must come here after each step."""
        if self.jit_manager is None:
            return
        requests = torch.tensor([int(self.jit_manager.is_checkpoint_requested)])
        if int(all_reduce(requests)) > 0:
            self.jit_manager.is_checkpoint_requested = False
            control.should_save = True
            control.should_training_stop = True


def save_on_sigterm_at_step_end(trainer: Trainer) -> None:
    """Put `SaveAtStepEnd` in place of the Trainer's own callback, where `enable_jit_checkpoint` has given it one."""
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, JITCheckpointCallback):
            trainer.remove_callback(callback)
            trainer.add_callback(SaveAtStepEnd(callback))
