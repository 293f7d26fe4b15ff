"""`load_masks`: saved masks on a model that is not trained."""

import os
from pathlib import Path

from torch import nn

from ..config.checks import as_path
from ..config.pruning import CONFIG_NAME, load_configs, written_expressions
from ..errors import PruningStateError
from ..model.expressions import refuse_slow
from ..model.names import every_name
from ..saved.pruning_state import state_files
from ..structure.record import read_structure
from .finding import check_model
from .pruner import Pruner


def load_masks(model: nn.Module, directory: str | os.PathLike) -> None:
    """Set the weights of a model to zero that are masked in a directory where a pruned model was saved.

    This is for PEFT adapters, which are saved without their base model: on the dense base model with the adapters
    (`PeftModel.from_pretrained`) it restores the sparse base, and masks the updates of `sparse_merge` adapters as in
    training. Adapters pruned with `sparse_adapters` have their zeros in their own file; for them it does nothing.

    Raises PruningStateError, before anything is changed, if the directory has no masks or those of another model, or
    one out of which units were cut: its masks are of fewer rows and columns than the dense model has. Raises
    TargetError for a regular expression in its configuration that takes too long to match.
    """
    check_model(model)
    if not state_files(as_path(directory)):
        raise PruningStateError(f"{directory}: has no masks; give a directory where a pruned model was saved")
    if read_structure(Path(directory)) is not None:
        raise PruningStateError(
            f"{directory}: expected the masks of a model with all its units, got a smaller model out of which units "
            "were cut; open it with from_pretrained, its weights have their zeros"
        )
    refuse_slow(str(Path(directory, CONFIG_NAME)), written_expressions(directory), every_name(model))
    configs = load_configs(directory)
    if any(config.adapters != "sparse_adapters" for config in configs):
        Pruner(model, configs).load(directory)
