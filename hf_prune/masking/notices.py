"""What users are told about a model when pruning starts: what is left out, and which weights are zero already."""

import logging
from collections.abc import Mapping, Sequence

from ..methods.patterns import count_of
from ..model.targets import FROZEN
from .plan import Group

logger = logging.getLogger(__name__)


def tell_of_nothing_to_prune() -> None:
    """Warn that no weights are selected."""
    logger.warning("Nothing to prune: the model has no weights that the pruning configuration selects.")


def tell_of_left_out(left_out: Mapping[str, str]) -> None:
    """Log which weights of layers are not pruned by default; as a warning where users may not expect it.

    `left_out` maps parameter names to the reasons.
    """
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        logger.log(
            logging.WARNING if reason == FROZEN else logging.INFO,
            "Not pruned by default (%s): %s%s; name tensors in targets to prune them.",
            reason,
            ", ".join(names[:2]),
            f" and {len(names) - 2} more tensors" if len(names) > 2 else "",
        )


def tell_of_zeros(groups: Sequence[Group], masked: Mapping[str, int], fresh: Sequence[str]) -> None:
    """Log how many weights are zero already, and what was decided about tensors of zeros and sparse ones.

    `masked` are the numbers of masked weights by tensor, `fresh` the names of tensors of zeros that are not masked.
    """
    if fresh:
        logger.warning(
            "%s%s: all weights are zero, as in a tensor that is trained from zero; they are not masked. To keep such "
            "zeros, use the method 'keep'.",
            fresh[0],
            f" and {len(fresh) - 1} more" if len(fresh) > 1 else "",
        )
    zeros = sum(masked.values())
    if zeros:
        logger.info(
            "%s prunable weights are already zero; they are masked and stay zero, also whole groups and blocks.",
            f"{zeros:,}",
        )
    sparser = []
    for group in groups:
        weights = sum(target.weights for target in group.members)
        there = sum(masked[target.name] for target in group.members)
        if there > count_of(group.final, weights):
            share = f"{100 * there / weights:.2f}% for a target of {100 * group.final:.2f}%"
            sparser += [f"{target.name} ({share})" for target in group.members]
    if sparser:
        more = f" and {len(sparser) - 1} more tensors" if len(sparser) > 1 else ""
        logger.warning("Already above the target sparsity; left unchanged: %s%s.", sparser[0], more)
