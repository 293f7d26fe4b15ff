"""Mask updates against `torch.kthvalue`, side by side in one run: time ratios, and what an update allocates.

python benchmarks/selection.py [--weights 100000000] [--threads 1]
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import profile

from hf_prune import Pruner, PruningConfig


class Stack(nn.Module):
    """Square linear layers in a stack, `weights` in all."""

    def __init__(self, weights: int, layers: int = 24):
        super().__init__()
        width = int((weights / layers) ** 0.5)
        blocks = [nn.Sequential(nn.Linear(width, width, bias=False)) for _ in range(layers)]
        self.layers = nn.ModuleList(blocks)


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def by_kthvalue(model: nn.Module, sparsity: float, together: bool) -> None:
    magnitudes = [parameter.detach().abs().reshape(-1) for parameter in model.parameters()]
    for scores in [torch.cat(magnitudes)] if together else magnitudes:
        torch.kthvalue(scores, round(sparsity * scores.numel()))


def by_pruner(pruner: Pruner) -> None:
    pruner.update(1)


def make_pruner(model: nn.Module, scope: str, sparsity: float) -> Pruner:
    config = PruningConfig(sparsity=sparsity, scope=scope, schedule="one_shot", begin=1)
    return Pruner(model, config, total_steps=1)


def compare(weights: int, scope: str, sparsity: float, repeats: int) -> tuple[float, float]:
    """The best of several times for the pruner's whole mask update and for kthvalue alone, order alternated."""
    times: dict[str, list[float]] = {"pruner": [], "kthvalue": []}
    for repeat in range(repeats):
        torch.manual_seed(repeat)
        model = Stack(weights)
        pruner = make_pruner(copy.deepcopy(model), scope, sparsity)
        actions = {
            "kthvalue": lambda model=model: by_kthvalue(model, sparsity, together=scope == "global"),
            "pruner": lambda pruner=pruner: by_pruner(pruner),
        }
        for name in sorted(actions, reverse=bool(repeat % 2)):
            times[name].append(seconds(actions[name]))
    return min(times["pruner"]), min(times["kthvalue"])


def peak_mebibytes(weights: int, scope: str, sparsity: float) -> float:
    """The most that a whole mask update has allocated at once beyond what was there before."""
    model = Stack(weights)
    with profile(profile_memory=True) as profiler:
        pruner = make_pruner(model, scope, sparsity)
        start_ns = time.time_ns()
        by_pruner(pruner)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    before = sum(event.nbytes() for event in events if event.start_ns() < start_ns)
    after = sorted((event.start_ns(), event.nbytes()) for event in events if event.start_ns() >= start_ns)
    return (max(itertools.accumulate((nbytes for _, nbytes in after), initial=before)) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=100_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.weights:,} float32 weights in 24 tensors, {options.threads} thread(s), best of {options.repeats}")
    for scope in ("layer", "global"):
        pruner, kthvalue = compare(options.weights, scope, 0.8, options.repeats)
        print(f"{scope:>6}: mask update {pruner:.2f} s, kthvalue {kthvalue:.2f} s, ratio {pruner / kthvalue:.2f}")
        peak = peak_mebibytes(options.weights, scope, 0.8)
        print(f"{scope:>6}: at most {peak:.1f} MiB more were allocated during an update")


if __name__ == "__main__":
    main()
