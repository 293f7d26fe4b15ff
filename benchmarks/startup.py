"""CPU seconds that importing the package and each command take, side by side with `import transformers`.

python benchmarks/startup.py [--runs 5]
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification

# What each may take: seconds, or seconds beyond `import transformers`.
AT_THE_DOOR = 0.5
BEYOND_TRANSFORMERS = 0.1
LIGHT = ("hf-prune --help", "hf-prune --version", "hf-prune recipes", "hf-prune init")
BOTH = "import transformers, hf_prune"


def cpu_seconds(command: list[str], folder: Path) -> float:
    """User and system time of a command and its children; the folder it runs in is its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        subprocess.run(command, cwd=own, check=True, capture_output=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def commands(model: Path) -> dict[str, list[str]]:
    python, hf_prune = [sys.executable, "-c"], [sys.executable, "-m", "hf_prune"]
    return {
        "import transformers": [*python, "import transformers"],
        BOTH: [*python, BOTH],
        "from hf_prune import PruningConfig": [*python, "from hf_prune import PruningConfig"],
        "from hf_prune import PruningTrainer": [*python, "from hf_prune import PruningTrainer"],
        "hf-prune --help": [*hf_prune, "--help"],
        "hf-prune --version": [*hf_prune, "--version"],
        "hf-prune recipes": [*hf_prune, "recipes"],
        "hf-prune init": [*hf_prune, "init", "text-classification"],
        "hf-prune validate quickstart": [*hf_prune, "validate", "quickstart"],
        "hf-prune report MODEL": [*hf_prune, "report", str(model)],
        "hf-prune plan MODEL": [*hf_prune, "plan", str(model), "sparsity=0.5"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="runs of each, of which the median counts")
    runs = parser.parse_args().runs
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        BertForSequenceClassification(BertConfig(vocab_size=100, **sizes)).save_pretrained(folder / "model")
        # One of each in turn, so that what else the machine does meets all alike.
        todo = commands(folder / "model")
        rounds = [{what: cpu_seconds(command, folder) for what, command in todo.items()} for _ in range(runs)]
    for what in todo:
        seconds = statistics.median(times[what] for times in rounds)
        most = f"   at most {AT_THE_DOOR}" if what in LIGHT else ""
        print(f"{what:<36} {seconds:6.2f} s{most}")
    beyond = statistics.median(times[BOTH] - times["import transformers"] for times in rounds)
    print(f"hf_prune beyond transformers         {beyond:6.2f} s   at most {BEYOND_TRANSFORMERS}")


if __name__ == "__main__":
    main()
