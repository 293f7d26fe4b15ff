"""How good pruned models are: the shipped recipes against their parts switched off, and against pruning by hand.

python benchmarks/quality.py [--parts sentences imdb language ablation] [--seeds 42 1 2] [--steps 1.0] [--jobs 2] ...

From one dense run of each seed all variants prune for the same number of steps, with the same batches in one order.
Each row of the result is written into `rows.jsonl` of the folder `--output` as soon as it is measured, and not measured
again; `report.md` and the figures are made of all rows that are there. `--steps 4` trains four times as long. Language
models are trained one after another, for their time is shown.
"""

import argparse
import json
import math
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from quality_by_hand import PruneByHand
from quality_report import VARIANTS_DRAWN, write_report
from safetensors.torch import load_model
from transformers import Trainer, TrainerCallback, logging

from hf_prune import PruningTrainer
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.precision import bfloat16_slowdown
from hf_prune.recipe.prepare import Prepared, prepare
from hf_prune.recipe.schema import Recipe

RECIPES = Path(__file__).parents[1] / "recipes"

# In the same time many of them recover more than few large ones.
SMALL_BATCHES = {
    "training.per_device_train_batch_size": 8,
    "dense.per_device_train_batch_size": 32,
    "training.learning_rate": 2.0e-4,
}
# Each part: a recipe, what differs from it, and the steps of its dense and its pruned runs.
PARTS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "sentences": ("sparse", SMALL_BATCHES, 120, 420),
    "imdb": (
        "sparse",
        {
            **SMALL_BATCHES,
            "dataset.where": {"source": "imdb"},
            "dataset.max_train_samples": 6500,
            "dataset.test_size": 1000,
        },
        60,
        210,
    ),
    "language": (
        "generation",
        {
            "training.eval_strategy": "steps",
            "training.eval_steps": 0.2,
            "training.per_device_train_batch_size": 2,
            "dataset.validation_size": 4,
            "dataset.test_size": 16,
        },
        10,
        20,
    ),
}
PARTS["ablation"] = PARTS["sentences"]

SETTINGS: dict[str, dict[str, Any]] = {
    "60%": {"sparsity": 0.6},
    "80%": {"sparsity": 0.8},
    "90%": {"sparsity": 0.9},
    "2:4": {"pattern": "2:4", "scope": "layer"},
    "4x1 blocks, 80%": {"pattern": "block:4x1", "sparsity": 0.8},
}

# What differs from the recipe: of the pruning, of the distillation (None: without), and of the training.
Variant = tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]
VARIANTS: dict[str, Variant] = {
    "defaults": ({}, {}, {}),
    "without distillation": ({}, None, {}),
    "random": ({"method": "random"}, {}, {}),
    "movement": ({"method": "movement"}, {}, {}),
    "by hand": ({}, None, {}),
}
# Variants that are measured at high sparsity alone, where they are said to be at their best.
AT_HIGH_SPARSITY = ("movement",)
ABLATIONS: dict[str, Variant] = {
    "no dense warm-up": ({"begin": 0}, {}, {}),
    "linear schedule": ({"schedule": "linear"}, {}, {}),
    "no recovery": ({"end": None}, {}, {}),
    "ranked by layer": ({"scope": "layer"}, {}, {}),
    "learning rate rewound": ({}, {}, {"rewound": True}),
    "temperature 1": ({}, {"temperature": 1.0}, {}),
    "no labels": ({}, {"weight": 1.0}, {}),
    "no hidden states": ({}, {"hidden_weight": 0.0}, {}),
    "l1 penalty": ({"penalty": "l1", "penalty_weight": 1e-5}, {}, {}),
}


@dataclass(frozen=True)
class Row:
    """One training: which part, sparsity or pattern, variant and seed."""

    part: str
    setting: str
    variant: str
    seed: int


def rows_of(part: str, seeds: Iterable[int]) -> list[Row]:
    """All rows of a part but the dense ones."""
    settings = {"sentences": list(SETTINGS), "imdb": ["80%"], "language": ["50%"], "ablation": ["90%"]}[part]
    variants = {"ablation": list(ABLATIONS), "language": ["defaults", "without distillation"]}.get(part, list(VARIANTS))
    return [
        Row(part, setting, variant, seed)
        for seed in seeds
        for setting in settings
        for variant in variants
        if variant not in AT_HIGH_SPARSITY or (part == "sentences" and setting in ("80%", "90%"))
    ]


