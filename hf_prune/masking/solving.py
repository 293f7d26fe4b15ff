"""Solving anew the layers that read removed units, so that their outputs change least."""

import logging
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from ..engines.processes import of_first_process
from ..errors import PruningStateError
from ..methods.reconstructions import RECONSTRUCTIONS
from ..model.layouts import as_matrices, from_matrices
from ..model.names import named_modules_of, named_parameters
from .groups import Group
from .local import LocalTensor
from .ranking import Change

logger = logging.getLogger(__name__)


def solve_readers(reconstruction: str, readers: Sequence[LocalTensor], biased: Collection[str]) -> Iterator[Change]:
    """New weights of the layers that read units, some of which were just masked; every process must call it.

    The weights of the `readers` are those from before, their masks the new ones. `biased` are the names of the weights
    whose layers have a bias. Every process gets the values that the first one computes. Raises PruningStateError if
    they are not finite.
    """
    for held in readers:
        target, moments = held.target, held.moments
        assert moments is not None  # it was read, or the update is owed
        weight = as_matrices(held.weight.view(target.shape), target.layout)[0].double()
        kept = as_matrices(held.mask.view(target.shape), target.layout)[0].any(dim=0)
        solve = RECONSTRUCTIONS[reconstruction].solve
        values, shift = of_first_process(*solve(weight, kept, moments, target.name in biased))
        if not bool(values.isfinite().all() and shift.isfinite().all()):
            raise PruningStateError(
                f"{target.name}: the reconstruction {reconstruction!r} gave weights that are not finite; nothing of "
                "this tensor was changed"
            )
        flat = from_matrices(values.unsqueeze(0), target.layout, target.shape).reshape(-1)
        yield Change(target, values=flat, shift=shift if target.name in biased else None)
    if readers:
        assert moments is not None
        logger.info("%d layers were solved anew from %d tokens.", len(readers), moments.tokens)


def biases_of(model: nn.Module, groups: Sequence[Group]) -> dict[str, tuple[str, nn.Parameter]]:
    """The names and biases of the layers that read units and are solved anew, by the names of their weights."""
    names = {name for group in groups if group.coupled and group.config.reconstruction for name in group.read_names}
    parameters = {id(parameter): name for name, parameter in named_parameters(model)}
    modules = named_modules_of(model, names)
    biases = {name: getattr(module, "bias", None) for name, module in modules.items()}
    return {name: (parameters[id(bias)], bias) for name, bias in biases.items() if bias is not None}
