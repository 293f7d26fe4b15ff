"""The final figures of a run, where its Trainer reports to: TensorBoard, Trackio, Weights & Biases and others."""

import sys

from transformers import Trainer

from ..foreign.transformers import reporting_callbacks
from .outcome import RunResult


def log_result(trainer: Trainer, result: RunResult) -> None:
    """Log the final figures of a run once, as the Trainer logs its own: metrics, sparsity, size and times.

    Names begin with `test_`, and those of metrics on the validation split with `eval_`.
    """
    if not trainer.args.report_to:
        return
    of_validation = (result.validation or {}).get("pruned") or {}
    figures = {
        **{f"test_{name}": value for name, value in result.pruned.items()},
        **{f"eval_{name}": value for name, value in of_validation.items()},
        "test_prunable_sparsity": result.report.prunable_sparsity,
        "test_overall_sparsity": result.report.sparsity,
        "test_parameters": result.parameters["pruned"],
        "test_file_bytes": result.file_bytes["pruned"],
        **{f"test_milliseconds_{cost.samples}": 1000 * cost.model.seconds for cost in result.costs},
    }
    trainer.log({name: float(value) for name, value in figures.items() if value is not None})


def close_reports(trainer: Trainer) -> None:
    """End the run that a Trainer reports as, which its evaluations have opened again, so that the next has its own."""
    for callback in reporting_callbacks(trainer):
        callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    finish_wandb()


def finish_wandb() -> None:
    """End the current run of Weights & Biases, which its callback leaves open, if there is one in this process."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