def dense_row(part: str, seed: int) -> Row:
    """The row of the model that the others of a part start from."""
    return Row("sentences" if part == "ablation" else part, "dense", "dense", seed)


def dense_folder(row: Row, output: Path) -> Path:
    """Where the model is that a row starts from."""
    return output / "models" / f"{dense_row(row.part, row.seed).part}-{row.seed}"


def recipe_of(row: Row, steps: float, bf16: bool, folder: str) -> Recipe:
    """The recipe that a row is trained with; the Trainer writes into `folder`, which no other run may use."""
    name, changes, dense_steps, pruned_steps = PARTS[row.part]
    values: dict[str, Any] = {
        "output_dir": folder,
        "training.bf16": bf16,
        "training.seed": row.seed,
        "training.max_steps": round(steps * pruned_steps),
        "training.eval_strategy": "no",
        "training.logging_strategy": "no",
        "training.disable_tqdm": True,
        "dense.max_steps": round(steps * dense_steps),
        **changes,
    }
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    if row.variant != "dense":
        pruning, distillation, training = (VARIANTS | ABLATIONS)[row.variant]
        setting = SETTINGS.get(row.setting, {})
        kept = {key: value for key, value in recipe.pruning.items() if key != "sparsity" or not setting}
        values["pruning"] = kept | setting | pruning
        values["distillation"] = None if distillation is None else (recipe.distillation or {}) | distillation
        values |= {f"training.{key}": value for key, value in training.items() if key != "rewound"}
    return load_recipe(RECIPES / f"{name}.yaml", [f"{key}={json.dumps(value)}" for key, value in values.items()])


def measure(row: Row, output: Path, steps: float, bf16: bool) -> dict[str, Any]:
    """Train a row; what came of it on the test part and, where that is drawn, on as many training samples."""
    with tempfile.TemporaryDirectory() as runs:
        return measure_in(runs, row, output, steps, bf16)


def measure_in(runs: str, row: Row, output: Path, steps: float, bf16: bool) -> dict[str, Any]:
    """The same, with a folder for what the Trainer writes."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    recipe = recipe_of(row, steps, bf16, runs)
    prepared = prepare(recipe)
    is_dense = row.variant == "dense"
    folder = dense_folder(row, output)
    if not is_dense:
        load_model(prepared.model, folder / "model.safetensors")
    curve = Curve()
    trainer, names = make_trainer(prepared, row, folder)
    trainer.add_callback(curve)
    trainer.train()
    test = prepared.data["test"]
    training = prepared.data["train"].select(range(min(len(test), len(prepared.data["train"]))))
    gap_is_drawn = row.part == "sentences" and row.variant in VARIANTS_DRAWN
    weights = [trainer.model.get_parameter(name) for name in names]
    found = {
        **asdict(row),
        "metric": recipe.metrics[0],
        "test": prepared.task.evaluate(trainer, test)[""][recipe.metrics[0]],
        "train": prepared.task.evaluate(trainer, training)[""][recipe.metrics[0]] if gap_is_drawn else None,
        "zeros": sum(int((weight == 0).sum()) for weight in weights) / max(sum(one.numel() for one in weights), 1),
        "steps": trainer.state.global_step,
        "seconds": curve.seconds,
        "curve": curve.points,
    }
    if is_dense:
        trainer.save_model(str(folder))
    return found


def make_trainer(prepared: Prepared, row: Row, dense: Path) -> tuple[Trainer, list[str]]:
    """The Trainer of a row, and the names of the tensors that are pruned."""
    recipe = prepared.recipe
    is_dense = row.variant == "dense"
    plan = prepared.plan()
    keywords = {
        "model": prepared.model,
        "args": recipe.training_arguments(is_dense),
        "train_dataset": prepared.data["train"],
        "eval_dataset": prepared.data["validation"],
        "processing_class": prepared.tokenizer,
        "data_collator": prepared.task.collator(prepared.tokenizer, prepared.model),
        "compute_metrics": prepared.task.compute_metrics(prepared.tokenizer),
    }
    names = [tensor.name for tensor in plan.tensors]
    if is_dense:
        return Trainer(**keywords), names
    if row.variant == "by hand":
        modules = [prepared.model.get_submodule(name.removesuffix(".weight")) for name in names]
        callback = PruneByHand(modules, plan.updates, recipe.pruning_configs[0].parsed_pattern)
        return Trainer(**keywords, callbacks=[callback]), names
    if recipe.distillation_config is not None:
        keywords |= {"teacher_model": dense, "distillation_config": recipe.distillation_config}
    rewound = (VARIANTS | ABLATIONS)[row.variant][2].get("rewound", False)
    trainer_class = Rewound if rewound else PruningTrainer
    return trainer_class(**keywords, pruning_config=recipe.pruning_configs), names


class Rewound(PruningTrainer):
    """The learning rate falls to three tenths until the last mask, and from its height to zero after it."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A piecewise linear schedule."""
        last_mask = max(update.step for update in self.pruner.plan(num_training_steps).updates)
        warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            if step < last_mask:
                return 1 - 0.7 * (step - warmup) / (last_mask - warmup)
            return (num_training_steps - step) / max(num_training_steps - last_mask, 1)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


