"""The solvers against plain dense algebra in float64, written without any of their code."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import profile

from hf_prune import PruningStateError
from hf_prune.methods import admm, obs
from hf_prune.methods.choosing import drop_lowest, shares
from hf_prune.methods.damping import Damping, ridge_of
from hf_prune.methods.patterns import PATTERNS, parse_pattern
from hf_prune.methods.solvers import SOLVERS, Problem
from hf_prune.methods.survivors import solve_survivors, wanted_weights

quick = settings(max_examples=40, deadline=None, derandomize=True)

SOLVING = {"sparsegpt": obs.sweep, "alps": admm.admm}
TEXTS = ["unstructured", "2:4", "1:3", "block:4x1", "block:2x3"]


def make(rows, columns, seed=0, dtype=torch.float64, tokens=None):
    """Weights, and the gram matrix of inputs that hang together and have norms of their own."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * columns
    few = max(columns // 3, 1)
    inputs = torch.randn(tokens, few, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(few, columns, generator=generator, dtype=torch.float64) / few**0.5
    inputs += 0.5 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    inputs *= 0.1 + 2 * torch.rand(columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight.to(dtype), (inputs.T @ inputs / tokens).to(dtype)


def all_kept(weight):
    return torch.ones_like(weight, dtype=torch.bool)


def error_of(values, wanted, gram):
    """What a layer's output has lost, as a share of its mean square."""
    lost, wanted, gram = (values - wanted).double(), wanted.double(), gram.double()
    return float(((lost @ gram) * lost).sum() / ((wanted @ gram) * wanted).sum())


def units_in(weight, text):
    return weight.numel() // parse_pattern(text).unit_size


def final_drop(weight, text):
    return units_in(weight, text) if ":" in text and "block" not in text else units_in(weight, text) // 2


# ---- The references ----


def damped(gram, share, of):
    matrix = gram.clone()
    mean = float(gram.diagonal().mean())
    for index in range(len(gram)):
        matrix[index, index] += share * (mean if of == "mean" else float(gram[index, index]))
    return matrix


def units_of(columns, rows, text):
    """The cells of each unit of a range of columns, in the order of units."""
    if text == "unstructured":
        return [[(row, column)] for row in range(rows) for column in columns]
    if text.startswith("block"):
        high, wide = (int(side) for side in text.removeprefix("block:").split("x"))
        return [
            [(row + i, column + j) for i in range(high) for j in range(wide)]
            for row in range(0, rows, high)
            for column in columns[::wide]
        ]
    size = int(text.split(":")[1])
    return [[(row, column + j) for j in range(size)] for row in range(rows) for column in columns[::size]]


def sparsegpt(weight, gram, kept, text, counts, share, width):
    """The published loop: the upper factor U of the inverse, every column to the right updated after each."""
    rows, columns = weight.shape
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(gram, share, "mean")), upper=True).numpy()
    values, mask, kept = weight.numpy().copy(), kept.numpy().copy(), kept.numpy()
    keeps = [int(part) for part in text.split(":")] if text[0].isdigit() else None

    def cost(row, column):
        return float(values[row, column] / factor[column, column]) ** 2

    for place, start in enumerate(range(0, columns, width)):
        block = list(range(start, min(start + width, columns)))
        ranked = []
        for number, cells in enumerate(units_of(block, rows, text)):
            costs = sorted(cost(*cell) for cell in cells if kept[cell])
            if keeps is None and costs:
                ranked.append((sum(costs), number, cells))
            elif keeps is not None and len(costs) > keeps[0]:
                ranked.append((sum(costs[: len(costs) - keeps[0]]), number, cells))
        chosen = [cells for _, _, cells in sorted(ranked)[: counts[place]]]
        for cells in chosen if keeps is None else ():
            for cell in cells:
                mask[cell] = False
        for column in block:
            for cells in chosen if keeps is not None else ():
                if cells[0][1] == column:
                    there = sorted((cost(*cell), cell) for cell in cells if kept[cell])
                    for _, cell in there[: len(there) - keeps[0]]:
                        mask[cell] = False
            for row in range(rows):
                if not mask[row, column]:
                    lost = values[row, column] / factor[column, column]
                    values[row, column:] -= lost * factor[column, column:]
    return torch.from_numpy(mask), torch.from_numpy(values * mask)


def least_squares(wanted, matrix, mask):
    """Row by row, the normal equations of the weights that stay."""
    values = torch.zeros_like(wanted)
    for row in range(len(wanted)):
        stay = mask[row].nonzero().reshape(-1)
        right = (wanted[row] @ matrix)[stay]
        values[row, stay] = torch.linalg.solve(matrix[stay][:, stay], right)
    return values


def alps(weight, gram, kept, drop, share, rounds=12, ramp=8):
    """The rounds in coordinates in which the damped gram matrix has ones on its diagonal, single weights only."""
    matrix = damped(gram, share, "own")
    scales = matrix.diagonal().sqrt()
    scaled = matrix / torch.outer(scales, scales)
    wanted = weight * scales
    inverse = torch.linalg.inv(scaled + torch.eye(len(gram), dtype=gram.dtype))
    dense, dual = wanted.clone(), torch.zeros_like(wanted)
    for number in range(1, rounds + 1):
        count = round(drop * (1 - (1 - min(number / ramp, 1)) ** 3))
        both = dense + dual
        cells = [(abs(float(both[cell])), cell) for cell in np.ndindex(*both.shape) if kept[cell]]
        mask = kept.clone()
        for _, cell in sorted(cells)[:count]:
            mask[cell] = False
        sparse = both * mask
        dual = both - sparse
        dense = (wanted @ scaled + sparse - dual) @ inverse
    return mask, least_squares(weight, matrix, mask)


# ---- Each solver and its reference ----


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("zeros", [False, True])
def test_the_sweep_is_the_published_loop(text, zeros):
    weight, gram = make(4, 300)
    kept = all_kept(weight)
    if zeros:
        kept[:2, :12] = False
        kept[3, 100:120] = False
        weight = weight * kept
    pattern = parse_pattern(text)
    width = {"1:3": 126, "block:2x3": 126}.get(text, 128)
    if text in ("2:4", "1:3"):
        drop = units_in(weight, text) - int(PATTERNS["n:m"].dropped(kept[None], pattern).sum())
        drop -= 30 if zeros else 0
    else:
        drop = units_in(weight, text) // 3
    mask, values = obs.sweep(weight, gram, kept, pattern, drop)
    units_before = PATTERNS[pattern.name].dropped(kept[None], pattern)[0]
    units_after = PATTERNS[pattern.name].dropped(mask[None], pattern)[0]
    wide = width // pattern.sides[1]
    before, after = ([int(part.sum()) for part in units.split(wide, 1)] for units in (units_before, units_after))
    counts = [now - then for now, then in zip(after, before, strict=True)]
    assert sum(counts) == drop
    expected_mask, expected = sparsegpt(weight, gram, kept, text, counts, 0.1, width)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)


