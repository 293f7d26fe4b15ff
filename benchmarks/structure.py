"""Models that structures were removed from, and other small models: accuracy, size and latency, over three seeds.

All rows start from the dense model of their seed, train for the same number of steps on the same data, and are
distilled from that dense model: the data and the training are those of `recipes/quickstart.yaml`. Rows are kept in
outputs/structure/rows.jsonl and their models beside it; run it again to continue. Latencies are measured at the end, of
all models in turns: CPU seconds of a forward pass in float32 on one thread, the least of several.
"""

import argparse
import copy
import functools
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from quality import add_training_options, measure_all
from remembering import remember_answers
from safetensors.torch import load_model
from structure_report import write_report
from structure_rival import make_environment, pruned_by_torch_pruning
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, PreTrainedModel, Trainer
from transformers.utils import logging

from hf_prune import PruningTrainer
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import Prepared, prepare
from hf_prune.recipe.schema import Recipe

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"

# What differs from the recipe in each task.
TASKS: dict[str, dict[str, Any]] = {
    "sentences": {},
    "imdb": {
        "dataset.where": {"source": "imdb"},
        "dataset.max_length": 256,
        "dataset.max_train_samples": 6560,
        "dataset.test_size": 1000,
    },
}


@dataclass(frozen=True)
class Setting:
    """One way to get a smaller model.

    `pruning` has the fields of each PruningConfig that differ from the recipe's; none for models that are not pruned.
    With `fields`, the model is a new one with random weights, but for the dense model's embeddings, and with these
    fields in its configuration. With `rival`, Torch-Pruning prunes the dense model before training, with these options.
    """

    kind: str
    pruning: tuple[dict[str, Any], ...] = ()
    fields: dict[str, Any] | None = None
    rival: tuple[str, ...] = ()


def neurons(share: float, **fields: Any) -> dict[str, Any]:
    return {"structure": "neurons", "sparsity": share, **fields}


def heads(share: float, **fields: Any) -> dict[str, Any]:
    return {"structure": "heads", "sparsity": share, **fields}


def layers(share: float, **fields: Any) -> dict[str, Any]:
    return {"structure": "layers", "sparsity": share, **fields}


def per_layer(of_neurons: float, of_heads: float, *others: dict[str, Any]) -> Setting:
    """Neurons and heads ranked over all layers."""
    return Setting("per layer", (neurons(of_neurons, scope="global"), heads(of_heads, scope="global"), *others))


def torch_pruning(of_neurons: float, of_heads: float, hidden: bool = False) -> Setting:
    """Neurons and heads that Torch-Pruning removes at once; with `hidden`, hidden states in the share of neurons."""
    options = ("--neurons", str(of_neurons), "--heads", str(of_heads))
    if hidden:
        return Setting("Torch-Pruning, hidden states too", rival=(*options, "--hidden"))
    return Setting("Torch-Pruning", rival=options)


