"""When a tensor is how sparse: step -> sparsity. Plain numbers, no torch.

To add a schedule, write its function and one entry of `SCHEDULES`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Schedule:
    """One way from a sparsity to another.

    Attributes:
        sparsity: `(fraction, initial, final) -> sparsity`, with `fraction` the share of the way from the first mask
            update (0) to the last (1), and sparsities in [0, 1).
        paper: a BibTeX entry.
    """

    sparsity: Callable[[float, float, float], float]
    paper: str | None = None


def one_shot(fraction: float, initial: float, final: float) -> float:
    """`final`, whatever the fraction: everything is pruned at the first (and only) mask update."""
    return final


def linear(fraction: float, initial: float, final: float) -> float:
    """`initial + (final - initial) * fraction`: the same share of weights at every update."""
    return initial + (final - initial) * fraction


def cubic(fraction: float, initial: float, final: float) -> float:
    """`final + (initial - final) * (1 - fraction)^3`: fast while weights are redundant, slow near the end.

    Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1.
    """
    return final + (initial - final) * (1.0 - fraction) ** 3


def exponential(fraction: float, initial: float, final: float) -> float:
    """`1 - (1 - initial) * ((1 - final) / (1 - initial))^fraction`: the same share of what remains each time.

    The continuous form of iterative pruning by a constant rate, as in Frankle and Carbin (arXiv 1803.03635), section 2.
    """
    return 1.0 - (1.0 - initial) * ((1.0 - final) / (1.0 - initial)) ** fraction


def cosine(fraction: float, initial: float, final: float) -> float:
    """`final + (initial - final) * (1 + cos(pi * fraction)) / 2`: slow at both ends."""
    return final + (initial - final) * (1.0 + math.cos(math.pi * fraction)) / 2.0


SCHEDULES: dict[str, Schedule] = {
    "one_shot": Schedule(one_shot),
    "linear": Schedule(linear),
    "cubic": Schedule(
        cubic,
        paper="""@article{zhu2017prune,
  title = {To prune, or not to prune: exploring the efficacy of pruning for model compression},
  author = {Zhu, Michael and Gupta, Suyog},
  journal = {arXiv preprint arXiv:1710.01878},
  year = {2017}
}""",
    ),
    "exponential": Schedule(exponential),
    "cosine": Schedule(cosine),
}


def sparsity_at(schedule: str, step: int, begin: int, end: int, initial: float, final: float) -> float:
    """The sparsity that `schedule` asks for once `step` optimizer steps are completed.

    `initial` before and at `begin` (`final` for one_shot), exactly `final` from `end` on. A model that is already
    sparser than `final` stays as it is: the value is never below `initial`.
    """
    if final <= initial:
        return initial
    if schedule == "one_shot":
        return final if step >= begin else initial
    if step >= end:
        return final
    if step <= begin:
        return initial
    return SCHEDULES[schedule].sparsity((step - begin) / (end - begin), initial, final)


def update_steps(begin: int, end: int, frequency: int) -> list[int]:
    """The completed optimizer steps after which masks are updated: `begin + i * frequency`, and always `end`."""
    steps = list(range(begin, end + 1, frequency))
    if steps[-1] != end:
        steps.append(end)
    return steps


def resolve_step(value: float | None, total_steps: int) -> int:
    """Turn a configured time into completed optimizer steps.

    `None` is the last step, a value of 1 or more is a number of steps, a value below 1 is a share of training, rounded
    half to even.
    """
    if value is None:
        return total_steps
    if value >= 1:
        return int(value)
    return round(Fraction(str(value)) * total_steps)