def test_the_blocks_of_a_sweep_end_equally_sparse():
    weight, gram = make(5, 300)
    kept = all_kept(weight)
    mask, _ = obs.sweep(weight, gram, kept, parse_pattern("unstructured"), 601)
    dropped = [int((~part).sum()) for part in mask.split(128, 1)]
    assert dropped == [257, 256, 88]  # of 640, 640 and 220: 256.43, 256.43 and 88.15
    kept[:, :100] = False
    mask, _ = obs.sweep(weight, gram, kept, parse_pattern("unstructured"), 100)
    assert [int((~part).sum()) for part in mask.split(128, 1)] == [500, 74, 26]


@pytest.mark.parametrize("zeros", [False, True])
def test_admm_is_the_reference_in_scaled_coordinates(zeros):
    weight, gram = make(6, 20, seed=3)
    kept = all_kept(weight)
    if zeros:
        kept[1:3, 2:9] = False
        weight = weight * kept
    mask, values = admm.admm(weight, gram, kept, parse_pattern("unstructured"), 55)
    expected_mask, expected = alps(weight, gram, kept, 55, 0.3)
    assert torch.equal(mask, expected_mask)
    matrix = damped(gram, 0.3, "own")
    assert error_of(values, weight, matrix) == pytest.approx(error_of(expected, weight, matrix), rel=1e-5)
    torch.testing.assert_close(values, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
@pytest.mark.parametrize("of", ["mean", "own"])
def test_survivors_are_the_exact_solutions_of_each_row_to_five_digits(dtype, share, of):
    for seed, density in itertools.product(range(3), (0.1, 0.5, 0.9)):
        weight, gram = make(12, 60, seed)
        mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) < density
        mask[0] = False
        mask[1] = True
        matrix = damped(gram, share, of)
        exact = error_of(least_squares(weight, matrix, mask), weight, matrix)
        values = solve_survivors(weight.to(dtype), gram.to(dtype), mask, Damping(share, of))
        assert not values[~mask].any()
        assert error_of(values, weight, matrix) == pytest.approx(exact, rel=1e-5)
        torch.testing.assert_close(values[1], weight[1].to(dtype))


