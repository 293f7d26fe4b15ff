"""A language model that structures were removed from: perplexity against tokens a second.

SmolLM2-135M-Instruct on film reviews, with the data, the training and the methods of
`recipes/structured_generation.yaml`. All rows start from the dense model of their seed, train for the same number of
steps, and are distilled from it. Rows are kept in outputs/language_speed/rows.jsonl and their models beside it; run it
again to continue. Speeds are measured at the end, of all models in turns, on one thread.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from quality import add_training_options, measure_all
from quality_report import spread
from safetensors.torch import load_model
from structure import Row, known_rows
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer
from transformers.utils import logging

from hf_prune import PruningTrainer
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import prepare
from hf_prune.recipe.schema import Recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "structured_generation.yaml"
TASK = "text"

# Shares of neurons and of layers that are removed.
SETTINGS: dict[str, tuple[float, float]] = {
    "dense, as many steps": (0.0, 0.0),
    "neurons 2/3": (0.3333, 0.0),
    "layers 24 of 30": (0.0, 0.2),
    "neurons 2/3, layers 24 of 30": (0.3333, 0.2),
    "neurons 1/2, layers 24 of 30": (0.5, 0.2),
    "neurons 1/2, layers 18 of 30": (0.5, 0.4),
}

PROMPT, WRITTEN = 16, 48  # tokens that are read, and then written one by one
READ = (4, 128)  # texts, tokens


def recipe_of(row: Row, steps: float, bf16: bool, folder: str) -> Recipe:
    """The recipe that a row is trained with; the Trainer writes into `folder`, which no other run may use."""
    recipe = load_recipe(RECIPE)
    values: dict[str, Any] = {
        "output_dir": folder,
        "training.bf16": bf16,
        "training.seed": row.seed,
        "training.max_steps": round(steps * recipe.training["max_steps"]),
        "training.disable_tqdm": True,
        "dense.max_steps": round(steps * (recipe.dense or {})["max_steps"]),
    }
    if any(shares := SETTINGS.get(row.setting, (0.0, 0.0))):
        values["pruning"] = [
            fields | {"sparsity": share} for fields, share in zip(recipe.pruning, shares, strict=True) if share
        ]
    return load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def measure(row: Row, output: Path, steps: float, bf16: bool) -> dict[str, Any]:
    """Train a row, and save its model; its perplexity on the test part."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as runs:
        recipe = recipe_of(row, steps, bf16, runs)
        prepared = prepare(recipe)
        is_dense = row.setting == "dense"
        keywords: dict[str, Any] = {
            "args": recipe.training_arguments(is_dense),
            "train_dataset": prepared.data["train"],
            "processing_class": prepared.tokenizer,
            "data_collator": prepared.task.collator(prepared.tokenizer, prepared.model),
            "compute_metrics": prepared.task.compute_metrics(prepared.tokenizer),
        }
        if is_dense:
            trainer = Trainer(model=prepared.model, **keywords)
        else:
            dense = output / "models" / Row(TASK, "dense", row.seed).folder
            load_model(prepared.model, dense / "model.safetensors")
            trainer = PruningTrainer(
                model=prepared.model,
                **keywords,
                pruning_config=recipe.pruning_configs if any(SETTINGS[row.setting]) else None,
                teacher_model=AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32),
                distillation_config=recipe.distillation_config,
            )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        test = prepared.task.evaluate(trainer, prepared.data["test"])[""][recipe.metrics[0]]
        trainer.save_model(str(output / "models" / row.folder))
    return {**asdict(row), "test": test, "steps": trainer.state.global_step, "seconds": seconds}


