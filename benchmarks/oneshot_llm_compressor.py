"""Prune a language model at once with llm-compressor.

python benchmarks/oneshot_llm_compressor.py --model FOLDER --windows FILE --settings JSON --output FOLDER

`oneshot_rival.py` runs this in an environment without hf-prune. It does what llm-compressor's own examples do: one
modifier with its defaults for all linear layers but the head, and its sequential pipeline, which prunes one decoder
layer after another and computes it again with the new weights. Sequential targets are those that it finds itself.
"""

from collections.abc import Mapping
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from oneshot_measure import run
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def prune(model: PreTrainedModel, windows: torch.Tensor, settings: Mapping[str, Any]) -> None:
    """Prune a model in place; settings: `method`, `sparsity`, `pattern`."""
    pattern = settings["pattern"]
    modifier = MODIFIERS[settings["method"]](
        sparsity=settings["sparsity"],
        mask_structure="0:0" if pattern == "unstructured" else pattern,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    samples = [{"input_ids": window, "attention_mask": torch.ones_like(window)} for window in windows]
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=settings["batch_size"]),
        recipe=modifier,
        pipeline="sequential",
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
    )


if __name__ == "__main__":
    run(prune, ["llmcompressor", "compressed-tensors"])
