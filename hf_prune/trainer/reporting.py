"""Figures of an explanation where a Trainer reports to: TensorBoard, Trackio, Weights & Biases and others."""

from transformers import Trainer

from ..explain.headline import headline
from ..foreign.transformers import reporting_callbacks
from ..publish.explanation import Explanation


def report_explanation(trainer: Trainer, explanation: Explanation, split: str) -> None:
    """Send the headline figures of an explanation, as `SPLIT/explain_NAME`, where a Trainer reports to, if anywhere.

    They are not in the Trainer's own log, of which cards are made. `split` is `eval` or `test`.
    """
    figures = {f"{split}_explain_{name}": value for name, value in headline(explanation).items()}
    for callback in reporting_callbacks(trainer):
        callback.on_log(trainer.args, trainer.state, trainer.control, model=trainer.model, logs=figures)
