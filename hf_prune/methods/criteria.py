"""Which weights matter: weights -> scores, where a higher score is kept longer.

To add a criterion, write its score function and one entry of `CRITERIA`; CONTRIBUTING.md shows one. Everything else,
from the configuration to checkpoints, cards and the contract test, reads the entry.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Piece:
    """Where a flat piece of weights lies: the tensor's name, the position of its first weight, and the seed.

    `index_of` gives the flat indices in the whole tensor of positions in the part of it that is held (both int64); None
    if that is all of it. `statistic` is what the criterion reads of each weight beside itself (float32), and `memory`
    what it remembers of each (float32 by name), see `Criterion`.
    """

    name: str
    offset: int = 0
    seed: int = 0
    index_of: Callable[[torch.Tensor], torch.Tensor] | None = None
    statistic: torch.Tensor | None = None
    memory: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def indices(self, count: int, device: torch.device) -> torch.Tensor:
        """The flat indices in the whole tensor of the piece's first `count` weights (int64)."""
        positions = torch.arange(self.offset, self.offset + count, dtype=torch.int64, device=device)
        return positions if self.index_of is None else self.index_of(positions)


Score = Callable[[torch.Tensor, Piece], torch.Tensor]
Remember = Callable[[torch.Tensor, Piece], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Criterion:
    """One way to rank weights.

    Attributes:
        score: `(weight, piece) -> scores` (float32 or int32) for a flat piece of one tensor. It works element by
            element, so that any slice of a tensor gives the same numbers as the whole.
        words: what is pruned, as a card says it.
        reads: what `score` or `remember` needs of each weight beside itself: `inputs`, the norm of the input that it is
            multiplied with; `gradients`, its gradient; or None. Without a memory, that of the optimizer step before a
            mask update; with one, that of every optimizer step, for `remember`.
        remember: `(weight, piece) -> memory`, by name: what is remembered from now on, element by element (float32),
            in each optimizer step up to the last mask update. `piece.memory` has what was remembered before, zeros at
            first. It is saved with the masks, sharded as they are, and resumed.
        memory: the names of what `remember` returns.
        regrows: whether weights that it masked can come back with the value that they had; `weight` then has those
            values in place of zeros. Their gradients are those of the masked model (straight-through).
        signed: whether scores have a sign: those of a block are added up then, instead of their norm being taken.
        paper: a BibTeX entry.
    """

    score: Score
    words: str
    reads: str | None = None
    remember: Remember | None = None
    memory: tuple[str, ...] = ()
    regrows: bool = False
    signed: bool = False
    paper: str | None = None


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


def movement(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`-sum over steps of w * dL/dw`: high where training moves a weight away from zero, low where towards it.

    Sanh, Wolf and Rush, "Movement Pruning" (arXiv 2005.07683), section 4, without the learning rate of the scores. The
    gradient is that of the masked model (straight-through), so that masked weights are scored on and can come back.
    """
    return piece.memory["importance"]


def _add_movement(weight: torch.Tensor, piece: Piece) -> dict[str, torch.Tensor]:
    assert piece.statistic is not None
    return {"importance": piece.memory["importance"] - weight.detach().float() * piece.statistic}


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(
        magnitude,
        words="the weights of least magnitude",
        paper="""@inproceedings{han2015learning,
  title = {Learning both Weights and Connections for Efficient Neural Networks},
  author = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2015}
}""",
    ),
    "random": Criterion(random, words="weights chosen at random"),
    "wanda": Criterion(
        wanda,
        words="the weights of least magnitude times the norm of their input",
        reads="inputs",
        paper="""@inproceedings{sun2024simple,
  title = {A Simple and Effective Pruning Approach for Large Language Models},
  author = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year = {2024}
}""",
    ),
    "taylor": Criterion(
        taylor,
        words="the weights of least product with their gradient",
        reads="gradients",
        paper="""@inproceedings{molchanov2019importance,
  title = {Importance Estimation for Neural Network Pruning},
  author = {Molchanov, Pavlo and Mallya, Arun and Tyree, Stephen and Frosio, Iuri and Kautz, Jan},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}""",
    ),
    "movement": Criterion(
        movement,
        words="the weights that training moves towards zero",
        reads="gradients",
        remember=_add_movement,
        memory=("importance",),
        regrows=True,
        signed=True,
        paper="""@inproceedings{sanh2020movement,
  title = {Movement Pruning: Adaptive Sparsity by Fine-Tuning},
  author = {Sanh, Victor and Wolf, Thomas and Rush, Alexander M.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2020}
}""",
    ),
}
