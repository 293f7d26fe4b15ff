"""What an exact mask update costs as models grow: time, memory and bytes over the wire on 1, 2 and 4 processes.

python benchmarks/scale.py [--quick]

A stack of linear layers, float32, sharded on dim 0 over gloo processes, is pruned to 80% by the real Pruner on the
default schedule of 60 updates. A cost model is fitted, leaving one size out, and an update on GPUs is projected.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import TorchDispatchMode

from hf_prune import Pruner, PruningConfig
from hf_prune.engines import optimizers
from hf_prune.masking import ranking, selection

SCOPES = ("global", "layer")
PROCESSES = (1, 2, 4)
FINAL_SPARSITY = 0.8
UPDATES = 60

# (layers, width): close to 10, 30, 75, 100, 150, 300 and 1,000 million weights; more than 64 tensors take two turns.
SIZES = ((10, 1024), (28, 1024), (72, 1024), (24, 2048), (140, 1024), (72, 2048), (60, 4096))
QUICK_SIZES = ((10, 720), (10, 1024), (28, 1024))
LEFT_OUT, QUICK_LEFT_OUT = (72, 2048), (10, 1024)

# Updates by their number on the schedule, in the order in which they are made: from no zeros to 44% at once; then what
# the schedule asks for there, 2% a time; and near its end, 0.02% and less. None is a step between that is not timed.
KINDS = (("at once", (14,)), ("middle", (15, 16, 17)), (None, (55,)), ("late", (56, 57, 58)))

# What is assumed of GPUs (H100 SXM) and their training; none of it is measured here.
MEMORY_BANDWIDTH, MEMORY_EFFICIENCY = 3.35e12, 0.5
COUNTED_KEYS_A_SECOND = 5e9  # torch.bincount into 65,536 counters: atomic additions, many to the same few
SECONDS_AN_OPERATION = 10e-6
WIRE_BANDWIDTH = 50e9
LATENCIES = {8: 30e-6, 64: 100e-6, 1024: 300e-6}
STEPS, TOKENS_A_STEP = 1000, 4e6
FLOPS, UTILIZATION = 989e12, 0.4
GPU_BYTES, TRAINING_BYTES_A_WEIGHT = 80e9, 16
MODELS = {"8 B": (8e9, 32 * 7), "70 B": (70e9, 80 * 7), "405 B": (405e9, 126 * 7)}
AIM_ERROR, AIM_SHARE = 20, 2


# ---- The model ----


class Stack(nn.Module):
    """Square linear layers in a stack, their weights on no device yet."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(width, width, bias=False, device="meta")) for _ in range(layers)]
        self.layers = nn.ModuleList(blocks)


