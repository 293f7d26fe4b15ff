"""Prune a language model at once with hf-prune, in a process of its own, for a row of `oneshot.py`.

python benchmarks/oneshot_hf_prune.py --model FOLDER --windows FILE --settings JSON --output FOLDER
"""

from collections.abc import Mapping
from typing import Any

import torch
from oneshot_measure import run
from transformers import PreTrainedModel

from hf_prune import CalibrationConfig, PruningConfig
from hf_prune import prune as prune_at_once


def prune(model: PreTrainedModel, windows: torch.Tensor, settings: Mapping[str, Any]) -> None:
    """Prune a model in place; settings: `sparsity`, `pattern`, and fields of both configurations."""
    fields = dict(settings["pruning"]) | {"pattern": settings["pattern"], "sparsity": settings["sparsity"]}
    if settings["pattern"] != "unstructured":  # an n:m pattern says how sparse, in every row
        fields = {name: value for name, value in fields.items() if name not in ("sparsity", "scope")}
    config = PruningConfig(**fields)
    calibration = CalibrationConfig(batch_size=settings["batch_size"], **settings["calibration"])
    prune_at_once(model, config, windows, calibration)


if __name__ == "__main__":
    run(prune, ["hf-prune"])
