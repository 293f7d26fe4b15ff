"""What pruning does to a classifier, and whom it hurts first: MiniLM on film reviews, pruned in 20 ways and explained.

All models are pruned from one dense model for each seed, with the data and the training of recipes/quickstart.yaml for
one epoch: single weights by magnitude or neurons of feed-forward networks by Taylor scores, 50 to 95% of them, with and
without distillation from the dense model, in bfloat16 where the hardware computes in it. Each is explained on the test
split beside its dense model. Models are kept in outputs/study, and run again it continues; the study is written to
docs/study.md.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from structure import QUICKSTART
from study_report import Explained, Setting, write_study

from hf_prune.explain.writing import write_explanation
from hf_prune.publish.explanation import load_explanation
from hf_prune.recipe.explain_data import data_of
from hf_prune.recipe.explaining import explain_saved
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.precision import bfloat16_slowdown
from hf_prune.recipe.run import run
from hf_prune.recipe.schema import ExplainSection

WAYS: dict[str, dict[str, Any]] = {
    "weights": {"method": "magnitude", "scope": "global", "begin": 0.05, "end": 0.5},
    "neurons": {"structure": "neurons", "method": "taylor", "begin": 0.05, "end": 0.5},
}

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)

# The pruned runs are shorter than the recipe's: twenty of them take an hour.
EPOCHS = 1
SHORTER = {"num_train_epochs": EPOCHS, "eval_strategy": "no"}

# Kinds of texts that may be harder than others; `negations` is built in, as are length and rarity.
EXPRESSIONS = {
    "contrasts": r"(?i)\b(but|however|although|though|yet|despite)\b",
    "comparisons": r"(?i)\b(more|less|than|too|as \w+ as)\b",
    "questions": r"\?",
}


def settings_of(seeds: list[int]) -> Iterator[Setting]:
    """All settings, the first seed first."""
    for seed in seeds:
        for share in SHARES:
            for way in WAYS:
                for distilled in (True, False):
                    yield Setting(way, share, distilled, seed)


def train_dense(output: Path, seed: int) -> Path:
    """Train the dense model of a seed as the recipe's dense run does, once. Returns its folder.

    It is the end of a run that prunes nothing: a recipe has no run that is dense alone.
    """
    folder = output / f"dense-{seed}"
    if not (folder / "results.json").exists():
        recipe = load_recipe(QUICKSTART)
        changes = {
            "output_dir": str(folder),
            "training": recipe.training | (recipe.dense or {}) | {"seed": seed, "bf16": bfloat16_slowdown() < 1},
            "dense": None,
            "distillation": None,
            "pruning": {"method": "keep"},
        }
        run(recipe.model_copy(update=changes))
    return folder / "model"


def train(output: Path, setting: Setting, dense: Path) -> Path:
    """Prune from the dense model as a setting says, once. Returns the folder of the pruned model."""
    folder = output / setting.name
    if not (folder / "results.json").exists():
        recipe = load_recipe(QUICKSTART)
        distillation = (recipe.distillation or {}) | {"teacher": str(dense)} if setting.distilled else None
        changes = {
            "output_dir": str(folder),
            "model": recipe.model.model_copy(update={"name": str(dense)}),
            "training": recipe.training | SHORTER | {"seed": setting.seed, "bf16": bfloat16_slowdown() < 1},
            "dense": None,
            "distillation": distillation,
            "pruning": WAYS[setting.way] | {"sparsity": setting.share},
        }
        run(recipe.model_copy(update=changes))
    return folder / "model"


def explain(folder: Path, setting: Setting, dense: Path) -> Explained:
    """Explain a pruned model beside its dense one on the test split, once."""
    found = load_explanation(folder)
    if found is None:
        explained = ExplainSection(expressions=EXPRESSIONS, training_samples=200, perturbations=False, costs=False)
        recipe = load_recipe(QUICKSTART).model_copy(update={"explain": explained})
        found = explain_saved(folder, lambda with_labels: data_of(recipe), explained, dense)
        write_explanation(folder, found)
    return Explained(setting, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--output", type=Path, default=Path("outputs", "study"))
    parser.add_argument("--study", type=Path, default=Path("docs", "study.md"), help="where the study is written")
    options = parser.parse_args()
    settings = list(settings_of(options.seeds))
    dense = {seed: train_dense(options.output, seed) for seed in options.seeds}
    folders = [train(options.output, setting, dense[setting.seed]) for setting in settings]
    found = []
    for setting, folder in zip(settings, folders, strict=True):
        found.append(explain(folder, setting, dense[setting.seed]))
        print(f"{setting.name} is explained.", flush=True)
    write_study(found, EPOCHS, options.study)


if __name__ == "__main__":
    main()
