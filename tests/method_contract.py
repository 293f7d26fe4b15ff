"""What every criterion and every solver must keep, those of other packages too: run `check_criterion` on an entry."""

from itertools import pairwise

import torch

from hf_prune.methods.criteria import Piece
from hf_prune.methods.patterns import PATTERNS, parse_pattern
from hf_prune.methods.solvers import Problem

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPES = ((0,), (1,), (7,), (3, 5))


def check_criterion(criterion):
    """Scores and memory have the right kind, depend on their weights alone, and change nothing."""
    _check_words(criterion)
    assert bool(criterion.memory) == (criterion.remember is not None)
    for dtype in DTYPES:
        for shape in SHAPES:
            weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).reshape(-1)
            check_scores(criterion, weight.requires_grad_(), offset=3, cuts=[0, 2, 5])


def check_scores(criterion, weight, offset, cuts):
    """The same for one flat tensor, of which slices must give what the whole gives."""
    statistic = torch.rand(len(weight), generator=torch.Generator().manual_seed(1)) + 0.1
    memory = {
        name: torch.randn(len(weight), generator=torch.Generator().manual_seed(2 + index))
        for index, name in enumerate(criterion.memory)
    }
    before, seen = weight.detach().clone(), {name: values.clone() for name, values in memory.items()}
    edges = [0, *sorted(min(cut, len(weight)) for cut in cuts), len(weight)]
    parts = [slice(start, stop) for start, stop in pairwise(edges)]

    def piece(part):
        remembered = {name: values[part] for name, values in memory.items()}
        return Piece("w", offset + (part.start or 0), seed=3, statistic=statistic[part], memory=remembered)

    scores = criterion.score(weight, piece(slice(None)))
    assert scores.dtype in (torch.float32, torch.int32)
    assert scores.shape == weight.shape
    assert not scores.requires_grad
    assert torch.equal(torch.cat([criterion.score(weight[part], piece(part)) for part in parts]), scores)
    if criterion.remember is not None:
        now = criterion.remember(weight, piece(slice(None)))
        assert set(now) == set(criterion.memory)
        for name, values in now.items():
            assert (values.dtype, values.shape, values.requires_grad) == (torch.float32, weight.shape, False)
            of_parts = [criterion.remember(weight[part], piece(part))[name] for part in parts]
            assert torch.equal(torch.cat(of_parts), values)
    assert torch.equal(weight, before)
    assert all(torch.equal(values, seen[name]) for name, values in memory.items())


def check_solver(solver):
    """As many units are dropped as were asked for, what was masked stays so, and the problem is left as it was."""
    _check_words(solver, ("products",))
    assert (solver.damping is not None) == (solver.reads == "products")
    for text in ("unstructured", "2:4", "block:2x2"):
        pattern, rules = parse_pattern(text), PATTERNS[parse_pattern(text).name]
        for batch in (1, 3):
            weight = torch.randn(batch, 6, 8, generator=torch.Generator().manual_seed(batch))
            kept = torch.ones_like(weight, dtype=torch.bool)
            kept[:, :2, :4] = False
            weight = weight * kept
            statistic = torch.rand(weight.shape, generator=torch.Generator().manual_seed(9)) + 0.1
            inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(9))
            gram = inputs.T @ inputs / len(inputs) if solver.reads == "products" else None
            there = int(rules.dropped(kept, pattern).sum())
            units = weight.numel() // pattern.unit_size
            for drop in (0, 1, (units - there) // 2, units - there):

                def problem(drop=drop, given=(weight, kept, statistic, gram), pattern=pattern):
                    weight, kept, statistic, gram = (None if one is None else one.clone() for one in given)
                    return Problem("w", weight, kept, pattern, drop, statistic, seed=3, gram=gram)

                first = problem()
                mask, values = solver.solve(first)
                assert (mask.dtype, mask.shape) == (torch.bool, weight.shape)
                assert (values.dtype, values.shape) == (torch.float32, weight.shape)
                assert int(rules.dropped(mask, pattern).sum()) - there == drop
                assert not (mask & ~kept).any()
                assert values[mask].isfinite().all()
                for name in ("weight", "kept", "statistic", "gram"):
                    now, before = getattr(first, name), getattr(problem(), name)
                    assert (now is None and before is None) or torch.equal(now, before)
                again = solver.solve(problem())
                assert torch.equal(again[0], mask)
                assert torch.equal(again[1], values)


def _check_words(entry, more_reads=()):
    assert entry.words
    assert entry.reads in (None, "inputs", "gradients", *more_reads)
    assert entry.paper is None or entry.paper.startswith("@")