def make_stack(layers: int, width: int, mesh: DeviceMesh | None) -> Stack:
    """A stack of which each process draws only its own part; without a mesh, the whole."""
    rank, processes = (mesh.get_rank(), mesh.size()) if mesh is not None else (0, 1)
    generator = torch.Generator().manual_seed(rank)
    model = Stack(layers, width)
    for [linear] in model.layers:
        part = torch.empty(width // processes, width).normal_(generator=generator)
        weight = part if mesh is None else DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
        linear.weight = nn.Parameter(weight)
    return model


def make_pruner(model: nn.Module, scope: str) -> Pruner:
    """On a schedule that updates masks after each step, 60 times after the first, which drops nothing."""
    config = PruningConfig(sparsity=FINAL_SPARSITY, scope=scope, begin=1, end=UPDATES + 1, frequency=1)
    return Pruner(model, config, total_steps=UPDATES + 1)


# ---- Measured ----


@dataclass
class Row:
    """One kind of update of one model; counts and bytes are those of one process and one update."""

    layers: int
    width: int
    processes: int
    scope: str
    kind: str
    seconds: float
    peak_bytes: int
    collectives: float
    wire_bytes: float
    made_keys: float
    counted_keys: float
    listed_keys: float

    @property
    def weights(self) -> int:
        return self.layers * self.width**2

    @property
    def local_weights(self) -> float:
        return self.weights / self.processes

    @property
    def pools(self) -> int:
        """How many thresholds are found."""
        return 1 if self.scope == "global" else self.layers

    @property
    def batches(self) -> int:
        """How many times processes go through all collectives of a ranking."""
        return 1 if self.scope == "global" else batches_of(self.layers)


def batches_of(tensors: int) -> int:
    return math.ceil(tensors / 64)


@contextlib.contextmanager
def counting() -> Iterator[dict[str, int]]:
    """What an update does on this process, by names.

    Collectives and the bytes handed to them; keys that are made of scores, each time; keys that are counted to find a
    threshold; and keys that a sample's bound leaves to be ranked.
    """
    names = ("collectives", "wire_bytes", "made_keys", "counted_keys", "listed_keys")
    counts = dict.fromkeys(names, 0)
    replaced: list[tuple[Any, str, Any]] = []

    def watch(module: Any, name: str, note: Callable[..., None]) -> None:
        original = getattr(module, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            note(result, *arguments)
            return result

        replaced.append((module, name, original))
        setattr(module, name, watched)

    def note_sent(sent: torch.Tensor) -> None:
        counts["collectives"] += 1
        counts["wire_bytes"] += sent.nbytes

    def note_keys(name: str, keys: torch.Tensor) -> None:
        counts[name] += len(keys)

    def note_lists(result: Any, *arguments: Any) -> None:
        counts["listed_keys"] += sum(len(one.keys) for one in result or [])

    watch(torch.distributed, "all_reduce", lambda result, sent: note_sent(sent))
    watch(torch.distributed, "all_gather", lambda result, received, sent: note_sent(sent))
    watch(torch.distributed, "all_to_all_single", lambda result, received, sent, *sizes: note_sent(sent))
    watch(ranking, "order_keys", lambda result, scores: note_keys("made_keys", scores))
    watch(selection, "_upper_digits", lambda result, keys: note_keys("counted_keys", keys))
    watch(selection, "_below_bound", note_lists)
    try:
        yield counts
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def status_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{field}:"))


def forget_peak() -> None:
    """Let VmHWM, the most memory that was resident, begin anew from what is resident now (Linux)."""
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")


def slowest(numbers: Sequence[float], processes: int) -> list[float]:
    """The largest of each number over all processes."""
    largest = torch.tensor(numbers, dtype=torch.float64)
    if processes > 1:
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    return largest.tolist()


def timed_update(pruner: Pruner, number: int, processes: int) -> dict[str, float]:
    with counting() as counts:
        forget_peak()
        before = status_bytes("VmRSS")
        if processes > 1:
            torch.distributed.barrier()
        start = time.perf_counter()
        changed = pruner.update(number + 1)
        seconds = time.perf_counter() - start
        assert changed, f"update {number} changed nothing"
        peak = status_bytes("VmHWM") - before
    seconds, peak = slowest([seconds, peak], processes)
    return {"seconds": seconds, "peak_bytes": peak, **counts}


def measure(layers: int, width: int, scope: str, mesh: DeviceMesh | None, processes: int) -> Iterator[Row]:
    pruner = make_pruner(make_stack(layers, width, mesh), scope)
    for kind, numbers in KINDS:
        updates = [timed_update(pruner, number, processes) for number in numbers]
        if kind is None:
            continue
        medians = {name: statistics.median(update[name] for update in updates) for name in updates[0]}
        medians["peak_bytes"] = max(update["peak_bytes"] for update in updates)
        yield Row(layers, width, processes, scope, kind, **medians)


def seconds_of_a_tensor(scope: str, mesh: DeviceMesh) -> float:
    """Of each of many tensors that are too small for their weights to count, of a sharded model."""
    tensors = 560
    pruner = make_pruner(make_stack(tensors, 96, mesh), scope)
    _, (_, numbers), *_ = KINDS
    return statistics.median(timed_update(pruner, number, 1)["seconds"] for number in numbers) / tensors


def copy_bandwidth(processes: int) -> float:
    """Bytes a second that one process reads and writes when all copy at once, in buffers that no cache holds."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    target.copy_(source)
    times = []
    for _ in range(5):
        if processes > 1:
            torch.distributed.barrier()
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / slowest([statistics.median(times)], processes)[0]


# ---- Counted operations, as they would be on an accelerator ----


class Operations(TorchDispatchMode):
    """Counts operations, the bytes they read and write if none shares memory traffic with another, and bincounts."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.moved_bytes = self.binned_keys = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.name() in ("aten::detach", "aten::empty.memory_format", "aten::empty_like"):
            return result
        self.operations += 1
        if func.name().startswith("aten::index"):  # reads and writes only what it picks
            picked = args[2] if func.name().startswith("aten::index_fill") else args[1][0]
            self.moved_bytes += picked.numel() * (8 + 2 * args[0].element_size())
            return result
        if func.name() == "aten::bincount":
            self.binned_keys += args[0].numel()
        outputs = result if isinstance(result, (tuple, list)) else [result]
        inputs = [one for arg in args for one in (arg if isinstance(arg, (tuple, list)) else [arg])]
        self.moved_bytes += sum(one.nbytes for one in (*inputs, *outputs) if isinstance(one, torch.Tensor))
        return result


@contextlib.contextmanager
def as_on_accelerator() -> Iterator[None]:
    """Pieces of an accelerator's size, and torch in place of numpy."""
    originals = selection._at_most, selection._where, ranking._CPU_PIECE, optimizers._PIECE
    selection._at_most = lambda keys, bound: keys <= max(bound, selection.LOWEST_KEY)
    selection._where = lambda flags: flags.nonzero().squeeze(1)
    ranking._CPU_PIECE = optimizers._PIECE = ranking._ACCELERATOR_PIECE
    try:
        yield
    finally:
        selection._at_most, selection._where, ranking._CPU_PIECE, optimizers._PIECE = originals


def count_operations(layers: int, width: int, scope: str, mesh: DeviceMesh) -> dict[str, Operations]:
    """The operations of one update of each kind."""
    pruner = make_pruner(make_stack(layers, width, mesh), scope)
    counted = {}
    with as_on_accelerator():
        for kind, numbers in KINDS:
            with Operations() as counted[str(kind)]:
                pruner.update(numbers[0] + 1)
    return counted


def operations_of_an_update(mesh: DeviceMesh, layers: int, width: int) -> Iterator[dict[str, Any]]:
    """By scope and kind: bytes and binned keys a weight, and operations a tensor."""
    for scope in SCOPES:
        counted = count_operations(layers, width, scope, mesh)
        for kind in (kind for kind, _ in KINDS if kind is not None):
            yield {
                "scope": scope,
                "kind": kind,
                "bytes": counted[kind].moved_bytes / (layers * width**2),
                "binned": counted[kind].binned_keys / (layers * width**2),
                "operations": counted[kind].operations / layers,
            }


# ---- Processes ----


def work(options: argparse.Namespace) -> None:
    """What one process does; the first prints one JSON object a line."""
    processes = options.processes
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{options.store}", rank=options.rank, world_size=processes
    )
    mesh = init_device_mesh("cpu", (processes,))

    def report(what: str, content: Mapping[str, Any]) -> None:
        if options.rank == 0:
            print(json.dumps({"what": what, **content}), flush=True)

    report("bandwidth", {"processes": processes, "bytes": copy_bandwidth(processes)})
    for layers, width in QUICK_SIZES if options.quick else SIZES:
        for scope in SCOPES:
            for row in measure(layers, width, scope, mesh if processes > 1 else None, processes):
                report("row", asdict(row))
    if processes == 1:
        for counted in operations_of_an_update(mesh, 12, 1024 if options.quick else 4096):
            report("operations", counted)
        for scope in SCOPES:
            report("tensor", {"scope": scope, "seconds": seconds_of_a_tensor(scope, mesh)})
    torch.distributed.destroy_process_group()


def run(processes: int, arguments: Sequence[str], timeout: float) -> list[dict[str, Any]]:
    """Start so many processes of this script; what the first prints. Ends them all if one fails or takes too long."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory() as folder,
        open(f"{folder}/out", "w+") as out,
        open(f"{folder}/err", "w+") as err,
    ):
        command = [sys.executable, __file__, "--processes", str(processes), "--store", f"{folder}/store", *arguments]
        workers = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=out, stderr=err, env=environment)
            for rank in range(processes)
        ]
        try:
            deadline = time.monotonic() + timeout
            while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
                if any(worker.returncode for worker in workers):
                    break
                time.sleep(0.1)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
        if any(worker.returncode for worker in workers):
            err.seek(0)
            raise SystemExit(f"{processes} processes: one failed, or they took more than {timeout} s\n{err.read()}")
        out.seek(0)
        return [json.loads(line) for line in out if line.startswith("{")]


# ---- The cost model ----

COSTS = ("a collective", "a tensor", "a threshold", "a local weight", "a key made", "a key ranked", "a key listed")


def amounts(row: Row) -> list[float]:
    ranked = max(row.counted_keys - row.listed_keys, 0)
    return [row.collectives, row.layers, row.pools, row.local_weights, row.made_keys, ranked, row.listed_keys]


def fit(rows: Sequence[Row]) -> np.ndarray:
    """Seconds for each of the amounts, none negative, by least squares of relative errors: the best of all choices."""
    scaled = np.array([amounts(row) for row in rows]) / np.array([[row.seconds] for row in rows])
    fits = []
    for some in itertools.product((False, True), repeat=len(COSTS)):
        used = np.array(some) & scaled.any(0)
        costs = np.zeros(len(COSTS))
        costs[used] = np.linalg.lstsq(scaled[:, used], np.ones(len(rows)), rcond=None)[0]
        if (costs >= 0).all():
            fits.append((float(np.square(scaled @ costs - 1).sum()), costs))
    return min(fits, key=lambda one: one[0])[1]


def linear_in_tensors(rows: Sequence[Row], name: str) -> Callable[[int, int], float]:
    """A count as a constant, so much for each batch of tensors and so much for each tensor, fitted."""
    known = np.array([[1, row.batches, row.layers] for row in rows], dtype=float)
    solved = np.linalg.lstsq(known, np.array([getattr(row, name) for row in rows]), rcond=None)[0]
    return lambda tensors, batches: float(solved @ [1, batches, tensors])


# ---- What is printed ----


def print_rows(rows: Sequence[Row]) -> None:
    print("| weights | tensors | processes | scope | update | seconds | peak MiB | KiB over the wire | collectives |")
    print("|---:|---:|---:|---|---|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.weights / 1e6:,.0f} M | {row.layers} | {row.processes} | {row.scope} | {row.kind} "
            f"| {row.seconds:.3f} | {row.peak_bytes / 2**20:.1f} | {row.wire_bytes / 2**10:,.1f} "
            f"| {row.collectives:.0f} |"
        )


def print_scaling(rows: Sequence[Row]) -> None:
    print(
        "\nNanoseconds of a process for each weight it holds, and in brackets the share of its weights whose keys were"
    )
    print("counted (fully ranked; else a sample bounds the few that are):")
    sizes = list(dict.fromkeys((row.layers, row.width) for row in rows))
    print(" " * 20 + "".join(f"{layers * width**2 / 1e6:>14,.0f} M" for layers, width in sizes))
    for processes in PROCESSES:
        for scope in SCOPES:
            for kind in (kind for kind, _ in KINDS if kind is not None):
                mine = [row for row in rows if (row.processes, row.scope, row.kind) == (processes, scope, kind)]
                cells = [
                    f"{1e9 * row.seconds / row.local_weights:>8.2f} ({row.counted_keys / row.local_weights:>4.0%})"
                    for row in mine
                ]
                print(f"{processes} {scope:<8}{kind:<10}" + "".join(f"{cell:>16}" for cell in cells))


def print_fits(rows: Sequence[Row], left_out: tuple[int, int]) -> None:
    """Fit without one size, and predict that from what it counts."""
    all_costs = {}
    layers, width = left_out
    print(f"\nFitted without {layers * width**2 / 1e6:,.0f} M weights; seconds for:")
    print("processes" + "".join(f"{name:>15}" for name in COSTS) + "   median error of the fit")
    for processes in PROCESSES:
        known = [row for row in rows if row.processes == processes and (row.layers, row.width) != left_out]
        costs = all_costs[processes] = fit(known)
        error = statistics.median(abs(amounts(row) @ costs / row.seconds - 1) for row in known)
        print(f"{processes:>9}" + "".join(f"{cost:>15.3g}" for cost in costs) + f"   {error:.1%}")
    print(f"\nPredicted for {layers * width**2 / 1e6:,.0f} M weights, aim within {AIM_ERROR}%:")
    for row in rows:
        if (row.layers, row.width) == left_out:
            predicted = float(amounts(row) @ all_costs[row.processes])
            error = 100 * (predicted / row.seconds - 1)
            verdict = "" if abs(error) <= AIM_ERROR else "  MISSED"
            print(
                f"{row.processes} processes, {row.scope:<6} {row.kind:<8} measured {row.seconds:7.3f} s, "
                f"predicted {predicted:7.3f} s, {error:+6.1f}%{verdict}"
            )


def print_operations(
    operations: Sequence[Mapping[str, Any]], rows: Sequence[Row], bandwidth: float
) -> dict[str, float]:
    """Counted operations, and how the CPU's time compares; by scope, how many times its memory's time it takes."""
    largest = max(row.weights for row in rows)
    times = {(row.scope, row.kind): row for row in rows if row.weights == largest and row.processes == 1}
    slower = {}
    print(f"\nOperations of an update of a sharded model, counted; one process copies {bandwidth / 1e9:.1f} GB/s here.")
    print("scope   update     bytes a weight  binned keys a weight  operations a tensor  CPU over its bandwidth's time")
    for one in operations:
        row = times[one["scope"], one["kind"]]
        ratio = row.seconds / row.weights / (one["bytes"] / bandwidth)
        print(
            f"{one['scope']:<8}{one['kind']:<10}{one['bytes']:>15.1f}{one['binned']:>22.2f}{one['operations']:>21.1f}"
            f"{ratio:>31.2f}"
        )
        if one["kind"] == "middle":
            slower[one["scope"]] = max(ratio, 1.0)
    return slower


def print_projection(
    rows: Sequence[Row],
    operations: Sequence[Mapping[str, Any]],
    slower: Mapping[str, float],
    tensor_seconds: Mapping[str, float],
) -> None:
    counted = {one["scope"]: one for one in operations if one["kind"] == "middle"}
    lines = []
    ratios = ", ".join(f"{scope} {ratio:.2f}" for scope, ratio in slower.items())
    latencies = ", ".join(f"{1e6 * latency:.0f} us on {gpus:,}" for gpus, latency in LATENCIES.items())
    seconds = ", ".join(f"{scope} {1e6 * each:.0f} us" for scope, each in tensor_seconds.items())
    print("\nProjection, not measured: an update in the middle of the schedule, as counted above. Assumed:")
    print(f"passes: bytes a weight over {MEMORY_BANDWIDTH / 1e12} TB/s at {MEMORY_EFFICIENCY:.0%},")
    print(f"    times what the CPU takes over its own bandwidth's time, at least 1 ({ratios})")
    print(f"binning: {COUNTED_KEYS_A_SECOND / 1e9:.0f} G keys/s")
    print(f"host: {1e6 * SECONDS_AN_OPERATION:.0f} us an operation, and what a small tensor takes here ({seconds})")
    print(f"collectives: {latencies} GPUs; numbers as measured")
    print(f"wire: bytes as measured, twice, over {WIRE_BANDWIDTH / 1e9:.0f} GB/s a GPU")
    print(f"training: {STEPS} steps of {TOKENS_A_STEP / 1e6:.0f} M tokens, 6 FLOPs a weight and token,")
    print(f"    {UTILIZATION:.0%} of {FLOPS / 1e12:.0f} TFLOP/s\n")
    print(
        "model   GPUs   scope    passes s  binning s     host s  collectives s  KiB a GPU  update s  training s   share"
        "  2% at tokens a step"
    )
    for model, (weights, tensors) in MODELS.items():
        for gpus, latency in LATENCIES.items():
            shares = {}
            for scope in SCOPES:
                known = [row for row in rows if row.scope == scope and row.kind == "middle" and row.processes > 1]
                batches = 1 if scope == "global" else batches_of(tensors)
                wire_bytes = linear_in_tensors(known, "wire_bytes")(tensors, batches)
                collectives = linear_in_tensors(known, "collectives")(tensors, batches)
                local = weights / gpus
                pieces = max(local / tensors / ranking._ACCELERATOR_PIECE, 1)
                one = counted[scope]
                passes = local * one["bytes"] / (MEMORY_BANDWIDTH * MEMORY_EFFICIENCY) * slower[scope]
                binning = local * one["binned"] / COUNTED_KEYS_A_SECOND
                host = tensors * (tensor_seconds[scope] + one["operations"] * pieces * SECONDS_AN_OPERATION)
                waiting = collectives * latency + 2 * wire_bytes / WIRE_BANDWIDTH
                update = passes + binning + host + waiting
                training = 6 * weights * TOKENS_A_STEP * STEPS / (gpus * FLOPS * UTILIZATION)
                shares[scope] = (update, 100 * UPDATES * update / training)
                print(
                    f"{model:>5}  {gpus:>5}   {scope:<6}{passes:>11.3f}{binning:>11.3f}{host:>11.3f}{waiting:>15.4f}"
                    f"{wire_bytes / 1024:>11,.0f}{update:>10.2f}{training:>12,.0f}{shares[scope][1]:>7.3f}%"
                    f"{TOKENS_A_STEP * shares[scope][1] / AIM_SHARE:>21,.0f}"
                )
            fits = "" if weights * TRAINING_BYTES_A_WEIGHT <= gpus * GPU_BYTES else " (too few to train on)"
            update, share = max(shares.values())
            missed = "" if share < AIM_SHARE else " MISSED"
            lines.append(f"| {model} | {gpus:,}{fits} | {update:.2f} s | {share:.3f}%{missed} |")
    print(f"\nA projection, not a measurement, of the dearer scope; aim below {AIM_SHARE}%:\n")
    print("| model | GPUs | one update | 60 updates as share of training |\n|---|---|---:|---:|")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models only, to see that it works")
    for name, kind in (("rank", int), ("processes", int), ("store", str)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        work(options)
        return

    quick = ["--quick"] if options.quick else []
    results = []
    for processes in PROCESSES:
        start = time.monotonic()
        results += run(processes, quick, timeout=100 if options.quick else 400)
        print(f"{processes} processes measured in {time.monotonic() - start:.0f} s", file=sys.stderr)
    found: dict[str, list[dict[str, Any]]] = {"row": [], "bandwidth": [], "operations": [], "tensor": []}
    for result in results:
        found[result.pop("what")].append(result)

    rows = [Row(**row) for row in found["row"]]
    print(f"float32 weights, {os.cpu_count()} cores, one thread a process, median of three updates (at once: one)\n")
    print_rows(sorted(rows, key=lambda row: (row.weights, row.processes, row.scope)))
    print_scaling(rows)
    print_fits(rows, QUICK_LEFT_OUT if options.quick else LEFT_OUT)
    tensor_seconds = {one["scope"]: one["seconds"] for one in found["tensor"]}
    slower = print_operations(found["operations"], rows, found["bandwidth"][0]["bytes"])
    print_projection(rows, found["operations"], slower, tensor_seconds)


if __name__ == "__main__":
    main()
