"""CPU seconds of opening models: plain ones with and without `import hf_prune`, and one whose layers differ.

python benchmarks/opening.py [--runs 3]

The alternative, a class that is registered with transformers' own `register_patch_mapping`, is measured beside it.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import BertConfig, BertModel

# What each interpreter does first, and what it then opens.
CASES = {
    "plain, without hf_prune": ("", "plain"),
    "plain, with hf_prune": ("import hf_prune", "plain"),
    "plain, after one whose layers differ": ("import hf_prune; BertModel.from_pretrained('differing')", "plain"),
    "plain, with a registered class": (
        "from transformers.monkey_patching import register_patch_mapping; import torch.nn as nn; "
        "register_patch_mapping({'OneThatIsNotUsed': nn.Linear})",
        "plain",
    ),
    "layers differ": ("import hf_prune", "differing"),
}
SCRIPT = """
import sys, time
from transformers import BertModel
BertModel.from_pretrained("plain")
{first}
BertModel.from_pretrained({folder!r})
times = []
for _ in range(9):
    began = time.process_time()
    BertModel.from_pretrained({folder!r})
    times.append(time.process_time() - began)
print(sorted(times)[4])
"""
IMPORT = "began = __import__('time').process_time(); import hf_prune; print(__import__('time').process_time() - began)"


def seconds(code: str, folder: str) -> float:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=3, help="processes for each, of whose medians of nine the median counts"
    )
    runs = parser.parse_args().runs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sizes = {"vocab_size": 100, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=128)
    widths = {index: {"intermediate_size": 100 - index, "num_attention_heads": 3} for index in range(6)}
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(Path(folder, "plain"))
        import hf_prune  # noqa: F401 (it builds the other model)

        differing = BertConfig.from_dict(config.to_dict() | {"per_layer_config": widths, "head_dim": 16})
        BertModel(differing).save_pretrained(Path(folder, "differing"))
        found: dict[str, list[float]] = {name: [] for name in (*CASES, "import hf_prune")}
        for _ in range(runs):  # in turns, so that what else the machine does meets all alike
            for name, (first, opened) in CASES.items():
                found[name].append(seconds(SCRIPT.format(first=first, folder=opened), folder))
            found["import hf_prune"].append(seconds(IMPORT, folder))
    plain = statistics.median(found["plain, without hf_prune"])
    for name, times in found.items():
        median = statistics.median(times)
        print(f"{name:40} {1000 * median:7.1f} ms (least {1000 * min(times):.1f})  {median / plain:5.2f} of plain")


if __name__ == "__main__":
    main()
