"""What a model card says of removed units and tokens, and of the structure that was chosen for a target."""

from ..saved.removed import Removed, listed
from ..structure.chosen import Chosen
from ..structure.units import words_for
from .markdown import code, inline
from .record import RemovedTokens
from .sparsity_json import Figures


def removed_words(figures: Figures) -> str | None:
    """What was removed, in a sentence; None if nothing was."""
    if figures.removed is None:
        return None
    before, after = map(_rounded, figures.removed.parameters)
    return f"{inline(figures.removed.words)} were removed: {before} parameters became {after}"


def tokens_words(removed: RemovedTokens | None) -> str | None:
    """Which tokens left the vocabulary, and what that saves; None if none did."""
    if removed is None or removed.before <= removed.after:
        return None
    gone, saved = removed.before - removed.after, f"{_rounded(removed.parameters)} parameters"
    return (
        f"**{gone:,} of {removed.before:,} tokens were removed from the vocabulary**, which no text of the training "
        f"data has: {saved}, {removed.bytes / 1e6:,.1f} MB"
    )


def _rounded(number: int) -> str:
    """A number of parameters: `22.7M`, or exact below a million."""
    for size, sign in ((10**9, "B"), (10**6, "M")):
        if number >= size:
            return f"{number / size:.1f}{sign}"
    return f"{number:,}"


def removed_rows(removed: Removed | None) -> list[tuple[str, str, str]]:
    """What there was, and what is left: parameters, units, layers."""
    if removed is None:
        return []
    rows = [("parameters", removed.parameters)]
    for structure in (name for name in removed.structures if name != "layers"):
        numbers = removed.in_each(structure) or removed.totals(structure)
        rows.append((f"{words_for(structure)}{removed.where(structure)}", numbers))
    rows += [(f"layers of {code(stack.path)}", (stack.of, len(stack.kept))) for stack in removed.layers]
    return [(name, f"{before:,}", f"{after:,}") for name, (before, after) in rows]


def units_alt(removed: Removed | None) -> str:
    """What the plot of units shows."""
    if removed is None:
        return ""
    units = listed([words_for(structure) for structure in removed.structures])
    return f"Bar chart of the {units} that are left: {inline(removed.words)} were removed"


def search_alt(chosen: Chosen) -> str:
    """What the plot of the search shows."""
    return f"Speed and predicted change of the structures considered for {chosen.target.words}"
