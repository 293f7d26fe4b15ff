"""Pruning for the Hugging Face Trainer ecosystem."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    CalibrationConfigError,
    CalibrationError,
    DistillationConfigError,
    HfPruneError,
    MergeError,
    PackedError,
    PlacementError,
    PruningConfigError,
    PruningStateError,
    StructureError,
    TargetError,
    TeacherError,
)
from .foreign.late import QUANTIZERS, when_imported
from .foreign.per_layer import when_layers_differ

if TYPE_CHECKING:
    from .config.arguments import PruningArguments
    from .config.calibration import CalibrationConfig
    from .config.distillation import DistillationConfig
    from .config.pruning import PruningConfig, load_configs
    from .masking.pruner import Pruner
    from .masking.restoring import load_masks
    from .model.adapters import merge
    from .oneshot.prune import prune
    from .publish.packing import save_packed, unpack
    from .runtimes.semi_structured import semi_structured
    from .runtimes.sparse_inference import dense, sparse_inference
    from .structure.vocabulary import shrink_vocabulary
    from .structure.zero_units import shrink
    from .trainer.callback import PruningCallback
    from .trainer.trainer import PruningMixin, PruningTrainer

    __version__: str

__all__ = [
    "CalibrationConfig",
    "CalibrationConfigError",
    "CalibrationError",
    "DistillationConfig",
    "DistillationConfigError",
    "HfPruneError",
    "MergeError",
    "PackedError",
    "PlacementError",
    "Pruner",
    "PruningArguments",
    "PruningCallback",
    "PruningConfig",
    "PruningConfigError",
    "PruningMixin",
    "PruningStateError",
    "PruningTrainer",
    "StructureError",
    "TargetError",
    "TeacherError",
    "dense",
    "load_configs",
    "load_masks",
    "merge",
    "prune",
    "save_packed",
    "semi_structured",
    "shrink",
    "shrink_vocabulary",
    "sparse_inference",
    "unpack",
]

# Where the names that need torch and transformers are; they are imported when they are first asked for (PEP 562).
_MODULES = {
    "CalibrationConfig": ".config.calibration",
    "DistillationConfig": ".config.distillation",
    "Pruner": ".masking.pruner",
    "PruningArguments": ".config.arguments",
    "PruningCallback": ".trainer.callback",
    "PruningConfig": ".config.pruning",
    "PruningMixin": ".trainer.trainer",
    "PruningTrainer": ".trainer.trainer",
    "dense": ".runtimes.sparse_inference",
    "load_configs": ".config.pruning",
    "load_masks": ".masking.restoring",
    "merge": ".model.adapters",
    "prune": ".oneshot.prune",
    "save_packed": ".publish.packing",
    "semi_structured": ".runtimes.semi_structured",
    "shrink": ".structure.zero_units",
    "shrink_vocabulary": ".structure.vocabulary",
    "sparse_inference": ".runtimes.sparse_inference",
    "unpack": ".publish.packing",
}


if not TYPE_CHECKING:  # or type checkers would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import version

            return version("hf-prune")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name], __name__), name)
        globals()[name] = value
        return value


def _teach(config: Any) -> None:
    """Models with other widths in some layers open with `from_pretrained`, see `model.per_layer`."""
    importlib.import_module(".model.per_layer", __name__).teach(config)


def _register(quantizers: Any) -> None:
    """Packed models open with `from_pretrained`, see `packed.quantizer`."""
    importlib.import_module(".packed.quantizer", __name__).register(quantizers)


when_layers_differ(_teach)
when_imported(QUANTIZERS, _register)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
