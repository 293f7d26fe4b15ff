"""What the README shows runs: its Python blocks one after another, its commands' names, its table of fields."""

import dataclasses
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from models import bert, bert_examples, training_arguments
from typer.main import get_command

from hf_prune import PruningConfig
from hf_prune.cli.commands import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def fenced(language):
    return [block for name, block in BLOCKS if name == language]


def test_python_blocks_run(tmp_path):
    model = bert()
    batch = {
        "input_ids": torch.stack([example["input_ids"] for example in bert_examples(4)]),
        "labels": torch.stack([example["labels"] for example in bert_examples(4)]),
    }
    names = {
        "model": model,
        "args": training_arguments(tmp_path),
        "train": bert_examples(),
        "test": bert_examples(),
        "tokenizer": None,
        "metrics": lambda prediction: {"mean": float(np.mean(prediction.label_ids))},
        "optimizer": torch.optim.AdamW(model.parameters()),
        "batches": [batch] * 10,
    }
    blocks = fenced("python")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["pruner"].sparsity == pytest.approx(0.8, abs=0.01)
    assert (tmp_path / "model.safetensors").exists()


def test_commands_exist():
    commands = get_command(app).commands
    lines = [line for block in fenced("") for line in block.splitlines() if line.startswith("hf-prune")]
    assert lines
    for line in lines:
        assert shlex.split(line)[1] in commands, line


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {line.split()[1] for block in fenced("") for line in block.splitlines() if line.startswith("make ")}
    assert targets >= {"quickstart", "test"}
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_the_table_of_fields_names_every_field():
    section = README.split("## What you can say")[1].split("\n## ")[0]
    rows = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`(\w+)`", rows)) == {field.name for field in dataclasses.fields(PruningConfig)}


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
