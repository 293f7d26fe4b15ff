"""The memory that pruning at once takes, beside what `plan` says: `python benchmarks/oneshot_memory.py`.

Each row is a process of its own, with a model of random weights: by how much its resident memory grows at most while
it prunes (Linux), and the size of the tensors that `plan_memory` counts. A small model was pruned before, as libraries
take some memory at their first use.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from oneshot_measure import AnonymousPeak, resident, start_peak
from transformers import AutoConfig, AutoModelForCausalLM

from hf_prune import CalibrationConfig, PruningConfig, prune
from hf_prune.foreign.heap import give_back_freed_memory
from hf_prune.oneshot.planning import plan_memory

LLAMA = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 3}
LLAMA |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 2048}
# As wide as models of a billion weights.
WIDE = {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
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
    "wide llama, sparsegpt, 16 × 512": (WIDE, "sparsegpt", {"samples": 16, "length": 512}),
    "wide llama, alps, 16 × 512, disk": (WIDE, "alps", {"samples": 16, "length": 512, "offload": "disk"}),
}


# The same with weights and masks that are mapped from files: of models with more layers.
MAPPED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    f"{name}, {layers} layers, alps, 16 × 512, all on disk": (
        {**fields, "num_hidden_layers": layers},
        "alps",
        {"samples": 16, "length": 512, "offload": "disk"},
    )
    for name, fields, layers in (("llama", LLAMA, 3), ("llama", LLAMA, 24), ("wide llama", WIDE, 3))
}


def measure(row: str) -> None:
    """Print what was planned and what was measured, in bytes, as JSON."""
    if row in MAPPED:
        measure_mapped(row)
        return
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


def measure_mapped(row: str) -> None:
    """The same for a model that is opened from a folder, whose weights are mapped from its files.

    Measured is the memory beside what is mapped; `weights` are the bytes of the model's weights.
    """
    fields, method, settings = MAPPED[row]
    config, calibration = PruningConfig(method=method, sparsity=0.5), CalibrationConfig(**settings)
    windows = torch.randint(5, 8000, (calibration.samples, calibration.length))
    with tempfile.TemporaryDirectory() as folder:
        small = {**fields, **SMALL[fields["model_type"]]}
        for name, one in (("small", small), ("model", fields)):
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**one)).save_pretrained(Path(folder, name))
        opened = AutoModelForCausalLM.from_pretrained(Path(folder, "small"))
        prune(opened, config, windows[:2, :64], CalibrationConfig(samples=2, length=64, offload="disk"))
        model = AutoModelForCausalLM.from_pretrained(Path(folder, "model"))
        planned = plan_memory(model, config, calibration, calibration.length, has_directory=True)
        give_back_freed_memory()
        before = resident("RssAnon")
        with AnonymousPeak() as peak:
            prune(model, config, windows, calibration, directory=Path(folder, "pruned"))
        weights = sum(parameter.nbytes for parameter in model.parameters())
    found = {"planned": planned.peak, "measured": peak.most - before, "at": planned.at, "weights": weights}
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", choices=[*ROWS, *MAPPED], help="measure one, in this process")
    options = parser.parse_args()
    if options.row is not None:
        measure(options.row)
        return
    print(f"{'':45} {'planned, MB':>12} {'measured, MB':>13} {'ratio':>6}")
    for row in (*ROWS, *MAPPED):
        command = [sys.executable, __file__, "--row", row]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["measured"] / found["planned"]
        print(f"{row:45} {found['planned'] / 1e6:12,.0f} {found['measured'] / 1e6:13,.0f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
