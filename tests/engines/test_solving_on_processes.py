"""Moments of inputs are added up over processes, so that all solve the same layers alike."""

import tasks
import torch
from models import ARCHITECTURES
from workers import Workers


def test_processes_solve_whole_layers_from_the_tokens_of_all():
    batch = ARCHITECTURES["bert"].batch(8)["input_ids"]
    parts = [batch[:3], batch[3:]]  # of different sizes
    with Workers(2) as workers:
        results = workers.run("solved_from", [[[part]] for part in parts])
        refusals = workers.run("refusal_of_solving_shards", [[], []])
    alone = tasks.solved_from(parts)
    for name, value in alone.items():
        assert torch.equal(results[0][name], results[1][name]), name
        assert torch.allclose(results[0][name], value, atol=1e-6), name
    for refusal in refusals:
        assert "reconstruction: cannot be used where weights are sharded; use DDP, or set none" in refusal
