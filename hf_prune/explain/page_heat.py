"""Tables of layers, for heat maps: the share of zeros by layer and kind, that of every head, and effective ranks."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..publish.explanation import Matrix, UnitGroup

# With more kinds of matrices, those that differ in numbers alone share a row.
_MOST_KINDS = 40


@dataclass(frozen=True)
class Cell:
    """A figure in a heat map: `value` between 0 and 1 chooses the colour, `text` is shown, `told` says it in words."""

    value: float
    text: str
    told: str
    is_marked: bool = False


@dataclass(frozen=True)
class Heat:
    """A heat map: the names of its columns, and (name, a cell or None for each column) of its rows.

    `of` is the stack of layers that it is of; `corner` names the rows and columns.
    """

    of: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]] = field(default_factory=list)


def zeros_by_layer(matrices: Sequence[Matrix]) -> list[Heat]:
    """The share of zeros by kind of matrix and layer, a map for each stack of layers."""

    def cell(some: Sequence[Matrix]) -> Cell | None:
        weights, zeros = sum(one.weights for one in some), sum(one.zeros for one in some)
        if not weights:
            return None
        share = zeros / weights
        return Cell(share, _hundredths(share), f"{zeros:,} of {weights:,} weights are zero ({share:.2%})")

    return _maps(matrices, cell)


def ranks_by_layer(matrices: Sequence[Matrix]) -> list[Heat]:
    """The effective rank by kind and layer, as a share of the dense model's, or of the matrix's shorter side."""
    compared = any(one.dense_effective_rank is not None for one in matrices)

    def cell(some: Sequence[Matrix]) -> Cell | None:
        pairs = []
        for one in some:
            whole = one.dense_effective_rank if compared else float(min(one.shape, default=0))
            if one.effective_rank is not None and whole:
                pairs.append((one.effective_rank, whole))
        if not pairs:
            return None
        share = sum(rank for rank, _ in pairs) / sum(whole for _, whole in pairs)
        of = "of the dense model" if compared else "of the shorter side"
        told = "; ".join(f"{rank:,.1f}, {of} {whole:,.1f}" for rank, whole in pairs[:4])
        return Cell(min(share, 1.0), _hundredths(share), told)

    maps = [_without_empty_rows(heat) for heat in _maps(matrices, cell)]
    return [heat for heat in maps if heat.rows]


def _without_empty_rows(heat: Heat) -> Heat:
    rows = [(name, cells) for name, cells in heat.rows if any(cell is not None for cell in cells)]
    return replace(heat, rows=rows)


def shapes_by_layer(matrices: Sequence[Matrix]) -> list[Heat]:
    """The sizes of the kinds of matrices whose shape differs between layers, coloured by their share of the largest."""
    shapes: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    largest: dict[tuple[str, str], int] = {}
    for one in matrices:
        place = (stack_of(one), one.kind)
        shapes.setdefault(place, set()).add(tuple(one.shape))
        largest[place] = max(largest.get(place, 1), one.weights)
    differing = [one for one in matrices if one.layer is not None and len(shapes[stack_of(one), one.kind]) > 1]

    def cell(some: Sequence[Matrix]) -> Cell | None:
        if not some:
            return None
        share = sum(one.weights for one in some) / sum(largest[stack_of(one), one.kind] for one in some)
        text = "×".join(map(str, some[0].shape))
        return Cell(share, text, f"{text}: {share:.0%} of the largest of its kind")

    return _maps(differing, cell)


def heads_by_layer(units: Iterable[UnitGroup]) -> list[Heat]:
    """The share of zeros in each head, a row for each layer; heads that have nothing but zeros are marked."""
    groups = [group for group in units if group.structure == "heads" and not group.are_quantiles and group.zeros]
    stacks: dict[str, list[UnitGroup]] = {}
    for group in groups:
        stacks.setdefault(re.sub(r"\d+", "*", group.path), []).append(group)
    maps = []
    for stack, some in stacks.items():
        width = max(len(group.zeros) for group in some)
        heat = Heat(stack if len(stacks) > 1 else "", "layer / head", [str(place) for place in range(width)])
        for group in some:
            cells: list[Cell | None] = [_head(place, share) for place, share in enumerate(group.zeros)]
            heat.rows.append((layer_name(group), [*cells, *[None] * (width - len(cells))]))
        maps.append(heat)
    return maps


def _head(place: int, share: float) -> Cell:
    if share == 1:
        return Cell(1.0, "✕", f"head {place}: nothing but zeros", is_marked=True)
    return Cell(share, _hundredths(share), f"head {place}: {share:.1%} of its weights are zero")


def layer_name(group: UnitGroup) -> str:
    """The layer that units are of, or their path where they are of none."""
    return group.path if group.layer is None else str(group.layer)


def stack_of(matrix: Matrix) -> str:
    """The path of the stack of layers that a matrix is in; empty where it is in none, or it is unknown."""
    found = re.fullmatch(rf"(.*)\.\d+\.{re.escape(matrix.kind)}(?:\.weight)?", matrix.name, re.DOTALL)
    return found[1] if found and matrix.layer is not None else ""


def _maps(matrices: Sequence[Matrix], cell: Callable[[Sequence[Matrix]], Cell | None]) -> list[Heat]:
    """A map for each stack of layers: a row for each kind, a column for each layer, in the order of the model."""
    stacks: dict[str, list[Matrix]] = {}
    for one in matrices:
        stacks.setdefault(stack_of(one), []).append(one)
    maps = []
    for stack, some in stacks.items():
        names = dict.fromkeys(one.kind for one in some)
        merged = len(names) > _MOST_KINDS
        groups: dict[str, dict[int | None, list[Matrix]]] = {}
        for one in some:
            kind = re.sub(r"\d+", "*", one.kind) if merged else one.kind
            groups.setdefault(kind, {}).setdefault(one.layer, []).append(one)
        layers = sorted({one.layer for one in some}, key=lambda layer: -1 if layer is None else layer)
        heat = Heat(
            stack if len(stacks) > 1 else "",
            "matrix / layer",
            ["–" if layer is None else str(layer) for layer in layers],
        )
        for kind, by_layer in groups.items():
            heat.rows.append((kind, [cell(by_layer[layer]) if layer in by_layer else None for layer in layers]))
        maps.append(heat)
    return maps


def _hundredths(share: float) -> str:
    """A share in percent without its sign, never 0 or 100 where it is not."""
    text = f"{100 * share:.0f}"
    if (text == "0" and share > 0) or (text == "100" and share < 1):
        text = "<1" if share < 0.5 else ">99"
    return text
