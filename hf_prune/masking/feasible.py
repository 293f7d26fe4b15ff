"""Whether a model can be built without as many units as a configuration asks for."""

import math

import torch
from transformers import PreTrainedModel

from ..config.pruning import PruningConfig
from ..errors import StructureError
from ..methods.patterns import count_of, rounded_count
from ..structure.coupled import own_share
from ..structure.rows import row_divisor
from ..structure.shrink import cut_of, misfit
from ..structure.units import Family, words_for

# How many shares are tried, below and above the one that does not fit, to name one that does.
_MOST_TRIED = 16


def check_what_is_left(family: Family, config: PruningConfig, model: PreTrainedModel) -> None:
    """Raise StructureError if too few units would be left, or a number that the model's class cannot be built with."""
    assert config.sparsity is not None
    if family.structure == "layers":
        return
    divisor = row_divisor(family, model)
    _check_rounding(family, config, divisor)
    if config.scope == "global" and (config.round_to or 1) % divisor:
        raise StructureError(
            "scope",
            f"expected 'layer' for the neurons of experts that are computed in one grouped matrix product, which takes "
            f"multiples of {divisor} alone, got 'global'; or set round_to={divisor}, or load the model with "
            "experts_implementation='eager'",
        )
    for group in family.groups:
        own = own_share(config, group)
        sparsity = config.sparsity if own is None else own
        _check_number(family, sparsity, group.units, group.units - _count(config, sparsity, group.units), divisor)
    dropped = _dropped(family, config, config.sparsity)
    why = misfit(model, cut_of(family.with_tied, dropped))
    if why is not None:
        gone = {words_for(one.structure): dropped[one.groups[0].name] for one in family.with_tied}
        numbers = " and ".join(f"{int((~flags).sum())} of {len(flags)} {name}" for name, flags in gone.items())
        fitting = _fitting_shares(family, config, model)
        raise StructureError(
            "sparsity",
            f"expected a share of the {words_for(family.structure)} without which {type(model).__name__} can be built"
            f"{f', such as {fitting}' if fitting else ''}; got {config.sparsity}, which leaves {numbers} ({why})",
        )


def _dropped(family: Family, config: PruningConfig, sparsity: float) -> dict[str, torch.Tensor]:
    """Flags of as many units as go where `sparsity` is that of groups without an override."""
    found = {}
    for group in (group for one in family.with_tied for group in one.groups):
        own = own_share(config, group)
        number = _count(config, sparsity if own is None else own, group.units)
        found[group.name] = torch.arange(group.units) < number
    return found


def _count(config: PruningConfig, sparsity: float, units: int) -> int:
    return rounded_count(count_of(sparsity, units), config.round_to)


def _check_rounding(family: Family, config: PruningConfig, divisor: int) -> None:
    """Raise StructureError for layers whose number of units is no multiple of what it is rounded to.

    And if that is no multiple of `divisor`, which the number of units that are left must be.
    """
    if config.round_to is None:
        return
    if config.round_to % divisor:
        raise StructureError(
            "round_to",
            f"expected a multiple of {divisor} for the neurons of experts that are computed in one grouped matrix "
            f"product, got {config.round_to}; or load the model with experts_implementation='eager'",
        )
    for group in family.groups:
        if group.units % config.round_to:
            fitting = math.gcd(group.units, config.round_to)
            raise StructureError(
                "round_to",
                f"expected a divisor of the {group.units} {family.structure} of {group.path}"
                f"{f', such as {fitting}' if fitting > 1 else ''}; got {config.round_to}",
            )


def _fitting_shares(family: Family, config: PruningConfig, model: PreTrainedModel) -> str:
    """The shares nearest to that of a configuration, below and above it, without which the model can be built."""
    assert config.sparsity is not None
    units = min(one.groups[0].units for one in family.with_tied)
    shares = [round(number / units, 4) for number in range(1, units)]
    below = [share for share in reversed(shares) if share < config.sparsity][:_MOST_TRIED]
    above = [share for share in shares if share > config.sparsity][:_MOST_TRIED]
    found = []
    for some in (below, above):
        for share in some:
            if misfit(model, cut_of(family.with_tied, _dropped(family, config, share))) is None:
                found.append(f"{share:g}")
                break
    return " or ".join(found)


def _check_number(family: Family, sparsity: float, units: int, left: int, divisor: int) -> None:
    """Raise StructureError for a number of units of a layer that cannot be left."""
    if 1 < family.at_least > left:
        raise StructureError(
            "sparsity",
            f"expected at least {family.at_least} of {units} {family.structure} to be left, as many as each token is "
            f"sent to, got {sparsity}, which leaves {left}",
        )
    if left % divisor:
        raise StructureError(
            "sparsity",
            f"expected a number of neurons that {divisor} divides, as these experts are computed in one grouped matrix "
            f"product, got {sparsity}, which leaves {left} of {units}; choose another share, or load the model "
            "with experts_implementation='eager'",
        )
