"""The masks of tensors that are pruned at once, one bit a weight."""

from collections.abc import Iterable, Iterator, Mapping

import torch

from ..saved.masks import pack, packed_shape, unpack


class PackedMasks(Mapping[str, torch.Tensor]):
    """Parameter name -> mask (bool, on the CPU), which is unpacked each time it is asked for.

    A mask is packed as in the file of masks, as (first dimension, rest), so that parts of the first dimension can be
    set. Those that are mapped from files, and take no memory, stay as they are.
    """

    def __init__(self) -> None:
        self._masks: dict[str, tuple[torch.Tensor, tuple[int, ...] | None]] = {}  # with the shape, if it is packed

    def __getitem__(self, name: str) -> torch.Tensor:
        mask, shape = self._masks[name]
        return mask if shape is None else unpack(mask, shape).view(torch.bool)

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def add(self, name: str, shape: tuple[int, ...]) -> None:
        """Add the mask of a tensor of this shape, whose parts are then to be set."""
        self._masks[name] = torch.zeros(packed_shape(shape), dtype=torch.uint8), shape

    def set_part(self, name: str, part: int, parts: int, mask: torch.Tensor) -> None:
        """Set one of so many equal parts of the first dimension."""
        packed, _ = self._masks[name]
        rows = len(packed) // parts
        packed[part * rows : (part + 1) * rows] = pack(mask)

    def set_mapped(self, name: str, mask: torch.Tensor) -> None:
        """Set a mask that is mapped from a file."""
        self._masks[name] = mask, None

    def in_order(self, names: Iterable[str]) -> "PackedMasks":
        """Those of these names that are there, in this order."""
        chosen = PackedMasks()
        chosen._masks = {name: self._masks[name] for name in names if name in self._masks}
        return chosen
