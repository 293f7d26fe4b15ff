"""Sparsity patterns: unstructured, n:m and block; and how a sparsity is rounded to a count.

A pattern divides a tensor into units: single weights, groups of m along the input dimension, or blocks of R x C. A unit
is dropped or not; counts and schedules run over units. All functions take tensors as stacks of matrices
(batch, out, in), see `layouts.as_matrices`. Masks are bool, True where the weight is kept.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from .keys import demote, order_keys

PATTERN_FORMS = "'unstructured', 'n:m' with 0 < n < m such as '2:4', or 'block:RxC' such as 'block:4x1'"


def count_of(sparsity: float | Fraction, units: int) -> int:
    """`round(s * n)`, half to even, in exact decimal arithmetic: a sparsity of 0.29 of 100 units is 29."""
    exact = sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))
    return round(exact * units)


def rounded_count(count: int, round_to: int | None, dropped: Sequence[int] = (0,)) -> int:
    """How many units leave so that each layer loses a multiple of `round_to`: the nearest such number.

    `dropped` has how many units of each layer have left before; a number between two multiples grows to the next.
    """
    if round_to is None:
        return count
    fewest = sum(-(-there // round_to) * round_to for there in dropped)
    return max(round(Fraction(count, round_to)) * round_to, fewest)


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: its name in `PATTERNS`, and n and m, or the rows and columns of a block."""

    name: str
    rows: int = 1
    columns: int = 1

    @property
    def unit_size(self) -> int:
        """The number of weights in a unit."""
        return self.columns if self.name == "n:m" else self.rows * self.columns

    @property
    def sides(self) -> tuple[int, int]:
        """Rows (outputs) and columns (inputs) of a unit."""
        return (1, self.columns) if self.name == "n:m" else (self.rows, self.columns)

    @property
    def unit_sparsity(self) -> Fraction:
        """The share of a unit's weights that dropping it masks."""
        return 1 - Fraction(self.rows, self.columns) if self.name == "n:m" else Fraction(1)

    def misfit(self, shape: tuple[int, int, int]) -> str | None:
        """Why a stack of matrices of this shape cannot be divided into units, or None if it can."""
        _, rows, columns = shape
        if self.name == "n:m" and columns % self.columns:
            return f"its input width {columns} is not a multiple of {self.columns}"
        if self.name == "block" and (rows % self.rows or columns % self.columns):
            return f"its {rows}x{columns} matrix cannot be divided into {self.rows}x{self.columns} blocks"
        return None


def parse_pattern(text: str) -> Pattern:
    """Read `unstructured`, `n:m` such as `2:4`, or `block:RxC` such as `block:4x1` (rows are outputs).

    Raises ValueError, saying what is allowed, for anything else.
    """
    if text == "unstructured":
        return Pattern("unstructured")
    group = re.fullmatch(r"(\d+):(\d+)", text)
    if group and 0 < int(group[1]) < int(group[2]):
        return Pattern("n:m", int(group[1]), int(group[2]))
    block = re.fullmatch(r"block:(\d+)x(\d+)", text)
    if block and int(block[1]) > 0 and int(block[2]) > 0:
        return Pattern("block", int(block[1]), int(block[2]))
    raise ValueError(f"pattern: expected {PATTERN_FORMS}, got {text!r}")


# Units of each pattern. `scores` and `mask` are (batch, out, in); a unit function returns (batch, rows, columns).


