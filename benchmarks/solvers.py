"""Solvers against SparseGPT's published loop, side by side in one run: CPU seconds, layer errors, memory.

python benchmarks/solvers.py [--threads 1] [--repeats 3] [--shape 576x1536]

The weights are random; the inputs hang together and have norms of their own, as those of a language model. `floor` is
the time of a Cholesky factor and one product of weights and gram matrix, which no sweep can do without.
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch.profiler import profile

from hf_prune.methods.patterns import Pattern, parse_pattern
from hf_prune.methods.solvers import SOLVERS, Problem

SHAPES = ("576x1536", "1536x576", "4096x4096")
DAMPING = 0.1


def make(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and a gram matrix of inputs."""
    generator = torch.Generator().manual_seed(0)
    few, tokens = columns // 3, 2 * columns
    inputs = torch.randn(tokens, few, generator=generator) @ torch.randn(few, columns, generator=generator)
    inputs = inputs / few**0.5 + 0.5 * torch.randn(tokens, columns, generator=generator)
    inputs *= 0.1 + 2 * torch.rand(columns, generator=generator)
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / tokens


def published(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, drop: int) -> torch.Tensor:
    """The loop that SparseGPT's authors published, written anew: the new weights."""
    weight, gram = weight.clone(), gram.clone()
    sparsity = drop * pattern.unit_size * float(pattern.unit_sparsity) / weight.numel()
    columns = weight.shape[1]
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, columns, 128):
        block = slice(start, min(start + 128, columns))
        now, of_block = weight[:, block].clone(), factor[block, block]
        new, errors, mask = torch.zeros_like(now), torch.zeros_like(now), torch.zeros_like(now, dtype=torch.bool)
        if pattern.name == "unstructured":
            costs = now**2 / of_block.diagonal() ** 2
            mask = costs <= costs.flatten().sort().values[int(costs.numel() * sparsity)]
        for column in range(now.shape[1]):
            if pattern.name == "n:m" and column % pattern.columns == 0:
                group = slice(column, column + pattern.columns)
                costs = now[:, group] ** 2 / of_block.diagonal()[group] ** 2
                lowest = costs.topk(pattern.columns - pattern.rows, dim=1, largest=False).indices
                mask.scatter_(1, column + lowest, True)
            kept = now[:, column].masked_fill(mask[:, column], 0)
            lost = (now[:, column] - kept) / of_block[column, column]
            new[:, column], errors[:, column] = kept, lost
            now[:, column:] -= lost[:, None] @ of_block[None, column, column:]
        weight[:, block] = new
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return weight


def solved(name: str, weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, drop: int) -> torch.Tensor:
    kept = torch.ones_like(weight, dtype=torch.bool)
    problem = Problem("weight", weight[None], kept[None], pattern, drop, None, 0, gram=gram)
    return SOLVERS[name].solve(problem)[1][0]


def floor(weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, drop: int) -> torch.Tensor:
    torch.linalg.cholesky(gram + DAMPING * torch.eye(len(gram)))
    return weight @ gram


def loss_of(values: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    """The mean square of what the layer's outputs lack, as a share of theirs."""
    lack = values - weight
    return float(((lack @ gram) * lack).sum() / ((weight @ gram) * weight).sum())


def peak_bytes(action: Callable[[], object]) -> int:
    """The most that an action has allocated at once beyond what was there before."""
    with profile(profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def compare(rows: int, columns: int, text: str, repeats: int) -> None:
    """Print a table: each way in turns, the best time of each."""
    weight, gram = make(rows, columns)
    pattern = parse_pattern(text)
    units = weight.numel() // pattern.unit_size
    drop = units if pattern.name == "n:m" else units // 2
    ways: dict[str, Callable[..., torch.Tensor]] = {"published": published, "floor": floor}
    for name in SOLVERS:
        ways[name] = lambda *problem, name=name: solved(name, *problem)
    times: dict[str, list[float]] = {name: [] for name in ways}
    values = {}
    for repeat in range(repeats):
        for name in sorted(ways, reverse=bool(repeat % 2)):
            start = time.process_time()
            values[name] = ways[name](weight, gram, pattern, drop)
            times[name].append(time.process_time() - start)
    print(f"{rows} x {columns}, {text}: the published loop takes {min(times['published']):.2f} CPU seconds")
    square, plain = gram.numel() * 4, weight.numel() * 4
    for name in ("floor", *SOLVERS):
        ratio = min(times[name]) / min(times["published"])
        line = f"{name:>10}: {min(times[name]):.2f} s, ratio {ratio:.2f}"
        if name != "floor":
            peak = peak_bytes(lambda name=name: ways[name](weight, gram, pattern, drop)) + square + plain
            error, other = (loss_of(values[one], weight, gram) for one in (name, "published"))
            line += f"; error {error:.4f}, published {other:.4f}; at most {peak / 2**20:.0f} MiB"
            line += f" with the problem's own, {peak / (3 * square + 5 * plain):.2f} of 3 d² + 5 r d"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", action="append", help=f"rows x columns; {', '.join(SHAPES)} without it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.threads} thread(s), the best of {options.repeats}, in turns")
    for shape in options.shape or SHAPES:
        rows, columns = (int(side) for side in shape.split("x"))
        for text in ("unstructured", "2:4"):
            compare(rows, columns, text, options.repeats)


if __name__ == "__main__":
    main()
