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


def test_processes_prune_with_a_solver_from_the_tokens_of_all():
    batch = ARCHITECTURES["bert"].batch(8)["input_ids"]
    parts = [batch[:3], batch[3:]]
    with Workers(2) as workers:
        results = workers.run("pruned_by_a_solver", [[[part], "sparsegpt"] for part in parts])
        refusals = workers.run("refusal_of_a_solver_of_shards", [[], []])
    weights, masks = tasks.pruned_by_a_solver(parts, "sparsegpt")
    for name, value in weights.items():
        assert torch.equal(results[0][0][name], results[1][0][name]), name
        if name not in masks:
            assert torch.equal(results[0][0][name], value), name
    for name, mask in masks.items():
        assert int(mask.sum()) == mask.numel() // 2
        assert torch.equal(results[0][1][name], results[1][1][name]), name
        assert float((results[0][1][name] == mask).float().mean()) > 0.99, name
        both = mask & results[0][1][name]
        torch.testing.assert_close(results[0][0][name][both], weights[name][both], rtol=0.02, atol=0.02)
    for refusal in refusals:
        assert "solvers need whole tensors and cannot be used where weights are sharded, got 'sparsegpt'" in refusal
