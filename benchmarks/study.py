"""What pruning does to a classifier, and whom it hurts first: MiniLM on film reviews, pruned in 20 ways and explained.

All models are pruned from one dense model for each seed, with the training of recipes/quickstart.yaml:
single weights by magnitude or neurons of feed-forward networks by Taylor scores, 50 to 95% of them, with and without
distillation from the dense model. Models are kept in outputs/study; run it again to continue.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from structure import QUICKSTART

from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.run import run

WAYS: dict[str, dict[str, Any]] = {
    "weights": {"method": "magnitude", "scope": "global", "begin": 0.05, "end": 0.5},
    "neurons": {"structure": "neurons", "method": "taylor", "begin": 0.05, "end": 0.5},
}

SHARES = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Setting:
    """One pruned model: what is pruned, which share of it, and whether the dense model is its teacher."""

    way: str
    share: float
    distilled: bool
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.way}-{self.share:.0%}-{'distilled' if self.distilled else 'labels'}-{self.seed}"


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
            "training": recipe.training | (recipe.dense or {}) | {"seed": seed},
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
            "training": recipe.training | {"seed": setting.seed},
            "dense": None,
            "distillation": distillation,
            "pruning": WAYS[setting.way] | {"sparsity": setting.share},
        }
        run(recipe.model_copy(update=changes))
    return folder / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--output", type=Path, default=Path("outputs", "study"))
    options = parser.parse_args()
    for setting in settings_of(options.seeds):
        dense = train_dense(options.output, setting.seed)
        folder = train(options.output, setting, dense)
        print(setting.name, folder, flush=True)


if __name__ == "__main__":
    main()