def measure_speeds(rows: Sequence[Row], output: Path, passes: int) -> dict[str, dict[str, float]]:
    """Tokens a second of CPU time of models, by folder, on one thread: the most of so many passes, in turns.

    `read`: a forward pass over 4 texts of 128 tokens. `written`: 48 tokens one by one after 16, greedily.
    """
    torch.set_num_threads(1)
    models = {}
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(output / "models" / row.folder, dtype=torch.float32)
        models[row.folder] = model.eval()
    tokens = torch.randint(1000, 20000, READ, generator=torch.Generator().manual_seed(0))
    found: dict[str, dict[str, float]] = {
        folder: {"parameters": sum(one.numel() for one in model.parameters()), "read": 0.0, "written": 0.0}
        for folder, model in models.items()
    }
    for _ in range(1 + passes):  # the first warms up
        for folder, model in models.items():
            for what, count, compute in (("read", tokens.numel(), read), ("written", WRITTEN, write)):
                start = time.thread_time()
                with torch.inference_mode():
                    compute(model, tokens)
                found[folder][what] = max(found[folder][what], count / (time.thread_time() - start))
    return found


def read(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """One forward pass over all tokens."""
    model(input_ids=tokens, use_cache=False)


def write(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Tokens one by one after the first of one text."""
    prompt = tokens[:1, :PROMPT]
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=WRITTEN,
        max_new_tokens=WRITTEN,
        do_sample=False,
        pad_token_id=0,
    )


def write_report(rows: Sequence[Mapping[str, Any]], speeds: Mapping[str, Mapping[str, float]], folder: Path) -> str:
    """Write `report.md` and `perplexity.png` into a folder; the text of the former."""
    lines = [
        "| | seeds | perplexity | dense over it | parameters (millions) | tokens a second, read | written "
        "| faster, read | written |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    dense = {row["seed"]: row for row in rows if row["setting"] == "dense"}
    points = {}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        found = [row for row in rows if row["setting"] == setting and row["seed"] in dense]
        shares = [dense[row["seed"]]["test"] / row["test"] for row in found]
        own = [speeds[row["folder"]] for row in found]
        of_dense = [speeds[dense[row["seed"]]["folder"]] for row in found]
        faster = {
            what: statistics.mean(one[what] / other[what] for one, other in zip(own, of_dense, strict=True))
            for what in ("read", "written")
        }
        cells = [str(len(found)), spread([row["test"] for row in found]), f"{statistics.mean(shares):.1%}"]
        cells.append(f"{statistics.mean(one['parameters'] for one in own) / 1e6:.1f}")
        cells += [f"{statistics.mean(one[what] for one in own):.0f}" for what in ("read", "written")]
        cells += [f"{faster[what]:.2f}" for what in ("read", "written")]
        lines.append(f"| {setting} | " + " | ".join(cells) + " |")
        points[setting] = (
            [statistics.mean(one[what] for one in own) for what in ("read", "written")],
            statistics.mean(row["test"] for row in found),
        )
    figure = Figure(figsize=(9, 4), layout="constrained")
    for index, (axes, what) in enumerate(zip(figure.subplots(1, 2), ("read", "written"), strict=True)):
        for setting, (speed, value) in points.items():
            axes.plot(speed[index], value, "o", label=setting)
        axes.set_xlabel(f"tokens {what} a second (CPU time of one thread)")
        axes.set_ylabel("perplexity")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(folder / "perplexity.png", dpi=150)
    text = "\n".join(lines) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), help="only these")
    parser.add_argument("--passes", type=int, default=8, help="of each model to take the fastest of")
    add_training_options(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs", "language_speed"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    shown = ("setting", "seed", "test", "seconds")
    wanted = [Row(TASK, setting, seed) for seed in options.seeds for setting in ("dense", *options.settings)]
    for of_dense in (True, False):
        known = known_rows(path)
        rows = [row for row in wanted if (row.setting == "dense") is of_dense and row not in known]
        measure_all(rows, options.jobs, options, measure, shown)
    known = known_rows(path)
    speeds = measure_speeds(list(known), options.output, options.passes)
    print(write_report([{**entry, "folder": row.folder} for row, entry in known.items()], speeds, options.output))


if __name__ == "__main__":
    main()
