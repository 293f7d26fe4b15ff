"""`TrainerBase`: what each mixin of `PruningMixin` may use of the Trainer and of the other mixins."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer

from ..config.distillation import DistillationConfig
from ..masking.pruner import Pruner
from ..publish.logs import MeasuredEvaluation
from ..publish.record import Cost, RunRecord
from ..saved.files import SavedFile
from .callback import PruningCallback

if TYPE_CHECKING:

    class TrainerBase(Trainer):
        """A Trainer with all the mixins, for type checkers; at run time the mixins have no base class."""

        # Of training
        _pruning: PruningCallback | None  # None without a pruning_config

        _loaded_best: bool  # whether the model is that of the best checkpoint, not of the last step

        @property
        def pruner(self) -> Pruner | None:
            """The pruner; None without a `pruning_config`."""

        def _note(self, terms: Mapping[str, torch.Tensor], shared: bool = False) -> None: ...

        # Of saving
        _unfinished: Path | None  # the folder of a checkpoint that is being written

        # Of distilling
        teacher: nn.Module | None
        teacher_name: str | None
        distillation: DistillationConfig | None

        # Of measuring
        _evaluated: list[MeasuredEvaluation]

        @property
        def _makes_card(self) -> bool: ...

        def _digest(self) -> str: ...

        # Of publishing
        _hub: HfApi  # its background pushes run one after another
        _said: dict[str, Any]  # what was passed to the last create_model_card

        @property
        def _repo_id(self) -> str: ...

        def _make_record(
            self,
            said: Mapping[str, Any],
            digest: str,
            weights: dict[str, SavedFile] | None = None,
            costs: Sequence[Cost] = (),
        ) -> RunRecord: ...

else:
    TrainerBase = object