def test_survivors_start_from_the_weights_of_a_solver():
    weight, gram = make(12, 60)
    mask, values = obs.sweep(weight, gram, all_kept(weight), parse_pattern("unstructured"), 360)
    matrix = damped(gram, 0.1, "mean")
    before = error_of(values, weight, matrix)
    solved = solve_survivors(weight, gram, mask, obs.DAMPING, start=values)
    exact = error_of(least_squares(weight, matrix, mask), weight, matrix)
    assert error_of(solved, weight, matrix) == pytest.approx(exact, rel=1e-5)
    assert exact < 0.9 * before


def test_wanted_weights_bring_a_layer_nearest_to_the_dense_model():
    generator = torch.Generator().manual_seed(0)
    weight, _ = make(5, 8)
    inputs = torch.randn(50, 8, generator=generator, dtype=torch.float64)
    dense = inputs + 0.3 * torch.randn(50, 8, generator=generator, dtype=torch.float64)
    lacks = torch.randn(50, 5, generator=generator, dtype=torch.float64)
    gram, cross, lack = inputs.T @ inputs / 50, dense.T @ inputs / 50, lacks.T @ inputs / 50

    # Everything: least squares on the tokens, and rows that pull towards the weights.
    ridge = 0.1 * gram.diagonal().mean()
    found = wanted_weights(weight, gram, Damping(0.1), cross, lack)
    left = torch.cat([inputs / 50**0.5, ridge.sqrt() * torch.eye(8, dtype=torch.float64)])
    right = torch.cat([(dense @ weight.T + lacks) / 50**0.5, ridge.sqrt() * weight.T])
    torch.testing.assert_close(found, torch.linalg.lstsq(left, right).solution.T)

    # A part of the way: the target's products with the inputs.
    alpha, beta = 0.6, 0.5
    matrix = damped(gram, 0.3, "own")
    rows = weight @ ((1 - alpha) * matrix + alpha * (cross + matrix - gram)) + beta * lack
    found = wanted_weights(weight, gram, Damping(0.3, "own"), cross, lack, alpha, beta)
    torch.testing.assert_close(found, rows @ torch.linalg.inv(matrix))

    torch.testing.assert_close(wanted_weights(weight, gram, Damping(0.1)), weight)
    torch.testing.assert_close(wanted_weights(weight, gram, Damping(0.1), gram), weight)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_approximates_what_is_wanted(name):
    weight, gram = make(8, 24, dtype=torch.float32)
    wanted = weight + 0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    pattern = parse_pattern("unstructured")
    problem = Problem("w", weight[None], all_kept(weight)[None], pattern, 96, None, 0, gram=gram, wanted=wanted[None])
    kept, values = SOLVERS[name].solve(problem)
    expected = SOLVING[name](wanted, gram, all_kept(weight), pattern, 96)
    assert torch.equal(kept[0], expected[0])
    assert torch.equal(values[0], expected[1])
    assert error_of(values[0], wanted, gram) < error_of(weight * kept[0], wanted, gram)


# ---- Counts ----


