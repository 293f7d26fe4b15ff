"""Perplexity against bytes on disk: a language model that is pruned, and given few values, at once.

SmolLM2-135M, calibrated on 32 windows of 512 tokens of film reviews; perplexity on other film reviews and on news
(`oneshot_texts.py`), in float32. Neurons are removed first where a setting asks for it, then `alps` chooses zeros and
values. Each model is packed in bfloat16 and opened from there with `from_pretrained`, on one thread. Rows are kept in
outputs/size_text/rows.jsonl; run it again to continue.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from language_structures import config_of
from language_structures import prune as remove_units
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from oneshot import perplexity
from oneshot_texts import calibration_windows, held_out_windows, make_model
from size_ways import WAYS, open_model, rounded_by_torchao
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_prune import CalibrationConfig, PruningConfig, prune

FEWER_NEURONS = "neurons 1280 wanda least_squares"  # of 1,536

# Units to remove, and fields of PruningConfig; none for the dense model.
SETTINGS: dict[str, tuple[str | None, dict[str, Any] | None]] = {
    "dense": (None, None),
    "1,280 of 1,536 neurons": (FEWER_NEURONS, None),
    "zeros, 50%": (None, {"sparsity": 0.5}),
    "64 values": (None, {"sparsity": 0.0, "shared_values": 64}),
    "16 values": (None, {"sparsity": 0.0, "shared_values": 16}),
    "zeros, 50%, 64 values": (None, {"sparsity": 0.5, "shared_values": 64}),
    "zeros, 50%, 16 values": (None, {"sparsity": 0.5, "shared_values": 16}),
    "1,280 of 1,536 neurons, zeros, 30%, 64 values": (FEWER_NEURONS, {"sparsity": 0.3, "shared_values": 64}),
}

WINDOWS, LENGTH, HELD_OUT = 32, 512, 32


@dataclass(frozen=True)
class Row:
    """A model of a seed of the calibration windows."""

    setting: str
    seed: int


def measure(row: Row, output: Path) -> dict[str, Any]:
    """Make the model of a row; perplexity and bytes of what opens from each way to save it."""
    source = output / "model"
    windows = calibration_windows(source, row.seed, WINDOWS, LENGTH)
    held_out = held_out_windows(source, HELD_OUT, LENGTH)
    units, fields = SETTINGS[row.setting]
    model = open_model(source, torch.float32).eval()
    if units is not None:
        remove_units(model, [config_of(units)], windows)
    if fields is not None:
        config = PruningConfig(method="alps", **fields)
        prune(model.eval(), config, windows, CalibrationConfig(autocast="bfloat16"))
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary, "saved")
        model.save_pretrained(saved)
        AutoTokenizer.from_pretrained(source).save_pretrained(saved)
        del model
        ways = dict(WAYS)
        if row.setting == "dense":
            ways |= {
                f"int{bits}": lambda folder, to, bits=bits: rounded_by_torchao(folder, to, bits) for bits in (8, 4)
            }
        for way, save in ways.items():
            place = Path(temporary, way)
            found[way] = {"bytes": save(saved, place)}
            if row.setting == "dense" or way == "packed, bfloat16":
                opened = open_model(place, torch.float32).eval()
                found[way]["perplexity"] = {kind: perplexity(opened, texts) for kind, texts in held_out.items()}
    return asdict(row) | {"ways": found}


def write_report(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write `report.md` and `size_text.png`; the text of the former."""
    kinds = list(rows[0]["ways"]["packed, bfloat16"]["perplexity"])
    lines = ["| | saved | seeds | MB | " + " | ".join(f"perplexity, {kind}" for kind in kinds) + " |"]
    lines.append("|---|---|---:|---:|" + "---:|" * len(kinds))
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for setting in dict.fromkeys(row["setting"] for row in rows):
        some = [row["ways"] for row in rows if row["setting"] == setting]
        points = []
        for way in some[0]:
            megabytes = statistics.mean(ways[way]["bytes"] for ways in some) / 1e6
            if "perplexity" not in some[0][way]:
                continue
            means = []
            cells = []
            for kind in kinds:
                values = [ways[way]["perplexity"][kind] for ways in some]
                means.append(statistics.mean(values))
                half = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
                cells.append(f"{means[-1]:.1f}{half}")
            points.append((megabytes, means[0]))
            if setting == "dense":
                axes.annotate(way, points[-1], (0, 6), textcoords="offset points", rotation=60, fontsize=7)
            lines.append(f"| {setting} | {way} | {len(some)} | {megabytes:.1f} | {' | '.join(cells)} |")
        axes.scatter(*zip(*points, strict=True), label=setting)
    axes.set_xscale("log")
    axes.set_xticks([75, 100, 150, 200, 300, 400, 500])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.2)
    axes.set_xlabel("MB of weights, configuration and tokenizer")
    axes.set_ylabel(f"perplexity on {kinds[0]}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(folder / "size_text.png", dpi=150)
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the calibration windows")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, and write the report")
    parser.add_argument("--output", type=Path, default=Path("outputs", "size_text"))
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {(entry["setting"], entry["seed"]) for entry in map(json.loads, lines)}
    if not options.only_report:
        make_model(options.output / "model")
        for seed in options.seeds:
            for setting in options.settings:
                if (setting, seed) in known or (setting == "dense" and seed != options.seeds[0]):
                    continue
                found = measure(Row(setting, seed), options.output)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(found) + "\n")
                print(setting, seed, found["ways"]["packed, bfloat16"], flush=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    print(write_report([json.loads(line) for line in lines], options.output))


if __name__ == "__main__":
    main()
