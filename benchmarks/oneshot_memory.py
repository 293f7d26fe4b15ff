"""The memory that pruning at once takes, beside what `plan` says: `python benchmarks/oneshot_memory.py`.

Each row is a process of its own, with a model of random weights: by how much its resident memory grows at most while
it prunes (Linux), and the size of the tensors that `plan_memory` counts. A small model was pruned before, as libraries
take some memory at their first use.
"""

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from oneshot_measure import resident, start_peak
from transformers import AutoConfig, AutoModelForCausalLM

from hf_prune import CalibrationConfig, PruningConfig, prune
from hf_prune.oneshot.heap import give_back_freed_memory
from hf_prune.oneshot.planning import plan_memory

LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048}
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 3, "n_head": 8, "vocab_size": 8000, "n_positions": 1024}

# Changes that make a small model of each.
SMALL = {
    "llama": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1},
    "gpt2": {"n_embd": 128, "n_layer": 1},
}

# Name -> model, method, fields of the calibration.
ROWS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama, sparsegpt, 16 × 512": (LLAMA, "sparsegpt", {"samples": 16, "length": 512}),
    "llama, sparsegpt, 16 × 512, disk": (LLAMA, "sparsegpt", {"samples": 16, "length": 512, "offload": "disk"}),
    "llama, wanda, 32 × 512": (LLAMA, "wanda", {"samples": 32, "length": 512}),
    "gpt2, alps, 32 × 256": (GPT2, "alps", {"samples": 32, "length": 256}),
    "gpt2, alps, 32 × 256, disk": (GPT2, "alps", {"samples": 32, "length": 256, "offload": "disk"}),
}


def measure(row: str) -> None:
    """Print what was planned and what was measured, in bytes, as JSON."""
    fields, method, settings = ROWS[row]
    config, calibration = PruningConfig(method=method, sparsity=0.5), CalibrationConfig(**settings)
    torch.manual_seed(0)
    model_config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        planned = plan_memory(AutoModelForCausalLM.from_config(model_config), config, calibration, calibration.length)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    windows = torch.randint(5, 8000, (calibration.samples, calibration.length))
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**fields, **SMALL[fields["model_type"]]})).eval()
    prune(small, config, windows[:2, :64], CalibrationConfig(samples=2, length=64))  # what libraries take once
    del small
    give_back_freed_memory()
    before = resident("VmRSS")
    start_peak()
    prune(model, config, windows, calibration)
    print(json.dumps({"planned": planned.peak, "measured": resident("VmHWM") - before, "at": planned.at}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", choices=ROWS, help="measure one, in this process")
    options = parser.parse_args()
    if options.row is not None:
        measure(options.row)
        return
    print(f"{'':40} {'planned, MB':>12} {'measured, MB':>13} {'ratio':>6}")
    for row in ROWS:
        command = [sys.executable, __file__, "--row", row]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["measured"] / found["planned"]
        print(f"{row:40} {found['planned'] / 1e6:12,.0f} {found['measured'] / 1e6:13,.0f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
