"""What a process of its own does for a row of `oneshot.py`: prune a model, and write down weights, time and memory.

`oneshot_hf_prune.py` and `oneshot_llm_compressor.py` use it, each in its environment; only torch, transformers and
safetensors are imported.
"""

import argparse
import importlib.metadata
import json
import resource
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

# Prunes a model in place from windows of tokens, with settings.
Prune = Callable[[PreTrainedModel, torch.Tensor, Mapping[str, Any]], None]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def run(prune: Prune, packages: Sequence[str]) -> None:
    """Prune the model that the command line names, and write the weights of its layers and `figures.json`.

    The figures are wall and CPU seconds of the pruning alone, resident bytes before it and at its peak, the loss of the
    first window afterwards, and the versions of packages. With the setting `bf16`, the model is in bfloat16 while it is
    pruned; weights and the loss are in float32.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--windows", type=Path, required=True, help="safetensors file with the calibration windows")
    parser.add_argument("--settings", type=json.loads, required=True, help="JSON")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights and figures")
    options = parser.parse_args()
    windows = load_file(options.windows)["windows"]
    dtype = torch.bfloat16 if options.settings["bf16"] else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    before = resident("VmRSS")
    start_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    prune(model, windows, options.settings)
    figures: dict[str, Any] = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "bytes_before": before,
        "bytes": resident("VmHWM"),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", *packages)},
    }
    figures["answers"] = first_answers(model.float(), windows)
    options.output.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().contiguous() for name, weight in layer_weights(model).items()}
    save_file(weights, options.output / "weights.safetensors")
    (options.output / "figures.json").write_text(json.dumps(figures), encoding="utf-8")


def layer_weights(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights that are pruned, by name: of all linear layers of the decoder, and not of the head."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    }


@torch.no_grad()
def first_answers(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """The mean loss of the first window: the same weights give it in another process, too."""
    return float(model(input_ids=windows[:1], labels=windows[:1], use_cache=False).loss)


def start_peak() -> None:
    """Let the peak of resident memory begin anew, where the system can (Linux)."""
    if CLEAR.exists():
        CLEAR.write_text("5", encoding="ascii")


def resident(field: str) -> int:
    """Bytes of memory of this process: VmRSS now, VmHWM at the peak; the peak of its life where there is no /proc."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return int(lines[field].split()[0]) * 1024


class AnonymousPeak:
    """While it lasts, how much memory this process has at most that is mapped from no file (Linux), in bytes.

    Pages that are mapped from files do not count: the system forgets them where it needs the memory.
    """

    def __init__(self) -> None:
        self.most = 0
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "AnonymousPeak":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ends.wait(0.002):
            self.most = max(self.most, resident("RssAnon"))
