"""Criteria for units, such as neurons and heads: which of them are removed first.

A score is made of numbers for the weights of a unit, which are added up, so that it is the same however the weights are
distributed over processes. To add a criterion, write its function and one entry of `UNIT_CRITERIA`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .criteria import CRITERIA, Piece


@dataclass(frozen=True)
class UnitCriterion:
    """One way to rank units; those with the lowest scores are removed.

    Attributes:
        weigh: `(weight, piece) -> numbers` for a flat slice of one tensor (float64, float32 or int32); a unit's score
            is the absolute value of their sum (float64) over its weights. None if what is read is the score itself.
        words: what is removed, as model cards describe it.
        reads: what `weigh` needs besides the weight, as `piece.statistic`: `inputs`, the norm of the input that the
            weight is multiplied with, in the step before an update; `gradients`, its gradient, in every step up to the
            last update, and the scores of all steps are added up; `similarity`, for whole layers, of what they get and
            what they return, in the step before an update: the score is 1 minus it; or None.
        comparable: whether scores of different layers can be compared as they are. Where the units of all layers are
            ranked together, other scores are divided by the norm of those of their layer (Molchanov et al., arXiv
            1611.06440, section 2.2).
        of_readers: whether only the weights that read the unit's output are added up, not those that compute it.
        paper: a BibTeX entry.
        structures: the structures whose units it ranks; None: all.
    """

    weigh: Callable[[torch.Tensor, Piece], torch.Tensor] | None
    words: str
    reads: str | None = None
    of_readers: bool = True
    comparable: bool = False
    paper: str | None = None
    structures: tuple[str, ...] | None = None


def magnitude(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`w²`: a unit's score is the squared norm of all its weights (Li et al., arXiv 1608.08710, with the L2 norm)."""
    return weight.detach().double().square()


def activation(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`||x||²`: a unit's score is the squared norm of its activations over the tokens of a step.

    It is multiplied by the number of weights that read the unit, which is the same for all (Muralidharan et al., arXiv
    2407.14679, section 2.2, with the L2 norm).
    """
    assert piece.statistic is not None
    return piece.statistic.double().square()


def wanda(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`(w ||x||)²`: a unit's score is the squared norm of what it adds to the layer's output.

    That is exact where inputs are uncorrelated (Sun et al., arXiv 2306.11695, equation 1, added up over the weights
    that read the unit).
    """
    assert piece.statistic is not None
    return (weight.detach().double() * piece.statistic).square()


def taylor(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """`w g`: `|sum of w g|` is how much the loss would change without the unit, to first order.

    That is the gradient for a factor of the unit's output (Michel et al., arXiv 1905.10650, equation 3; Molchanov et
    al., arXiv 1906.10771, equation 8). Its absolute values are added up over optimizer steps.
    """
    assert piece.statistic is not None
    return weight.detach().float() * piece.statistic  # once in every step: half of the memory traffic of float64


def random(weight: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A fixed random number for each unit: hashed from the seed, the name and the unit's index."""
    return CRITERIA["random"].score(weight, piece)


# What inputs are read of: experts are fused tensors, and their router sends each only some tokens.
_OF_LINEAR_LAYERS = ("neurons", "heads", "layers", "hidden")

UNIT_CRITERIA: dict[str, UnitCriterion] = {
    "magnitude": UnitCriterion(
        magnitude,
        words="those with the smallest norm of their weights",
        of_readers=False,
        paper="""@inproceedings{li2017pruning,
  title = {Pruning Filters for Efficient ConvNets},
  author = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year = {2017}
}""",
    ),
    "random": UnitCriterion(random, words="chosen at random", comparable=True),
    "activation": UnitCriterion(
        activation,
        words="those with the smallest activations",
        reads="inputs",
        structures=_OF_LINEAR_LAYERS,
        paper="""@inproceedings{muralidharan2024compact,
  title = {Compact Language Models via Pruning and Knowledge Distillation},
  author = {Muralidharan, Saurav and Sreenivas, Sharath Turuvekere and Joshi, Raviraj and Chochowski, Marcin and
            Patwary, Mostofa and Shoeybi, Mohammad and Catanzaro, Bryan and Kautz, Jan and Molchanov, Pavlo},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}""",
    ),
    "wanda": UnitCriterion(
        wanda,
        words="those with the smallest product of activations and the weights that read them",
        reads="inputs",
        structures=_OF_LINEAR_LAYERS,
        paper=CRITERIA["wanda"].paper,
    ),
    "taylor": UnitCriterion(
        taylor,
        words="those without which the loss changes least, by its gradients",
        reads="gradients",
        comparable=True,
        paper="""@inproceedings{michel2019sixteen,
  title = {Are Sixteen Heads Really Better than One?},
  author = {Michel, Paul and Levy, Omer and Neubig, Graham},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}""",
    ),
    # 1 - E[cos(x, y)] over the tokens x that a layer gets and y that it returns (arXiv 2403.03853, equation 1).
    "block_influence": UnitCriterion(
        None,
        words="those that change their inputs least",
        reads="similarity",
        structures=("layers",),
        paper="""@article{men2024shortgpt,
  title = {ShortGPT: Layers in Large Language Models are More Redundant Than You Expect},
  author = {Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and Lu, Yaojie and Han, Xianpei
            and Chen, Weipeng},
  journal = {arXiv preprint arXiv:2403.03853},
  year = {2024}
}""",
    ),
}
