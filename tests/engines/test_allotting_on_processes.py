"""What a step shows on all processes decides how much of each tensor is pruned, whole or sharded, as on one process."""

import json

import pytest
import tasks
import torch
from models import ARCHITECTURES
from test_replicated import torchrun
from workers import Workers

from hf_prune.methods.patterns import parse_pattern


def batches(parts):
    """The same eight examples, in parts of the same size, so that the means of their losses weigh the same."""
    whole = ARCHITECTURES["llama"].batch(8)
    pieces = {name: value.chunk(parts) for name, value in whole.items()}
    return [{name: piece[index] for name, piece in pieces.items()} for index in range(parts)]


@pytest.fixture(scope="module")
def two():
    with Workers(2) as workers:
        yield workers


@pytest.mark.parametrize("pattern", ["unstructured", "block:4x1", "block:8x2"])
@pytest.mark.parametrize("scope", ["sensitivity", "owl"])
def test_processes_decide_what_one_would(two, scope, pattern):
    """Some blocks of eight rows are split between the two processes of a sharded model."""
    alone = tasks.allotted_from(batches(4), scope, pattern)
    weights = sum(alone.values())
    for sharded in (False, True):
        parts = batches(4)
        results = two.run("allotted_from", [[parts[:2], scope, pattern, sharded], [parts[2:], scope, pattern, sharded]])
        assert results[0] == results[1]
        assert results[0] == pytest.approx(alone, abs=2 * parse_pattern(pattern).unit_size)
        assert sum(results[0].values()) == weights
    assert len({masked for name, masked in alone.items() if "_proj" in name}) > 2


def test_launched_processes_train_to_the_same_shares(tmp_path):
    torchrun(2, "train_replicated.py", tmp_path, "sensitivity")
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    masks = {name: torch.tensor(mask) for name, mask in first["masks"].items()}
    masked = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert sum(masked.values()) == round(0.5 * sum(mask.numel() for mask in masks.values()))
    assert len({count / masks[name].numel() for name, count in masked.items()}) > 2
    assert all(not torch.tensor(first["weights"][name])[~mask].any() for name, mask in masks.items())
    state = json.loads((tmp_path / "checkpoint-10" / "pruning_state.json").read_text())
    assert state["allotted"]["0"] == list(masked.values())