@st.composite
def problems(draw):
    text = draw(st.sampled_from(TEXTS))
    pattern = parse_pattern(text)
    rows = draw(st.integers(1, 4)) * pattern.sides[0]
    columns = draw(st.integers(1, 12)) * pattern.sides[1]
    seed = draw(st.integers(0, 2**16))
    weight, gram = make(rows, columns, seed, torch.float32)
    generator = torch.Generator().manual_seed(seed + 1)
    kept = torch.rand(weight.shape, generator=generator) < draw(st.sampled_from([1.0, 0.9, 0.5, 0.1]))
    if draw(st.booleans()):
        weight = weight.sign()  # with many equal scores
        gram = torch.eye(columns)
    dropped = PATTERNS[pattern.name].dropped(kept[None], pattern)[0]
    drop = draw(st.integers(0, int(dropped.numel() - dropped.sum())))
    return weight * kept, gram, kept, pattern, drop, draw(st.booleans())


def check_counts(mask, kept, pattern, drop, within_rows):
    rules = PATTERNS[pattern.name]
    before, after = (rules.dropped(one[None], pattern)[0].sum(1) for one in (kept, mask))
    assert not (mask & ~kept).any()
    assert int((after - before).sum()) == drop
    if within_rows and drop:
        changed = after[after > before]
        assert int(changed.max() - changed.min()) <= 1
        assert int(after.min()) >= int(changed.max()) - 1
    whole = rules.drop(torch.zeros_like(rules.dropped(kept[None], pattern)), mask[None].float(), kept[None], pattern)[0]
    fully = rules.dropped(mask[None], pattern)
    if pattern.name == "n:m":
        groups = mask.unflatten(1, (-1, pattern.columns)).sum(2)
        same = (mask == whole).unflatten(1, (-1, pattern.columns)).all(2)
        assert bool((same | (groups == pattern.rows)).all())
    elif pattern.name == "block":
        blocks = (mask == whole).unflatten(1, (-1, pattern.columns)).unflatten(0, (-1, pattern.rows)).all(3).all(1)
        assert bool((blocks | fully[0]).all())


@quick
@given(problems())
def test_masks_of_scores_have_exact_counts(problem):
    weight, _, kept, pattern, drop, within_rows = problem
    mask = drop_lowest(weight.abs(), kept, pattern, drop, within_rows)
    check_counts(mask, kept, pattern, drop, within_rows)


@pytest.mark.parametrize("name", SOLVERS)
@quick
@given(problems())
def test_solvers_have_exact_counts(name, problem):
    weight, gram, kept, pattern, drop, within_rows = problem
    given_to = Problem("w", weight[None], kept[None], pattern, drop, None, 0, gram=gram, within_rows=within_rows)
    mask, values = SOLVERS[name].solve(given_to)
    check_counts(mask[0], kept, pattern, drop, within_rows)
    assert values.isfinite().all()
    assert not values[~mask].any()
    again = SOLVERS[name].solve(given_to)
    assert torch.equal(again[0], mask)
    assert torch.equal(again[1], values)


@quick
@given(problems())
def test_masks_of_scores_are_the_sorted_ones(problem):
    weight, _, kept, _, drop, _ = problem
    drop = min(drop, int(kept.sum()))
    cells = [(abs(float(weight[cell])), cell) for cell in np.ndindex(*weight.shape) if kept[cell]]
    expected = kept.clone()
    for _, cell in sorted(cells)[:drop]:
        expected[cell] = False
    assert torch.equal(drop_lowest(weight.abs(), kept, parse_pattern("unstructured"), drop), expected)


def test_masks_of_integer_scores():
    scores = torch.tensor([[5, -3, 2, 2], [2, 7, -3, 0]], dtype=torch.int32)
    mask = drop_lowest(scores.clone(), all_kept(scores), parse_pattern("unstructured"), 4)
    assert mask.tolist() == [[True, False, False, True], [True, True, False, False]]
    mask = drop_lowest(scores.clone(), all_kept(scores), parse_pattern("unstructured"), 4, within_rows=True)
    assert mask.tolist() == [[True, False, False, True], [True, True, False, False]]
    mask = drop_lowest(scores.clone(), all_kept(scores), parse_pattern("1:2"), 4)
    assert mask.tolist() == [[True, False, False, True], [False, True, False, True]]


@quick
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_are_level_and_exact(parts, share):
    sizes = np.array([size for size, _ in parts])
    dropped = np.array([int(size * gone) for size, gone in parts])
    drop = int(share * (sizes - dropped).sum())
    [more] = shares(sizes, dropped[None], np.array([drop]))
    assert more.sum() == drop
    assert (more >= 0).all()
    assert (dropped + more <= sizes).all()
    level = max(((dropped + more - 1) / sizes)[more > 0], default=0)
    assert ((dropped + more + 1) / sizes > level).all()