class Curve(TrainerCallback):
    """The seconds that steps took, without evaluations, and the held-out perplexity after so many."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.points: list[tuple[float, float]] = []
        self._started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.perf_counter() - self._started

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if "eval_loss" in metrics:  # not that of the test part
            self.points.append((self.seconds, math.exp(metrics["eval_loss"])))


def known_rows(path: Path) -> dict[Row, dict[str, Any]]:
    """The rows that were measured before."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {Row(entry["part"], entry["setting"], entry["variant"], entry["seed"]): entry for entry in entries}


def missing_rows(part: str, options: argparse.Namespace, known: Container[Row]) -> tuple[list[Row], list[Row]]:
    """What is to be measured of a part: dense rows, whose models are gone or were not trained yet, and the others."""
    rows = [row for row in rows_of(part, options.seeds) if row not in known]
    if options.settings:
        rows = [row for row in rows if row.setting in options.settings]
    if options.variants:
        rows = [row for row in rows if row.variant in options.variants]
    wanted = {dense_row(row.part, row.seed) for row in rows if not dense_folder(row, options.output).exists()}
    dense = [dense_row(part, seed) for seed in options.seeds]
    return [row for row in dense if row not in known or row in wanted], rows


def measure_all(
    rows: Sequence[Any],
    jobs: int,
    options: argparse.Namespace,
    measure: Callable[..., dict[str, Any]] = measure,
    shown: Sequence[str] = ("part", "setting", "variant", "seed", "test", "seconds"),
) -> None:
    """Measure rows, so many at a time, write down each, and print the columns that are shown.

    A row that fails is printed with its error, and the others are measured; then RuntimeError says that some failed.
    """
    threads = max((os.cpu_count() or 1) // jobs, 1)
    context = multiprocessing.get_context("spawn")
    failed = []
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (threads,)) as pool:
        waiting = {pool.submit(measure, row, options.output, options.steps, options.bf16): row for row in rows}
        for done in as_completed(waiting):
            if done.exception() is not None:
                failed.append(waiting[done])
                traceback.print_exception(done.exception())
                continue
            found = done.result()
            with (options.output / "rows.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(*(found[key] for key in shown), flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} rows failed, see above; run it again to measure them: {failed}")


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how rows are trained."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on its share of the cores")
    parser.add_argument("--steps", type=float, default=1.0, help="how many times as long to train")
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=bfloat16_slowdown() < 1,
        help="autocast; default: where products are faster in bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--settings", nargs="+", help="only these, such as 80%% 2:4")
    parser.add_argument("--variants", nargs="+", help="only these, such as defaults 'by hand'")
    add_training_options(parser)
    parser.add_argument("--output", type=Path, help="default: outputs/quality, or outputs/quality-STEPS")
    options = parser.parse_args()
    if options.output is None:
        options.output = Path("outputs", "quality" if options.steps == 1 else f"quality-{options.steps:g}")
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    for part in options.parts:
        for rows in missing_rows(part, options, known_rows(path)):
            measure_all(rows, 1 if part == "language" else options.jobs, options)
    print(write_report(list(known_rows(path).values()), options.output))


if __name__ == "__main__":
    main()
