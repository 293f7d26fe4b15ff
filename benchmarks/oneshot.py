"""A language model pruned at once from calibration data, by hf-prune and by llm-compressor, over three seeds.

SmolLM2-135M, calibrated on 32 windows of 512 tokens of film reviews; perplexity on other film reviews and on news
(`oneshot_texts.py`). Each row is pruned in a process of its own, on one thread: all linear layers of the decoder, from
the same windows. llm-compressor runs in an environment of its own (`oneshot_rival.py`). One row at a time, and in every
other group of a seed and a pattern in the opposite order. Perplexity, zeros and drift are measured here, in float32,
from the weights that the processes hand over.

Rows are kept in outputs/oneshot/rows.jsonl; run it again to continue.
"""

import argparse
import copy
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from oneshot_measure import first_answers, layer_weights
from oneshot_report import write_report
from oneshot_rival import make_rival_environment
from oneshot_texts import calibration_windows, held_out_windows, make_model
from safetensors.torch import load_file, save_file
from structure_rival import ROOT, python_of
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

# Sparsity and pattern of each column of the table.
PATTERNS: dict[str, tuple[float, str]] = {
    "50%": (0.5, "unstructured"),
    "60%": (0.6, "unstructured"),
    "70%": (0.7, "unstructured"),
    "2:4": (0.5, "2:4"),
    "4:8": (0.5, "4:8"),
}

OUR_SCRIPT, RIVAL_SCRIPT = "oneshot_hf_prune.py", "oneshot_llm_compressor.py"

OWN_TARGETS = {"dense_weight": 0.0, "residual_weight": 0.0}


def ours(calibration: dict[str, Any] | None = None, bf16: bool = False, **pruning: Any) -> dict[str, Any]:
    """A setting of `oneshot_hf_prune.py`: fields of PruningConfig and of CalibrationConfig."""
    return {"script": OUR_SCRIPT, "pruning": pruning, "calibration": calibration or {}, "bf16": bf16}


def rival(method: str, bf16: bool = False) -> dict[str, Any]:
    """A setting of `oneshot_llm_compressor.py`."""
    return {"script": RIVAL_SCRIPT, "method": method, "bf16": bf16}


# `bf16`: the model is in bfloat16 while it is pruned; both tools compute sums and solve in float32. `autocast`: only
# the forward passes are.
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": ours(method="magnitude"),
    "wanda": ours(method="wanda", scope="row"),
    "wanda, least squares": ours(method="wanda", scope="row", reconstruction="least_squares"),
    "wanda, least squares, autocast": ours(
        {"autocast": "bfloat16"}, method="wanda", scope="row", reconstruction="least_squares"
    ),
    "sparsegpt, own targets": ours(OWN_TARGETS, method="sparsegpt"),
    "sparsegpt": ours(method="sparsegpt"),
    "alps": ours(method="alps"),
    "sparsegpt, own targets, autocast": ours({**OWN_TARGETS, "autocast": "bfloat16"}, method="sparsegpt"),
    "sparsegpt, own targets, autocast, damping 0.1": ours(
        {**OWN_TARGETS, "autocast": "bfloat16", "damping": 0.1}, method="sparsegpt"
    ),
    "sparsegpt, autocast": ours({"autocast": "bfloat16"}, method="sparsegpt"),
    "sparsegpt, autocast, disk": ours({"autocast": "bfloat16", "offload": "disk"}, method="sparsegpt"),
    "sparsegpt, autocast, damping 0.01": ours({"autocast": "bfloat16", "damping": 0.01}, method="sparsegpt"),
    "alps, autocast": ours({"autocast": "bfloat16"}, method="alps"),
    "alps, autocast, sensitivity": ours({"autocast": "bfloat16"}, method="alps", scope="sensitivity"),
    "llm-compressor: Wanda": rival("wanda"),
    "llm-compressor: SparseGPT": rival("sparsegpt"),
    "llm-compressor: SparseGPT, bf16": rival("sparsegpt", bf16=True),
}
WITHOUT_DATA = ("magnitude",)  # one seed is enough

# The largest difference of a mean loss between two processes with the same weights in the layers; where one had all
# others in bfloat16, too.
CLOSE, CLOSE_BF16 = 1e-3, 2e-2

# The drift of hidden states is measured on the first windows of this held-out text.
DRIFT_KIND, DRIFT_WINDOWS = "film reviews", 4


@dataclass(frozen=True)
class Row:
    """One model that was pruned, or the dense one, which has no pattern."""

    setting: str
    pattern: str
    seed: int


DENSE = Row("dense", "", 0)


