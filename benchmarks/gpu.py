"""What the documentation calls not tested on a GPU, in one run: training steps, FSDP2, mask updates, 2:4, one-shot.

python benchmarks/gpu.py [--steps 50] [--hidden 1024] [--layers 12]
python benchmarks/gpu.py --try-on-cpu        # a tiny model on a CPU: whether the script runs, no measurement

Random Llamas (by default of 220 million weights) train on random tokens under bf16 autocast with fused AdamW. A loop
with `Pruner` and one without take turns, a step each; then the same with weights that FSDP2 shards on this one device.
Then mask updates of the whole model are timed, and 2:4 products beside dense ones. At last a Llama is pruned at once
from random tokens, with its weights on the GPU or on the CPU, and with paused passes there or on the CPU: seconds,
memory, and whether the weights are the same. Prints a table, measured here.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import hf_prune
from hf_prune import CalibrationConfig, Pruner, PruningConfig, prune

LENGTH, BATCH = 512, 8


def make_model(arguments: argparse.Namespace, device: str) -> nn.Module:
    torch.manual_seed(0)
    hidden = arguments.hidden
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2816 * hidden // 1024,
        num_hidden_layers=arguments.layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=arguments.vocabulary,
    )
    return LlamaForCausalLM(config).to(device)


def shard(model: nn.Module) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


class Loop:
    """A training loop of one's own, with a Pruner or without, one step at a time."""

    def __init__(self, arguments: argparse.Namespace, device: str, sharded: bool, sparsity: float | None):
        self.model = make_model(arguments, device)
        if sharded:
            self.model = shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.device, self.pruner = device, None
        if sparsity is not None:
            config = PruningConfig(sparsity=sparsity, begin=1, end=arguments.steps, frequency=5)
            self.pruner = Pruner(self.model, config, total_steps=arguments.steps)
        self.ids = torch.randint(arguments.vocabulary, (arguments.batch, arguments.length), device=device)

    def step(self) -> None:
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        if self.pruner is not None:
            self.pruner.mask_gradients()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step(self.optimizer)
        self.optimizer.zero_grad()


def compare_steps(arguments: argparse.Namespace, device: str, sharded: bool) -> list[tuple[str, str]]:
    name = "FSDP2 on one device" if sharded else "one device"
    loops = [Loop(arguments, device, sharded, None), Loop(arguments, device, sharded, 0.8)]
    seconds: list[list[float]] = [[], []]
    for step in range(arguments.steps):
        for loop, taken in zip(loops, seconds, strict=True):
            took = timed(loop.step, device)
            if step:  # the first warms up
                taken.append(took)
    dense, pruned = map(statistics.median, seconds)
    whole = sum(seconds[1]) / sum(seconds[0])
    [_, loop] = loops
    return [
        (f"step, bf16, fused AdamW, {name}", f"{1000 * dense:.1f} ms dense, {1000 * pruned:.1f} ms pruned"),
        (
            f"ratio of the median step, and of all steps with their mask updates, {name}",
            f"{pruned / dense:.3f}, {whole:.3f}",
        ),
        (f"sparsity that was reached, {name}", f"{loop.pruner.sparsity:.2%}"),
    ]


def time_updates(arguments: argparse.Namespace, device: str) -> list[tuple[str, str]]:
    found = []
    for scope in ("layer", "global"):
        model = make_model(arguments, device)
        pruner = Pruner(model, PruningConfig(sparsity=0.8, scope=scope, begin=0, end=4, frequency=1), total_steps=4)
        pruner.update(0)
        seconds = [timed(partial(pruner.update, step), device) for step in (1, 2, 3, 4)]
        found.append((f"mask update of all weights, scope {scope}", f"{1000 * min(seconds):.1f} ms"))
    return found


def compare_two_of_four(device: str) -> list[tuple[str, str]]:
    if device != "cuda":
        return [("2:4 product", "not run: needs a GPU")]
    config = PruningConfig(pattern="2:4", targets=[r"0\.weight"], schedule="one_shot", begin=0)
    found = []
    for outputs, inputs, rows in ((4096, 4096, 4096), (11008, 4096, 4096), (4096, 4096, 16)):
        layer = nn.Sequential(nn.Linear(inputs, outputs, bias=False)).to(device, torch.bfloat16).eval()
        Pruner(layer, config, total_steps=2).update(0)
        values = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
        call = partial(layer, values)
        with torch.inference_mode():
            expected = call()
            dense = min(timed(call, device) for _ in range(50))
            assert hf_prune.semi_structured(layer).converted == ["0"]
            sparse = min(timed(call, device) for _ in range(50))
            error = float((call() - expected).abs().max() / expected.abs().max())
        name = f"2:4 product, {rows}×{inputs} by {outputs}, bf16: times as fast as dense"
        found.append((name, f"{dense / sparse:.2f} (difference {error:.1e})"))
    return found


def compare_places(arguments: argparse.Namespace, device: str) -> list[tuple[str, str]]:
    windows = torch.randint(arguments.vocabulary, (arguments.windows, arguments.length))
    config = PruningConfig(method="sparsegpt", sparsity=0.5)
    on_cpu = "cpu" if device == "cuda" else None  # on a CPU, the script alone is tried
    found, first = [], None
    for name, home, calibration in (
        ("weights and passes on the device", device, CalibrationConfig()),
        ("passes on the CPU", device, CalibrationConfig(offload=on_cpu)),
        ("weights on the CPU", "cpu", CalibrationConfig(device=device)),
        ("weights and passes on the CPU", "cpu", CalibrationConfig(device=device, offload=on_cpu)),
    ):
        model = make_model(arguments, home).eval()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(partial(prune, model, config, windows, calibration), device)
        memory = f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB" if device == "cuda" else ""
        weights = {key: value.cpu() for key, value in model.state_dict().items()}
        first = first or weights
        same = all(torch.equal(first[key], value) for key, value in weights.items())
        alike = "the same weights" if same else "other weights"
        found.append((f"pruned at once, {name}", f"{seconds:.1f} s{memory}, {alike}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--windows", type=int, default=64, help="of calibration")
    parser.add_argument("--try-on-cpu", action="store_true")
    arguments = parser.parse_args()
    arguments.vocabulary, arguments.length, arguments.batch = 32000, LENGTH, BATCH
    if not arguments.try_on_cpu and not torch.cuda.is_available():
        sys.exit(f"This benchmark needs a CUDA device; torch {torch.__version__} finds none. Nothing was measured.")
    device = "cuda"
    if arguments.try_on_cpu:
        device, arguments.steps, arguments.hidden, arguments.layers = "cpu", 6, 64, 2
        arguments.vocabulary, arguments.length, arguments.batch, arguments.windows = 100, 16, 2, 4
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(name, value)
    weights = sum(parameter.numel() for parameter in make_model(arguments, "meta").parameters())
    where = torch.cuda.get_device_name() if device == "cuda" else "a CPU, a tiny model: no measurement"
    print(f"{where}; torch {torch.__version__}, transformers {transformers.__version__}; {weights:,} weights\n")
    print("| | |\n|---|---|")
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        for measure in (
            lambda: compare_steps(arguments, device, sharded=False),
            lambda: compare_steps(arguments, device, sharded=True),
            lambda: time_updates(arguments, device),
            lambda: compare_two_of_four(device),
            lambda: compare_places(arguments, device),
        ):
            for name, value in measure():
                print(f"| {name} | {value} |", flush=True)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