RANDOM = {"method": "random", "schedule": "one_shot", "begin": 0, "end": None}
SETTINGS: dict[str, Setting] = {
    "dense, as many steps": Setting("dense"),
    "neurons 1/2": Setting("neurons", (neurons(0.5),)),
    "neurons 1/4": Setting("neurons", (neurons(0.75),)),
    "layers 4 of 6": Setting("layers", (layers(0.3),)),
    "layers 3 of 6": Setting("layers", (layers(0.5),)),
    "layers 2 of 6": Setting("layers", (layers(0.7),)),
    "hidden 2/3": Setting("hidden", ({"structure": "hidden", "sparsity": 0.3333},)),
    "neurons 1/2, layers 4 of 6": Setting("neurons and layers", (neurons(0.5), layers(0.3))),
    "neurons 1/2, layers 3 of 6": Setting("neurons and layers", (neurons(0.5), layers(0.5))),
    "neurons 1/4, layers 3 of 6": Setting("neurons and layers", (neurons(0.75), layers(0.5))),
    "neurons 1/4, layers 2 of 6": Setting("neurons and layers", (neurons(0.75), layers(0.7))),
    "global: neurons 1/2, heads 3/4": per_layer(0.5, 0.25),
    "global: neurons 1/4, heads 1/2": per_layer(0.75, 0.5),
    "global: neurons 1/8, heads 1/4": per_layer(0.875, 0.75),
    "global: neurons 1/4, heads 1/2, layers 4 of 6": per_layer(0.75, 0.5, layers(0.3)),
    "global: neurons 1/8, heads 1/4, layers 4 of 6": per_layer(0.875, 0.75, layers(0.3)),
    "global: neurons 1/8, heads 1/4, layers 3 of 6": per_layer(0.875, 0.75, layers(0.5)),
    "global: neurons 1/16, heads 1/6, layers 4 of 6": per_layer(0.9375, 0.8333, layers(0.3)),
    "at random: neurons 1/4, layers 3 of 6": Setting(
        "at random, at once", (neurons(0.75, **RANDOM), layers(0.5, **RANDOM))
    ),
    "new: neurons 1/2, layers 3 of 6": Setting(
        "new small model", fields={"intermediate_size": 768, "num_hidden_layers": 3}
    ),
    "new: neurons 1/4, layers 3 of 6": Setting(
        "new small model", fields={"intermediate_size": 384, "num_hidden_layers": 3}
    ),
    "new: neurons 1/4, layers 2 of 6": Setting(
        "new small model", fields={"intermediate_size": 384, "num_hidden_layers": 2}
    ),
    "Torch-Pruning: neurons 1/4, heads 1/2": torch_pruning(0.75, 0.5),
    "Torch-Pruning: neurons 1/8, heads 1/4": torch_pruning(0.875, 0.75),
    "Torch-Pruning: width, neurons and heads 1/2": torch_pruning(0.5, 0.5, hidden=True),
    "Torch-Pruning: width, neurons and heads 1/3": torch_pruning(2 / 3, 2 / 3, hidden=True),
    # As many weights are left in the layers as with a quarter of the neurons and half of the layers.
    "zeros, 75%": Setting("zeros", ({"method": "magnitude", "sparsity": 0.75, "scope": "global"},)),
}
# Rows of the longer task.
OF_IMDB = (
    "dense, as many steps",
    "neurons 1/4, layers 3 of 6",
    "global: neurons 1/4, heads 1/2, layers 4 of 6",
    "global: neurons 1/8, heads 1/4",
    "new: neurons 1/4, layers 3 of 6",
)


@dataclass(frozen=True)
class Row:
    """One training."""

    task: str
    setting: str
    seed: int

    @property
    def folder(self) -> str:
        """The name of the folder of its model."""
        name = "".join(letter if letter.isalnum() else "-" for letter in self.setting)
        return f"{self.task}-{name}-{self.seed}"


def rows_of(task: str, seeds: Sequence[int]) -> list[Row]:
    """All rows of a task but the dense ones."""
    settings = OF_IMDB if task == "imdb" else SETTINGS
    return [Row(task, setting, seed) for seed in seeds for setting in settings]


