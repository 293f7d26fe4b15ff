"""Pruning for the Hugging Face Trainer ecosystem."""

from importlib.metadata import version

from .config.distillation import DistillationConfig
from .config.pruning import PruningConfig, load_configs
from .errors import (
    DistillationConfigError,
    MergeError,
    PlacementError,
    PruningConfigError,
    PruningStateError,
    TargetError,
    TeacherError,
)
from .masking.pruner import Pruner, load_masks
from .model.adapters import merge
from .trainer.callback import PruningCallback
from .trainer.trainer import PruningMixin, PruningTrainer

__version__ = version("hf-prune")

__all__ = [
    "DistillationConfig",
    "DistillationConfigError",
    "MergeError",
    "PlacementError",
    "Pruner",
    "PruningCallback",
    "PruningConfig",
    "PruningConfigError",
    "PruningMixin",
    "PruningStateError",
    "PruningTrainer",
    "TargetError",
    "TeacherError",
    "load_configs",
    "load_masks",
    "merge",
]