def rows_of(settings: Sequence[str], patterns: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    """All rows, in the order in which they are measured."""
    rows = [DENSE]
    for index, (seed, pattern) in enumerate((seed, pattern) for seed in seeds for pattern in patterns):
        group = [Row(name, pattern, seed) for name in settings if seed == seeds[0] or name not in WITHOUT_DATA]
        rows += group if index % 2 == 0 else group[::-1]
    return rows


def measure(row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """Prune a model as a row says, and measure what came of it."""
    dense = dense_model(options.output / "model")
    if row == DENSE:
        return asdict(row) | quality(dense, options)
    windows = calibration_windows(options.output / "model", row.seed, options.samples, options.length)
    sparsity, pattern = PATTERNS[row.pattern]
    settings = SETTINGS[row.setting] | {"sparsity": sparsity, "pattern": pattern, "batch_size": options.batch_size}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({"windows": windows}, folder / "windows.safetensors")
        run_script(settings, options, folder)
        figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        pruned = with_weights(dense, load_file(folder / "weights.safetensors"))
    difference = abs(first_answers(pruned, windows) - figures["answers"])
    close = CLOSE_BF16 if settings["bf16"] else CLOSE
    if not difference <= close:
        raise RuntimeError(f"{row}: expected the loss of the other process up to {close}, it differs by {difference}")
    return asdict(row) | quality(pruned, options) | figures


def run_script(settings: dict[str, Any], options: argparse.Namespace, folder: Path) -> None:
    """Run the script of a setting in its environment, on so many threads, and without a GPU.

    Raises RuntimeError with its messages if it fails.
    """
    script = settings["script"]
    command = [sys.executable if script == OUR_SCRIPT else python_of(environment_in(options.output))]
    command += [str(ROOT / "benchmarks" / script), "--model", str(options.output / "model"), "--output", str(folder)]
    command += ["--windows", str(folder / "windows.safetensors"), "--settings", json.dumps(settings)]
    limits = {"OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{script} has failed:\n{found.stderr}")


def with_weights(dense: PreTrainedModel, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A copy of the dense model with other weights in its layers. Raises RuntimeError if they are of other layers."""
    model = copy.deepcopy(dense)
    layers = layer_weights(model)
    if layers.keys() != weights.keys():
        raise RuntimeError(
            f"expected the weights of {len(layers)} layers, got others: {layers.keys() ^ weights.keys()}"
        )
    with torch.no_grad():
        for name, weight in layers.items():
            weight.copy_(weights[name])
    return model


def quality(model: PreTrainedModel, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity on each kind of held-out text, the share of zeros in the layers, and the drift of hidden states."""
    folder, sizes = options.output / "model", (options.held_out, options.length)
    texts = held_out(folder, *sizes)
    weights = layer_weights(model).values()
    return {
        "perplexity": {kind: perplexity(model, windows) for kind, windows in texts.items()},
        "zeros": sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights),
        "drift": {DRIFT_KIND: drift(hidden_states(model, texts[DRIFT_KIND]), dense_states(folder, *sizes))},
    }


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """`exp` of the mean negative log-likelihood of each token but the first of each window."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return math.exp(total / windows[:, 1:].numel())


def drift(states: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> list[float]:
    """The squared difference from the dense model's hidden states over their squared norm, for each decoder layer."""
    return [
        float((one - other).square().sum() / other.square().sum()) for one, other in zip(states, dense, strict=True)
    ]


@torch.no_grad()
def hidden_states(model: PreTrainedModel, windows: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states after each decoder layer, the last after the final norm, on the first windows.

    Without the first token of each window, whose norm is many times that of the others.
    """
    inputs = {"input_ids": windows[:DRIFT_WINDOWS], "use_cache": False, "output_hidden_states": True}
    return [one[:, 1:] for one in model(**inputs).hidden_states[1:]]


@functools.cache
def dense_states(folder: Path, count: int, length: int) -> list[torch.Tensor]:
    """The hidden states of the dense model of a folder, the same for all rows."""
    return hidden_states(dense_model(folder), held_out(folder, count, length)[DRIFT_KIND])


@functools.cache
def dense_model(folder: Path) -> PreTrainedModel:
    """The dense model of a folder, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@functools.cache
def held_out(model: Path, count: int, length: int) -> dict[str, torch.Tensor]:
    """The windows of held-out texts."""
    return held_out_windows(model, count, length)


def environment_in(output: Path) -> Path:
    """Where the environment of llm-compressor is."""
    return output / "rival" / "environment"


def measure_all(rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Measure rows one by one, write down each, and print it.

    A row that fails is printed with its error, and the others are measured; then RuntimeError says which have failed.
    """
    failed = []
    for row in rows:
        try:
            found = measure(row, options) | {"sizes": sizes_of(options)}
        except RuntimeError:
            failed.append(row)
            traceback.print_exc()
            continue
        with (options.output / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
        shown = [f"{kind} {value:.2f}" for kind, value in found["perplexity"].items()]
        shown += [f"{found[name]:.0f} s" for name in ("cpu_seconds", "seconds") if name in found]
        print(row.setting, row.pattern, row.seed, *shown, sep=", ", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} rows failed, see above; run it again to measure them: {failed}")


def sizes_of(options: argparse.Namespace) -> dict[str, int]:
    """The options that figures depend on, and that all rows of a folder must have in common."""
    return {name: getattr(options, name) for name in ("samples", "length", "batch_size", "held_out", "threads")}


def known_rows(options: argparse.Namespace) -> dict[Row, dict[str, Any]]:
    """The rows that were measured before. Raises RuntimeError if they were measured with other options."""
    path = options.output / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        if entry["sizes"] != sizes_of(options):
            raise RuntimeError(
                f"expected rows of {sizes_of(options)} in {path}, got {entry['sizes']}; choose an --output"
            )
    return {Row(entry["setting"], entry["pattern"], entry["seed"]): entry for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="only these")
    parser.add_argument("--patterns", nargs="+", choices=list(PATTERNS), default=list(PATTERNS), help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=1, help="calibration windows that are computed together")
    parser.add_argument("--held-out", type=int, default=32, help="windows of each kind to measure perplexity on")
    parser.add_argument("--threads", type=int, default=1, help="that prune")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, and write the report")
    parser.add_argument("--output", type=Path, default=Path("outputs", "oneshot"))
    options = parser.parse_args()
    known = known_rows(options)
    if not options.only_report:
        make_model(options.output / "model")
        rows = [row for row in rows_of(options.settings, options.patterns, options.seeds) if row not in known]
        if any(SETTINGS[row.setting]["script"] == RIVAL_SCRIPT for row in rows if row != DENSE):
            make_rival_environment(environment_in(options.output))
        measure_all(rows, options)
    print(write_report(list(known_rows(options).values()), options.output))


if __name__ == "__main__":
    main()
