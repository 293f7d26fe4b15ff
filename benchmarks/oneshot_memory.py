"""The memory that pruning at once takes, beside what `plan` says: `python benchmarks/oneshot_memory.py`.

Each row is a process of its own, with a model of random weights: its resident memory before pruning and at the peak of
it (Linux), and the size of the tensors that `plan_memory` counts.
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
from hf_prune.oneshot.planning import plan_memory

LLAMA = {"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
LLAMA |= {"num_attention_heads": 12, "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048}
GPT2 = {"model_type": "gpt2", "n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 8000, "n_positions": 1024}

# Name -> model, method, fields of the calibration.
ROWS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "llama, alps, 32 × 512": (LLAMA, "alps", {"samples": 32, "length": 512}),
    "llama, sparsegpt, own targets, 32 × 512": (
        LLAMA,
        "sparsegpt",
        {"samples": 32, "length": 512, "dense_weight": 0.0, "residual_weight": 0.0},
    ),
    "llama, alps, 32 × 512, disk": (LLAMA, "alps", {"samples": 32, "length": 512, "offload": "disk"}),
    "llama, wanda, 64 × 512": (LLAMA, "wanda", {"samples": 64, "length": 512}),
    "gpt2, alps, 64 × 256": (GPT2, "alps", {"samples": 64, "length": 256}),
    "gpt2, alps, 64 × 256, disk": (GPT2, "alps", {"samples": 64, "length": 256, "offload": "disk"}),
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
    with torch.no_grad():
        model(windows[:1, :8])  # what libraries take once
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