def _weights_dropped(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return ~mask


def _weight_scores(scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern, norm: str) -> torch.Tensor:
    return scores


def _drop_weights(drop: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return mask & ~drop


def _as_blocks(tensor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(batch, out, in) -> (batch, out / R, R, in / C, C)."""
    batch, rows, columns = tensor.shape
    return tensor.reshape(batch, rows // pattern.rows, pattern.rows, columns // pattern.columns, pattern.columns)


def _blocks_dropped(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return ~_as_blocks(mask, pattern).any(dim=4).any(dim=2)


def _block_scores(scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern, norm: str) -> torch.Tensor:
    """The norm of each block (`l1` or `l2`) or its `sum`, added up in float64, element by element in one fixed order.

    The order makes the sum the same to the bit however a tensor is laid out; float64 has room for the squares of all
    float32 scores. Integer scores are averaged, so that they stay int32.
    """
    blocks = _as_blocks(scores, pattern)
    integers = not scores.is_floating_point()
    total = torch.zeros_like(blocks[:, :, 0, :, 0], dtype=torch.int64 if integers else torch.float64)
    for row in range(pattern.rows):
        for column in range(pattern.columns):
            element = blocks[:, :, row, :, column].to(total.dtype)
            if norm == "l2" and not integers:
                element = element.square()
            total += element if norm == "sum" else element.abs()
    if integers:
        return (total // pattern.unit_size).to(torch.int32)
    return (total.sqrt() if norm == "l2" else total).float()


def _drop_blocks(drop: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    blocks = _as_blocks(mask, pattern)
    return (blocks & ~drop[:, :, None, :, None]).reshape(mask.shape)


def _as_groups(tensor: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """(batch, out, in) -> (batch, out, in / m, m)."""
    batch, rows, columns = tensor.shape
    return tensor.reshape(batch, rows, columns // pattern.columns, pattern.columns)


def _groups_dropped(mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Groups in which n or fewer of the m weights are kept already."""
    return _as_groups(mask, pattern).sum(dim=3) <= pattern.rows


def _lowest_in_group(scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The m - n weights of each group to drop: masked weights first, then by score, then by index."""
    keys = _as_groups(demote(order_keys(scores), mask), pattern)
    rank = torch.zeros_like(keys, dtype=torch.int16)
    for index in range(pattern.columns):
        other = keys[..., index : index + 1]
        rank[..., :index] += other < keys[..., :index]
        rank[..., index + 1 :] += other <= keys[..., index + 1 :]
    return rank < pattern.columns - pattern.rows


def _group_scores(scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern, norm: str) -> torch.Tensor:
    """What dropping m - n of a group costs: the sum of their scores (the mean for integers), in a fixed order."""
    lowest = _lowest_in_group(scores, mask, pattern)
    groups = _as_groups(scores, pattern)
    integers = not scores.is_floating_point()
    total = torch.zeros_like(groups[..., 0], dtype=torch.int64 if integers else torch.float64)
    for index in range(pattern.columns):
        total += groups[..., index].to(total.dtype) * lowest[..., index]
    return (total // (pattern.columns - pattern.rows)).to(torch.int32) if integers else total.float()


def _drop_in_groups(drop: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    lowest = _lowest_in_group(scores, mask, pattern)
    return mask & ~(lowest & drop[..., None]).reshape(mask.shape)


@dataclass(frozen=True)
class UnitRules:
    """The functions of a pattern: which units are dropped, their scores, the mask after a drop; and a BibTeX entry."""

    dropped: Callable[[torch.Tensor, Pattern], torch.Tensor]
    scores: Callable[[torch.Tensor, torch.Tensor, Pattern, str], torch.Tensor]
    drop: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pattern], torch.Tensor]
    paper: str | None = None


PATTERNS: dict[str, UnitRules] = {
    "unstructured": UnitRules(_weights_dropped, _weight_scores, _drop_weights),
    "n:m": UnitRules(
        _groups_dropped,
        _group_scores,
        _drop_in_groups,
        paper="""@article{mishra2021accelerating,
  title = {Accelerating Sparse Deep Neural Networks},
  author = {Mishra, Asit and Latorre, Jorge Albericio and Pool, Jeff and Stosic, Darko and Stosic, Dusan and
            Venkatesh, Ganesh and Yu, Chong and Micikevicius, Paulius},
  journal = {arXiv preprint arXiv:2104.08378},
  year = {2021}
}""",
    ),
    "block": UnitRules(
        _blocks_dropped,
        _block_scores,
        _drop_blocks,
        paper="""@article{narang2017block,
  title = {Block-Sparse Recurrent Neural Networks},
  author = {Narang, Sharan and Undersander, Eric and Diamos, Gregory},
  journal = {arXiv preprint arXiv:1711.02782},
  year = {2017}
}""",
    ),
}

BLOCK_NORMS = ("l1", "l2")
