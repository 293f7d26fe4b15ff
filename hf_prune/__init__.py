"""Pruning for the Hugging Face Trainer ecosystem."""

from importlib.metadata import version

from .adapters import MergeError, merge
from .callback import PruningCallback
from .config import PruningConfig, PruningConfigError, load_configs
from .distillation import DistillationConfig, DistillationConfigError
from .distributed import PlacementError
from .mask_files import PruningStateError
from .pruner import Pruner, load_masks
from .targets import TargetError
from .teachers import TeacherError
from .trainer import PruningMixin, PruningTrainer

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
