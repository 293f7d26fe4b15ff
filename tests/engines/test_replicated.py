import json
import os
import subprocess
import sys
from pathlib import Path

import push_replicated
import torch
from forks import run_group
from launching import push_from_group
from test_run import write_recipe
from transformers import AutoModelForSequenceClassification

from hf_prune.saved.masks import MASKS_NAME

HERE = Path(__file__).parent


def torchrun(processes, script, directory, *arguments):
    """Run a script with the launcher itself."""
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent), "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    done = subprocess.run(
        [*command, str(HERE / script), str(directory), *arguments],
        env=os.environ | fixed,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_replicated_processes_end_with_the_same_masks_and_weights(tmp_path):
    torchrun(2, "train_replicated.py", tmp_path, "global")

    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    masks = [torch.tensor(mask) for mask in first["masks"].values()]
    weights = [torch.tensor(weight) for weight in first["weights"].values()]
    total = sum(mask.numel() for mask in masks)
    assert sum(int((~mask).sum()) for mask in masks) == round(0.5 * total)
    assert all(bool((weight[~mask] == 0).all()) for weight, mask in zip(weights, masks, strict=True))

    checkpoint = tmp_path / "checkpoint-10"
    assert (checkpoint / MASKS_NAME).exists()
    saved = dict(AutoModelForSequenceClassification.from_pretrained(checkpoint).named_parameters())
    assert sum(int((saved[name] == 0).sum()) for name in first["masks"]) == round(0.5 * total)


def test_two_processes_are_refused_together_before_they_train(tmp_path):
    recipe = write_recipe(tmp_path, tmp_path / "nowhere", training__push_to_hub=True, training__hub_model_id="a/b")
    first, second = run_group(2, push_replicated.print_refusal, recipe)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "HF_HUB_OFFLINE is set" in first.stdout  # for all tests
    assert "the first process asked the Hub whether the model may be pushed, and was refused" in second.stdout


def test_of_two_processes_one_pushes(hub, lfs_client, tmp_path):
    push_from_group(lfs_client, 2, push_replicated.main, tmp_path / "out")
    repo = hub.repos["somebody/replicated"]
    summaries = [commit.summary for commit in repo.commits()[1:]]
    assert summaries == ["Training in progress, step 5", "Training in progress, step 10", "End of training"]
    card = repo.files()["README.md"].decode()
    assert "**50.00% of the prunable weights" in card
    assert "13 samples" in card
