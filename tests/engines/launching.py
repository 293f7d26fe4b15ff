"""Cases of training that `train.py` runs on several processes, and what is asserted of what they came to."""

import json
from functools import partial

import torch
import train
from forks import TIMEOUT, leave_group_after, make_group, run_group
from hub_server import WRITE_TOKEN

from hf_prune.saved.masks import mask_files
from hf_prune.saved.report import make_report

WINDOW = {"begin": 2, "end": 8, "frequency": 2}
GLOBAL = {"sparsity": 0.5, "scope": "global", **WINDOW}
INPUTS = {"method": "wanda", "sparsity": 0.5, "schedule": "one_shot", "begin": 4}
SENSITIVITY = {"sparsity": 0.5, "scope": "sensitivity", **WINDOW}
GRADIENTS = {"method": "taylor", "sparsity": 0.5, "scope": "global", "schedule": "one_shot", "begin": 4}
MOVEMENT = {"method": "movement", "sparsity": 0.5, "scope": "global", **WINDOW}
DISTILLED = {"model": "llama", "configs": [GLOBAL], "distilled": {"weight": 0.6, "hidden_weight": 0.5}}
PENALISED = {  # three processes hold some blocks in parts
    "model": "llama",
    "configs": [{"sparsity": 0.5, "pattern": "block:4x1", "penalty": "group_lasso", "penalty_weight": 0.01, **WINDOW}],
}
SAVE = {"save_strategy": "steps", "save_steps": 5}
# The metric is the number of the evaluation, the lower the better: the first is before pruning has ended, at step 4.
BEST = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 4,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "load_best_model_at_end": True,
    "metric_for_best_model": "evaluations",
    "greater_is_better": False,
}


def in_a_stock_trainer(engine, directory, name):
    """A `PruningCallback` in a stock Trainer: a run, and one that goes on from its first checkpoint."""
    case = {"engine": engine, "model": "bert", "configs": [GLOBAL], "callback": True}
    output = directory / name  # the callback looks for masks in the output folder
    return {
        name: case | {"arguments": BEST, "weights_at": [4, 8]},
        f"{name} resumed": case
        | {"arguments": BEST | {"output_dir": str(output)}, "resume": str(output / "checkpoint-4")},
    }


def launch(processes, directory, cases):
    """Run cases one after another on so many processes; what each ended with."""
    write_cases(directory, cases)
    ended = run_group(processes, train.main, directory)
    assert_all_succeeded(ended)
    return results_of(directory, cases)


def assert_all_succeeded(ended):
    """No process failed; else all exit codes (one that is -9 was killed because another failed) and what each said."""
    codes = [one.returncode for one in ended]
    said = [f"process {rank}, exit code {one.returncode}:\n{one.stderr[-8000:]}" for rank, one in enumerate(ended)]
    assert not any(codes), "\n".join([f"exit codes {codes}", *said])


def launch_failing(processes, directory, cases):
    """Run cases that fail: the exit codes of the processes, and their standard errors."""
    write_cases(directory, cases)
    ended = run_group(processes, train.main, directory)
    assert any(one.returncode for one in ended)
    return [one.returncode for one in ended], [one.stderr for one in ended]


def write_cases(directory, cases):
    for name in cases:
        (directory / name).mkdir(parents=True, exist_ok=True)
    (directory / "cases.json").write_text(json.dumps(cases))


def results_of(directory, cases):
    return {name: torch.load(directory / name / "result.pt", weights_only=True) for name in cases}