def recipe_of(row: Row, steps: float, bf16: bool, folder: str) -> Recipe:
    """The recipe that a row is trained with; the Trainer writes into `folder`, which no other run may use."""
    values: dict[str, Any] = {
        "output_dir": folder,
        "training.bf16": bf16,
        "training.seed": row.seed,
        "training.eval_strategy": "no",
        "training.logging_strategy": "no",
        "training.disable_tqdm": True,
        **TASKS[row.task],
    }
    recipe = load_recipe(QUICKSTART)
    values["training.num_train_epochs"] = steps * recipe.training["num_train_epochs"]
    values["dense.num_train_epochs"] = steps * (recipe.dense or {})["num_train_epochs"]
    if row.setting != "dense" and SETTINGS[row.setting].pruning:
        common = {key: recipe.pruning[0][key] for key in ("method", "begin", "end")}
        values["pruning"] = [common | fields for fields in SETTINGS[row.setting].pruning]
        if any(fields.get("structure") == "hidden" for fields in SETTINGS[row.setting].pruning):
            values["distillation.hidden_weight"] = 0.0  # the teacher's hidden states are wider
    return load_recipe(QUICKSTART, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def measure(row: Row, output: Path, steps: float, bf16: bool) -> dict[str, Any]:
    """Train a row, and save its model; what came of it on the test part."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as runs:
        recipe = recipe_of(row, steps, bf16, runs)
        prepared = prepare(recipe)
        trainer = make_trainer(prepared, row, output)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        found = {
            **asdict(row),
            "kind": SETTINGS[row.setting].kind if row.setting != "dense" else "dense",
            "test": prepared.task.evaluate(trainer, prepared.data["test"])[""][recipe.metrics[0]],
            "dense": dense_test(row, output),
            "steps": trainer.state.global_step,
            "seconds": seconds,
        }
        trainer.save_model(str(output / "models" / row.folder))
    return found


def dense_test(row: Row, output: Path) -> float | None:
    """The accuracy of the dense model that a row starts from; None for the dense model itself."""
    if row.setting == "dense":
        return None
    return float(known_rows(output / "rows.jsonl")[Row(row.task, "dense", row.seed)]["test"])


def make_trainer(prepared: Prepared, row: Row, output: Path) -> Trainer:
    """The Trainer of a row, which starts from the dense model of its seed."""
    recipe = prepared.recipe
    is_dense = row.setting == "dense"
    keywords: dict[str, Any] = {
        "args": recipe.training_arguments(is_dense),
        "train_dataset": prepared.data["train"],
        "eval_dataset": prepared.data["validation"],
        "processing_class": prepared.tokenizer,
        "data_collator": prepared.task.collator(prepared.tokenizer, prepared.model),
        "compute_metrics": prepared.task.compute_metrics(prepared.tokenizer),
    }
    if is_dense:
        return Trainer(model=prepared.model, **keywords)
    dense = output / "models" / Row(row.task, "dense", row.seed).folder
    load_model(prepared.model, dense / "model.safetensors")
    setting = SETTINGS[row.setting]
    model, distillation = prepared.model, recipe.distillation_config
    if setting.fields is not None:
        model = new_model(prepared.model, setting.fields)
        pairs = evenly_paired(model.config.num_hidden_layers, prepared.model.config.num_hidden_layers)
        distillation = replace(distillation, hidden_layers=pairs)
    elif setting.rival:
        folder = output / "torch-pruning" / row.folder
        model = pruned_by_torch_pruning(prepared, dense, setting.rival, environment_in(output), folder)
        if model.config.hidden_size != prepared.model.config.hidden_size:  # the teacher's are wider
            distillation = replace(distillation, hidden_weight=0.0)
    return PruningTrainer(
        model=model,
        **keywords,
        pruning_config=recipe.pruning_configs if setting.pruning else None,
        teacher_model=teacher_of(dense),
        distillation_config=distillation,
    )


def evenly_paired(layers: int, teacher_layers: int) -> list[list[int]]:
    """Hidden states of a model and of a deeper teacher to compare: the embeddings, and every so many layers."""
    return [[layer, round(layer * teacher_layers / layers)] for layer in range(layers + 1)]


def environment_in(output: Path) -> Path:
    """Where the environment of Torch-Pruning is."""
    return output / "torch-pruning" / "environment"


@functools.lru_cache(maxsize=1)  # rows come seed by seed
def teacher_of(dense: Path) -> PreTrainedModel:
    """The dense model of a folder, which remembers its answers for the rows that this process trains next."""
    return remember_answers(AutoModelForSequenceClassification.from_pretrained(dense))


def new_model(dense: PreTrainedModel, fields: dict[str, Any]) -> PreTrainedModel:
    """A model of the same class with other values in its configuration: random weights, the dense model's embeddings.

    The embeddings stay frozen where they are in the dense model.
    """
    config = copy.deepcopy(dense.config)
    config.update(fields)
    model = type(dense)(config)
    embeddings = dense.base_model.embeddings
    model.base_model.embeddings.load_state_dict(embeddings.state_dict())
    for name, parameter in embeddings.named_parameters():
        model.base_model.embeddings.get_parameter(name).requires_grad_(parameter.requires_grad)
    return model


def measure_sizes(rows: Sequence[Row], output: Path, passes: int) -> dict[str, dict[str, Any]]:
    """Parameters of the models of rows, by folder, and how much cheaper a forward pass is than in the dense model.

    `faster` has "1" and "32": CPU seconds of the dense model of the seed over those of the model, for so many texts of
    128 tokens, on one thread, the least of so many passes, in turns; and "flops": the same of multiply-adds.
    """
    torch.set_num_threads(1)
    models = {}
    for row in rows:
        model = AutoModelForSequenceClassification.from_pretrained(output / "models" / row.folder, dtype=torch.float32)
        models[row] = model.eval()
    costs: dict[Row, dict[str, float]] = {}
    for row, model in models.items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(input_ids=torch.ones(1, 128, dtype=torch.long))
        costs[row] = {"flops": counter.get_total_flops()}
    for texts in (1, 32):
        inputs = torch.randint(1000, 20000, (texts, 128), generator=torch.Generator().manual_seed(0))
        least = dict.fromkeys(models, float("inf"))
        for _ in range(1 + (passes if texts == 1 else max(passes // 4, 1))):  # the first warms up
            for row, model in models.items():
                start = time.thread_time()
                with torch.inference_mode():
                    model(input_ids=inputs)
                least[row] = min(least[row], time.thread_time() - start)
        for row, seconds in least.items():
            costs[row][str(texts)] = seconds
    found = {}
    for row, model in models.items():
        dense = costs[Row(row.task, "dense", row.seed)]
        found[row.folder] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "faster": {what: dense[what] / cost for what, cost in costs[row].items()},
        }
    return found


def known_rows(path: Path) -> dict[Row, dict[str, Any]]:
    """The rows that were measured before."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    entries = [json.loads(line) for line in lines]
    return {Row(entry["task"], entry["setting"], entry["seed"]): entry for entry in entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="only these")
    parser.add_argument("--passes", type=int, default=40, help="forward passes of each model to take the least of")
    add_training_options(parser)
    parser.add_argument("--dense-steps", type=float, help="the same of the dense models; default: as --steps")
    parser.add_argument("--only-report", action="store_true", help="measure nothing, and write the report")
    parser.add_argument("--output", type=Path, default=Path("outputs", "structure"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    for task in options.tasks if not options.only_report else ():
        known = known_rows(path)
        dense = [Row(task, "dense", seed) for seed in options.seeds]
        gone = [row for row in dense if not (options.output / "models" / row.folder).exists()]
        wanted = [row for row in rows_of(task, options.seeds) if row not in known]
        if options.settings:
            wanted = [row for row in wanted if row.setting in options.settings]
        if any(SETTINGS[row.setting].rival for row in wanted):
            make_environment(environment_in(options.output))
        dense_options = argparse.Namespace(**vars(options) | {"steps": options.dense_steps or options.steps})
        shown = ("task", "setting", "seed", "test", "seconds")
        missing = [row for row in dense if row not in known or row in gone]
        measure_all(missing, options.jobs, dense_options, measure, shown)
        measure_all(wanted, options.jobs, options, measure, shown)
    path_of_sizes = options.output / "sizes.json"
    sizes = json.loads(path_of_sizes.read_text(encoding="utf-8")) if path_of_sizes.exists() else {}
    known = known_rows(path)
    if not options.only_report:  # of the models that are here: others were measured where they were trained
        rows = [row for row in known if row.task == "sentences" and (options.output / "models" / row.folder).exists()]
        sizes |= measure_sizes(rows, options.output, options.passes)
        path_of_sizes.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    entries = [{**entry, "folder": row.folder} for row, entry in known.items()]
    print(write_report(entries, sizes, options.output))


if __name__ == "__main__":
    main()