# ---- What the masks are worth ----


@pytest.mark.parametrize("text", ["unstructured", "2:4", "block:4x1"])
@pytest.mark.parametrize("seed", range(3))
def test_layers_lose_least_with_alps_then_sparsegpt_wanda_and_magnitude(text, seed):
    weight, gram = make(64, 96, seed, torch.float32)
    pattern, kept, drop = parse_pattern(text), all_kept(weight), final_drop(weight, text)
    magnitude = drop_lowest(weight.abs(), kept, pattern, drop, within_rows=True)
    wanda = drop_lowest(weight.abs() * gram.diagonal().sqrt(), kept, pattern, drop, within_rows=True)
    errors = [
        error_of(admm.admm(weight, gram, kept, pattern, drop)[1], weight, gram),
        error_of(obs.sweep(weight, gram, kept, pattern, drop)[1], weight, gram),
        error_of(weight * wanda, weight, gram),
        error_of(weight * magnitude, weight, gram),
    ]
    assert errors == sorted(errors)
    assert errors[1] < 0.8 * errors[2]
    assert errors[2] < 0.8 * errors[3]


def best_swap(weight, matrix, mask):
    """The least error after a kept and a dropped weight are exchanged and rows solved anew, as a share of today's."""
    rows, columns = weight.shape

    def row_error(row, stay):
        solved = least_squares(weight[row : row + 1], matrix, stay[None])[0] - weight[row]
        return float(solved @ matrix @ solved)

    now = [row_error(row, mask[row]) for row in range(rows)]
    without, added, both = {}, {}, {}
    for row, column in itertools.product(range(rows), range(columns)):
        stay = mask[row].clone()
        stay[column] = ~stay[column]
        (without if mask[row, column] else added)[row, column] = row_error(row, stay) - now[row]
        for other in range(columns):
            if mask[row, column] and not mask[row, other]:
                swapped = stay.clone()
                swapped[other] = True
                both[row, column, other] = row_error(row, swapped) - now[row]
    across = [loss + gain for (i, _), loss in without.items() for (j, _), gain in added.items() if i != j]
    return 1 + min(*both.values(), *across) / sum(now)


def test_no_swap_betters_the_mask_of_alps_by_more_than_five_percent():
    pattern, by_alps, by_wanda = parse_pattern("unstructured"), [], []
    for seed, (rows, columns, drop) in itertools.product(range(4), [(5, 16, 40), (3, 24, 50)]):
        weight, gram = make(rows, columns, seed)
        matrix, kept = damped(gram, 0.3, "own"), all_kept(weight)
        mask, _ = admm.admm(weight, gram, kept, pattern, drop)
        wanda = drop_lowest(weight.abs() * gram.diagonal().sqrt(), kept, pattern, drop)
        by_alps.append(best_swap(weight, matrix, mask))
        by_wanda.append(best_swap(weight, matrix, wanda))
    assert min(by_alps) > 0.95
    assert min(by_wanda) < 0.9


# ---- Memory ----


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("text", ["unstructured", "2:4"])
@pytest.mark.parametrize(("rows", "columns"), [(512, 1024), (1536, 768)])
def test_solvers_need_the_memory_that_they_say(name, text, rows, columns):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    gram = torch.eye(columns) + 0.1
    kept = all_kept(weight)[None]
    problem = Problem("w", weight[None], kept, parse_pattern(text), final_drop(weight, text), None, 0, gram=gram)
    SOLVERS[name].solve(problem)  # libraries take memory of their own at first use
    with profile(profile_memory=True) as profiler:
        SOLVERS[name].solve(problem)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    most = max(itertools.accumulate(event.nbytes() for event in events))
    given_bytes = 4 * gram.numel() + 4 * weight.numel() + kept.numel()
    assert (most + given_bytes) / 4 == pytest.approx(SOLVERS[name].numbers(rows, columns), rel=0.1)


# ---- Damping ----