def assert_alike(first, second):
    """Trained alike to rounding."""
    torch.testing.assert_close(
        torch.tensor(first["penalties"]), torch.tensor(second["penalties"]), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(second["losses"]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(first["norms"]), torch.tensor(second["norms"]), rtol=1e-2, atol=1e-3)
    for name, weight in first["weights"].items():
        different = (weight - second["weights"][name]).abs() > 1e-3 * (1 + weight.abs())
        assert different.float().mean() < 0.01, name  # a mask may differ where two weights are all but equal


def assert_pruned_by_the_callback(directory, results, name):
    """Masks are in the checkpoints, and what goes on from one ends as what was never stopped, to the bit."""
    assert results[name]["sparsity"] == 0.5
    assert_saved_as_masked(directory / name, results[name])
    for step in (4, 8, 12):
        assert mask_files(directory / name / f"checkpoint-{step}")
    resumed = results[f"{name} resumed"]
    assert resumed["losses"] == results[name]["losses"]
    assert_same_to_the_bit(results[name], resumed)


def assert_best_was_loaded(directory, result):
    """The model is that of step 8: before, pruning had not ended, and later evaluations were worse."""
    assert result["best_step"] == 8
    for tensor, weight in torch.load(directory / "weights-8.pt", weights_only=True).items():
        assert torch.equal(result["weights"][tensor], weight)
    assert_saved_as_masked(directory, result)


def assert_same_masks_but_for_rounding(masks, others):
    """Exactly half of all weights are masked, and the same ones but for one in a thousand."""
    weights = sum(mask.numel() for mask in masks.values())
    for each in (masks, others):
        assert sum(int((~mask).sum()) for mask in each.values()) == weights // 2
    assert sum(int((mask != others[tensor]).sum()) for tensor, mask in masks.items()) <= weights / 1000


def launch_and_push(hub, client, processes, directory, cases):
    """Run cases that push to `somebody/NAME` of this Hub; what they ended with, and what the Hub then holds of each.

    Nobody but the first process, which alone has this token, sent anything.
    """
    pushing = {"push_to_hub": True, "hub_always_push": True} | SAVE
    cases = {
        name: {"model": "bert", "configs": [GLOBAL], "compare": False, "push": True}
        | case
        | {"arguments": pushing | {"hub_model_id": f"somebody/{name}"} | case.get("arguments", {})}
        for name, case in cases.items()
    }
    write_cases(directory, cases)
    push_from_group(client, processes, train.main, directory)
    assert set(hub.authorizations) == {f"Bearer {WRITE_TOKEN}"}
    return results_of(directory, cases), {name: hub.repos[f"somebody/{name}"] for name in cases}


def push_from_group(client, processes, target, *arguments):
    """Call a function in so many processes that form a group and know the Hub of the client."""
    store, environments = make_group(processes)
    call = partial(client.start, leave_group_after, target, *arguments, timeout=TIMEOUT, fast_retries=False)
    ended = [running.wait() for running in [call(env=environment) for environment in environments]]
    del store  # it serves until all have ended
    assert_all_succeeded(ended)


def assert_pushed_once(repo, result, folder):
    """The last push is one commit, of a model with the zeros of the masks and a card that says so."""
    assert [commit.summary for commit in repo.commits()].count("End of training") == 1
    assert repo.commits()[-1].summary == "End of training"
    files = repo.files()
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "run_record.json"):
        (folder / name).write_bytes(files[name])
    report = make_report(folder)
    masked = sum(int((~mask).sum()) for mask in result["masks"].values())
    assert sum(tensor.zeros for tensor in report.tensors if tensor.prunable) == masked
    assert report.prunable_sparsity == result["sparsity"] == 0.5
    card = files["README.md"].decode()
    assert "**50.00% of the prunable weights" in card
    assert "12 samples" in card


def assert_same_to_the_bit(first, second):
    for kind in ("weights", "masks"):
        assert first[kind].keys() == second[kind].keys()
        for tensor, value in first[kind].items():
            assert torch.equal(value, second[kind][tensor]), tensor


def assert_saved_as_masked(directory, result):
    """The model that was saved has the zeros of the masks, and no others."""
    masked = 0
    for tensor, mask in result["masks"].items():
        assert not result["weights"][tensor][~mask].any()
        assert result["weights"][tensor][mask].all()
        masked += int((~mask).sum())
    assert result["sparsity"] == masked / sum(mask.numel() for mask in result["masks"].values())
    report = make_report(directory / "saved")
    assert sum(tensor.zeros for tensor in report.tensors if tensor.prunable) == masked
