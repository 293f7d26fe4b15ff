"""Accuracy against bytes on disk: units removed, zeros, shared values, fewer tokens and all of them, over three seeds.

Each run is one of recipes/quickstart.yaml with other configurations (`RUNS`). Its model is saved in the ways of
`WAYS`, opened from there with `from_pretrained`, and measured on the recipe's test split; so is the dense model that it
was pruned from, and that in int8 and int4 of torchao. Bytes are those of the files that are needed to use the model:
weights, configuration and tokenizer. Runs are kept in outputs/size/rows.jsonl; run it again to continue.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from quality import add_training_options, measure_all
from quality_report import spread
from size_ways import WAYS, rounded_by_torchao
from structure import QUICKSTART, Row
from transformers.utils import logging

from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import make_evaluator, prepare
from hf_prune.recipe.run import run

UNITS: list[dict[str, Any]] = [
    {"structure": "neurons", "method": "taylor", "sparsity": 0.75, "begin": 0.05, "end": 0.3},
    {"structure": "layers", "method": "taylor", "sparsity": 0.5, "begin": 0.05, "end": 0.3},
]
TINY = load_recipe(QUICKSTART.with_name("tiny.yaml")).pruning  # units, zeros, and the embeddings
TOKENS = {"model.vocabulary": "data"}


def zeros(share: float, begin: float, **fields: Any) -> dict[str, Any]:
    """Single weights that are masked in one ranking over all layers, until 0.2 of training after `begin`."""
    end = round(begin + 0.2, 4)
    return {"method": "magnitude", "scope": "global", "sparsity": share, "begin": begin, "end": end, **fields}


# What differs from the recipe in each run.
RUNS: dict[str, dict[str, Any]] = {
    "units": {"pruning": UNITS},
    "zeros, 85%": {"pruning": [zeros(0.85, 0.05)]},
    "16 values": {"pruning": [{"method": "keep", "shared_values": 16}]},
    "zeros, 85%, 16 values": {"pruning": [zeros(0.85, 0.05, shared_values=16)]},
    "units, fewer tokens": {"pruning": UNITS, **TOKENS},
    "all: recipes/tiny.yaml": {"pruning": TINY, **TOKENS},
    "4 layers, 32 values, fewer tokens": {
        "pruning": [
            UNITS[0],
            UNITS[1] | {"sparsity": 0.34},
            {"method": "keep", "shared_values": 32},
            TINY[3] | {"shared_values": 32},
        ],
        **TOKENS,
    },
    "all, 40% zeros and 64 values in embeddings": {
        "pruning": [*TINY[:2], TINY[2] | {"sparsity": 0.4}, TINY[3] | {"shared_values": 64}],
        **TOKENS,
    },
}


# What is left out of the recipe to measure a model as it is.
ONLY_MEASURED: dict[str, Any] = {"dense": None, "distillation": None}


# ---- Runs ----


def measure(row: Row, output: Path, steps: float, bf16: bool) -> dict[str, Any]:
    """Run the recipe as a row says; accuracy and bytes of its models in all ways of saving them."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipe = load_recipe(QUICKSTART)
    folder = output / "runs" / row.folder
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "training.seed": row.seed,
        "training.bf16": bf16,
        "training.eval_strategy": "no",
        "training.logging_strategy": "no",
        "training.disable_tqdm": True,
        "training.num_train_epochs": steps * recipe.training["num_train_epochs"],
        "dense.num_train_epochs": steps * (recipe.dense or {})["num_train_epochs"],
        **RUNS[row.setting],
    }
    result = run(load_recipe(QUICKSTART, overrides(values)), say=lambda _: None)
    assert result is not None
    found = {way: saved(folder / "model", save, bf16) for way, save in WAYS.items()}
    dense = {way: saved(folder / "dense", save, bf16) for way, save in WAYS.items()}
    for bits in (8, 4):
        dense[f"int{bits}"] = saved(
            folder / "dense", lambda model, to, bits=bits: rounded_by_torchao(model, to, bits), bf16
        )
    return asdict(row) | {"test": found["float32"]["test"], "pruned": found, "dense": dense}


def overrides(values: Mapping[str, Any]) -> list[str]:
    """Values as they are given to a recipe on the command line."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def saved(folder: Path, save: Callable[[Path, Path], int], bf16: bool) -> dict[str, Any]:
    """The bytes of a model saved in a way, and the accuracy of what opens from there."""
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary, "model")
        size = save(folder, place)
        recipe = load_recipe(
            QUICKSTART,
            overrides({"model": {"name": str(place)}, "output_dir": temporary, "training.bf16": bf16, **ONLY_MEASURED}),
        )
        prepared = prepare(recipe)
        scores = prepared.task.evaluate(make_evaluator(prepared), prepared.data["test"])
    return {"bytes": size, "test": scores[""][recipe.metrics[0]]}


# ---- The report ----


def write_report(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write `report.md` and `size.png` into a folder; the text of the former."""
    of_dense = points([row["dense"] for row in rows], rows)
    points_of = {"dense": of_dense}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        some = [row for row in rows if row["setting"] == setting]
        points_of[setting] = points([row["pruned"] for row in some], some)
    lines = ["| | saved | seeds | MB | accuracy | of dense |", "|---|---|---:|---:|---:|---:|"]
    for setting, ways in points_of.items():
        lines += [
            f"| {setting} | {way} | {one['seeds']} | {one['megabytes']:.2f} | {spread(one['tests'])} "
            f"| {one['of_dense']:.1%} |"
            for way, one in ways.items()
        ]
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw(points_of, folder / "size.png")
    return text


def points(models: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each way of saving: megabytes and accuracy, means over seeds, and accuracy relative to dense in float32."""
    found = {}
    for way in models[0]:
        by_seed = {
            row["seed"]: (model[way], row["dense"]["float32"]["test"]) for model, row in zip(models, rows, strict=True)
        }
        tests = [model["test"] for model, _ in by_seed.values()]
        found[way] = {
            "seeds": len(by_seed),
            "megabytes": statistics.mean(model["bytes"] for model, _ in by_seed.values()) / 1e6,
            "tests": tests,
            "of_dense": statistics.mean(model["test"] / dense for model, dense in by_seed.values()),
        }
    return found


def draw(points_of: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Accuracy relative to dense over megabytes, on a logarithmic axis."""
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for setting, ways in points_of.items():
        some = [(one["megabytes"], one["of_dense"]) for one in ways.values()]
        axes.scatter(*zip(*some, strict=True), label=setting)
    axes.set_xscale("log")
    axes.set_xticks([4, 6, 10, 20, 40, 80], ["4", "6", "10", "20", "40", "80"])
    axes.minorticks_off()
    axes.set_xlabel("MB of weights, configuration and tokenizer")
    axes.set_ylabel("accuracy relative to dense in float32")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(RUNS), default=list(RUNS), help="only these")
    add_training_options(parser)
    parser.add_argument("--only-report", action="store_true", help="measure nothing, and write the report")
    parser.add_argument("--output", type=Path, default=Path("outputs", "size"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {(entry["setting"], entry["seed"]) for entry in map(json.loads, lines)}
    if not options.only_report:
        rows = [Row("sentences", setting, seed) for seed in options.seeds for setting in options.settings]
        rows = [row for row in rows if (row.setting, row.seed) not in known]
        measure_all(rows, options.jobs, options, measure, ("setting", "seed", "test"))
    lines = path.read_text(encoding="utf-8").splitlines()
    print(write_report([json.loads(line) for line in lines], options.output))


if __name__ == "__main__":
    main()