@pytest.mark.parametrize("name", SOLVERS)
def test_more_damping_changes_the_weights_that_stay_less(name):
    weight, gram = make(8, 24)
    pattern = parse_pattern("unstructured")
    moved = []
    for share in (1e-3, 0.1, 10.0, 1e6):
        mask, values = SOLVING[name](weight, gram, all_kept(weight), pattern, 96, Damping(share, obs.DAMPING.of))
        moved.append(float((values - weight)[mask].norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-4
    dampings = [SOLVERS[name].damping.share, None, 0.7]
    problem = {"weight": weight[None].float(), "kept": all_kept(weight)[None], "gram": gram.float()}
    by_default, without, other = (
        SOLVERS[name].solve(Problem("w", pattern=pattern, drop=96, statistic=None, seed=0, damping=damping, **problem))[
            1
        ]
        for damping in dampings
    )
    assert torch.equal(by_default, without)
    assert not torch.equal(by_default, other)


@pytest.mark.parametrize("of", ["mean", "own"])
def test_what_is_added_to_the_diagonal(of):
    gram = torch.diag(torch.tensor([1.0, 3.0, 0.0, 4.0]))
    expected = {"mean": [0.2, 0.2, 2e-12, 0.2], "own": [0.1, 0.3, 2e-12, 0.4]}[of]
    torch.testing.assert_close(ridge_of(gram, Damping(0.1, of)), torch.tensor(expected))
    assert ridge_of(torch.zeros(3, 3), Damping(0.1, of)).tolist() == [1.0] * 3


@pytest.mark.parametrize("name", SOLVERS)
def test_weights_of_features_that_are_always_zero_go_first(name):
    weight, gram = make(8, 24)
    gram[[3, 17]] = 0
    gram[:, [3, 17]] = 0
    weight[:, 3] *= 100
    for drop, lost in ((16, [8, 8]), (8, [0, 8])):
        mask, values = SOLVING[name](weight, gram, all_kept(weight), parse_pattern("unstructured"), drop)
        assert (~mask).sum(0)[[3, 17]].tolist() == lost
        torch.testing.assert_close(values, weight * mask)
    weight, inputs = weight.float(), torch.randn(32, 24) * torch.linspace(1e-4, 1, 24)
    for scale in (0, 1e-22, 1e-16, 1e-14):  # squares have few binary digits, or none
        nothing = (inputs * scale).T @ (inputs * scale)
        mask, values = SOLVING[name](weight, nothing, all_kept(weight), parse_pattern("unstructured"), 96)
        assert int(mask.sum()) == 96
        torch.testing.assert_close(values, weight * mask)


def test_damping_is_raised_where_there_is_no_cholesky_factor(caplog):
    weight, gram = make(8, 24)
    values, vectors = torch.linalg.eigh(gram)
    values[0] = -0.002 * gram.diagonal().mean()
    indefinite = vectors @ values.diag() @ vectors.T
    _, found = obs.sweep(weight, indefinite, all_kept(weight), parse_pattern("unstructured"), 96, Damping(0.0))
    shares = ["0", "1e-06", "1e-05", "0.0001", "0.001", "0.01"]
    assert caplog.messages == [
        f"The inputs' gram matrix is not positive definite with a damping of {before}; it is raised to {after}."
        for before, after in itertools.pairwise(shares)
    ]
    assert torch.equal(
        found, obs.sweep(weight, indefinite, all_kept(weight), parse_pattern("unstructured"), 96, Damping(0.01))[1]
    )


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("place", [(2, 2), (2, 3)])
def test_inputs_that_are_not_finite_are_refused(name, place, caplog):
    weight, gram = make(8, 24)
    gram[place] = gram[place[::-1]] = float("nan")
    with pytest.raises(PruningStateError, match="expected a symmetric gram matrix of inputs with finite values"):
        SOLVING[name](weight, gram, all_kept(weight), parse_pattern("unstructured"), 96)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_compute_in_float32_whatever_is_set(name):
    weight, gram = make(8, 24, dtype=torch.float32)
    problem = Problem("w", weight[None], all_kept(weight)[None], parse_pattern("2:4"), 48, None, 0, gram=gram)
    expected = SOLVERS[name].solve(problem)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = SOLVERS[name].solve(problem)
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
