"""What users are told about a model when pruning starts: what is left out, which weights are zero already, where less
will be removed than was asked for, and which configurations remove nothing after an earlier one.
"""

import logging
from collections.abc import Callable, Mapping, Sequence

from ..methods.patterns import Pattern, count_of
from ..model.targets import FROZEN
from .groups import Group, Window

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


def tell_of_few_units(groups: Sequence[Group], window_of: Callable[[Group], Window]) -> None:
    """Warn of a structure of which nothing will be removed, or fewer layers than its configuration says."""
    removed: dict[int, int] = {}
    by_config: dict[int, list[Group]] = {}
    for group in groups:
        if not group.coupled:
            continue
        window = window_of(group)
        number = sum(pool.count for pool in group.pools(window, window.end, 0.0, [0] * len(group.coupled)))
        removed[group.config_index] = removed.get(group.config_index, 0) + number
        by_config.setdefault(group.config_index, []).append(group)
        asked = count_of(group.final, sum(group.ranked_units) + group.fixed)
        if group.fixed and number < asked:
            logger.warning(
                "sparsity=%s is %d of %d layers, but only %d of them can be removed: the others are not selected "
                "(targets, exclude), or the model needs them.",
                group.final,
                asked,
                sum(group.ranked_units) + group.fixed,
                number,
            )
    for index, some in by_config.items():
        widest = max(some, key=lambda group: group.final)
        together = widest.scope == "global"
        units = sum(widest.ranked_units) + widest.fixed if together else max(widest.ranked_units)
        if not removed[index] and widest.final:
            logger.warning(
                "No %s will be removed: sparsity=%s of %s%s rounds to 0%s.",
                widest.config.structure,
                widest.final,
                f"{units:,}",
                (f" in multiples of {widest.config.round_to}" if widest.config.round_to else "")
                + ("" if together else " in each layer"),
                ", or one has to stay" if units == 1 else "",
            )


def tell_of_weaker(groups: Sequence[Group]) -> None:
    """Warn of configurations that ask for no more than an earlier one takes from the same weights or units."""
    strongest: dict[tuple[str | None, Pattern, frozenset[str]], Group] = {}
    told: set[int] = set()
    for group in groups:
        if group.config.method == "keep":
            continue
        members = frozenset(target.name for target in group.members)
        what = group.config.structure, group.pattern, members
        earlier = strongest.get(what)
        if earlier is None or group.final > earlier.final:
            strongest[what] = group
        elif earlier.config_index != group.config_index and group.config_index not in told:
            told.add(group.config_index)
            logger.warning(
                "Configuration %d (sparsity=%s) changes nothing in %s, where configuration %d before it prunes as much "
                "or more (sparsity=%s): sparsities do not add up.",
                group.config_index + 1,
                group.final,
                group.members[0].name,
                earlier.config_index + 1,
                earlier.final,
            )
