"""Which weights matter: weights -> scores, where a higher score is kept longer.

A criterion is a function `(weight, piece) -> scores`, elementwise over a flat piece of one tensor, so that it can be
run over any slice of a tensor and give the same numbers. Scores are float32 or int32. To add a criterion, write the
function and name it in `CRITERIA`, and in `NEEDS` if it reads more than weights.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """Where a flat piece of weights lies: the tensor's name, the position of its first weight, and the seed.

    `index_of` gives the flat indices in the whole tensor of positions in the part of it that is held (both int64); None
    if that is all of it. `statistic` is what the criterion needs to know of each weight beside itself, see `NEEDS`.
    """

    name: str
    offset: int = 0
    seed: int = 0
    index_of: Callable[[torch.Tensor], torch.Tensor] | None = None
    statistic: torch.Tensor | None = None

    def indices(self, count: int, device: torch.device) -> torch.Tensor:
        """The flat indices in the whole tensor of the piece's first `count` weights (int64)."""
        positions = torch.arange(self.offset, self.offset + count, dtype=torch.int64, device=device)
        return positions if self.index_of is None else self.index_of(positions)


Criterion = Callable[[torch.Tensor, Piece], torch.Tensor]


_LOW_32_BITS = 0xFFFFFFFF


def magnitude(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`|w|` in float32: the weights nearest to zero go first (Han et al., arXiv 1506.02626, section 3)."""
    return weight.detach().float().abs()


def random(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A fixed 31-bit number (int32) for each weight, hashed from the seed, the tensor's name and the flat index.

    The choice does not depend on the weights, the device, the machine or the number of processes, and since the numbers
    never change, what is dropped at one sparsity is dropped at every higher one. The hash is two rounds of the 32-bit
    mixer of murmur3 (Appleby's fmix32).
    """
    index = piece.indices(weight.numel(), weight.device)
    key = zlib.crc32(f"{piece.seed}/{piece.name}".encode())
    bits = _mix32((index & _LOW_32_BITS) ^ key)
    bits = _mix32((bits + (index >> 32)) & _LOW_32_BITS)
    return (bits >> 1).to(torch.int32)


def _mix32(bits: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit values held in int64; each product is taken in two halves so that nothing overflows."""
    bits = bits ^ (bits >> 16)
    bits = _multiply32(bits, 0x85EBCA6B)
    bits = bits ^ (bits >> 13)
    bits = _multiply32(bits, 0xC2B2AE35)
    return bits ^ (bits >> 16)


def _multiply32(bits: torch.Tensor, factor: int) -> torch.Tensor:
    low = bits * (factor & 0xFFFF)
    high = ((bits * (factor >> 16)) & 0xFFFF) << 16
    return (low + high) & _LOW_32_BITS


def wanda(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`|w| * ||x||`: the magnitude times the norm of the input that the weight is multiplied with.

    The norm is over all tokens of the optimizer step before the update, without padding (Sun et al., arXiv 2306.11695,
    equation 1; compared within a layer here, or over all, as the scope says, where they compare within an output).
    """
    assert piece.statistic is not None
    return magnitude(weight, piece) * piece.statistic


def taylor(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`|w * g|`: how much the loss would change without the weight, to first order.

    The gradient is that of the optimizer step before the update (Molchanov et al., arXiv 1906.10771, equation 8, for
    single weights). Where it is not finite, as in a step that fp16 skips, the update waits for the next step.
    """
    assert piece.statistic is not None
    return (weight.detach().float() * piece.statistic).abs()


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "random": random,
    "wanda": wanda,
    "taylor": taylor,
}


# What a criterion reads beside the weights: the norm of the inputs of each weight, or its gradient.
NEEDS = {"wanda": "inputs", "taylor": "gradients"}


METHOD_WORDS = {
    "magnitude": "the weights of least magnitude",
    "random": "weights chosen at random",
    "wanda": "the weights of least magnitude times the norm of their input",
    "taylor": "the weights of least product with their gradient",
    "keep": "the zeros that were there kept",
}
