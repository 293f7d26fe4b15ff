"""`PruningArguments`: the fields of a `PruningConfig` on the command line of a script that may also train dense."""

import dataclasses
import logging
from dataclasses import dataclass

from .pruning import PruningConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruningArguments(PruningConfig):
    """The fields of `PruningConfig` for `HfArgumentParser`, for a script that trains dense without `--sparsity`.

    An n:m pattern, a target and the method `keep` need no sparsity. Takes the arguments of `PruningConfig`, and raises
    what it raises. Without sparsity, all other fields are ignored, with a warning that names those that were set.
    """

    def __post_init__(self) -> None:
        if self._prunes:
            super().__post_init__()
            return
        unused = [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != _default(field)]
        if unused:
            logger.warning("Training is dense, as no sparsity is set. Not used: %s.", ", ".join(unused))

    @property
    def _prunes(self) -> bool:
        pattern = self._pattern_or_none()
        return (
            self.sparsity is not None
            or bool(self._given_targets)
            or self.method == "keep"
            or pattern is None
            or pattern.name == "n:m"
        )

    @property
    def config(self) -> PruningConfig | None:
        """The `PruningConfig` for `PruningTrainer`; None to train dense."""
        return PruningConfig(**self.to_dict()) if self._prunes else None


def _default(field: dataclasses.Field) -> object:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
