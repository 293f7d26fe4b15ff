"""`Watch`: notices masked weights that are no longer zero, from a sample: the cost does not grow with the model."""

import logging
from collections.abc import Callable, Iterable, Mapping

import torch

logger = logging.getLogger(__name__)

# Positions sampled in each tensor; those that are masked are looked at.
_SAMPLE = 256


class Watch:
    """Samples of the masked positions of tensors, for this process's shards."""

    def __init__(self) -> None:
        self._positions: dict[str, torch.Tensor] = {}

    def sample(self, masks: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
        """Choose the positions of these tensors anew, from their masks (True where a weight is kept)."""
        generator = torch.Generator().manual_seed(0)
        for name in names:
            mask = masks[name].reshape(-1)
            if mask.is_meta or not mask.numel():
                continue
            sampled = torch.randint(mask.numel(), (_SAMPLE,), generator=generator).to(mask.device)
            self._positions[name] = sampled[~mask[sampled]]

    def changed(self, weight_of: Callable[[str], torch.Tensor], names: Iterable[str]) -> list[str]:
        """Which of these tensors have a masked weight in the sample that is not zero."""
        looked = [name for name in names if len(self._positions.get(name, ()))]
        seen = [weight_of(name).reshape(-1)[self._positions[name]].count_nonzero() for name in looked]
        if not seen:
            return []
        counts = torch.stack([count.to(seen[0].device) for count in seen])
        return [name for name, count in zip(looked, counts.tolist(), strict=True) if count]


def warn_of_changes(counts: Mapping[str, int]) -> None:
    """Warn that masked weights were not zero, given their numbers by tensor."""
    name, count = next(iter(counts.items()))
    others = f", and weights in {len(counts) - 1} more tensors," if len(counts) > 1 else ""
    logger.warning(
        "%s masked weights of %s%s were not zero: something other than the optimizer has changed them, such as an EMA, "
        "another callback or load_state_dict, or gradients were not finite. They are set to zero again.",
        f"{count:,}",
        name,
        others,
    )
