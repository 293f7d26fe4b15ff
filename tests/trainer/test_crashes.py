import random
import signal
import time
from functools import partial

import forks
import pytest
import torch
from crash_runs import train

from hf_prune.trainer.checkpoints import UNFINISHED, is_complete

TIMEOUT = 120
start = partial(forks.start, train)

# Files of a checkpoint that training can go on from.
FILES = {
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "training_args.bin",
    "pruning_config.json",
    "pruning_masks.safetensors",
    "pruning_state.json",
}


def exit_code(process):
    process.join(TIMEOUT)
    assert process.exitcode is not None, "the run did not end"
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    directory = tmp_path_factory.mktemp("whole")
    assert exit_code(start(directory)) == 0
    return torch.load(directory / "result.pt")


def visible_checkpoints(directory):
    return sorted((directory / "out").glob("checkpoint-*"))


def assert_complete(checkpoints):
    for checkpoint in checkpoints:
        assert {path.name for path in checkpoint.iterdir()} >= FILES, checkpoint
        assert is_complete(checkpoint)


def assert_equal_ends(directory, whole):
    ended = torch.load(directory / "result.pt")
    assert ended["steps"] == whole["steps"]
    for part in ("weights", "masks"):
        assert ended[part].keys() == whole[part].keys()
        assert all(torch.equal(ended[part][name], tensor) for name, tensor in whole[part].items()), part
    for index, state in whole["optimizer"].items():
        assert all(torch.equal(ended["optimizer"][index][name], value) for name, value in state.items())


def resume_and_compare(directory, whole):
    checkpoints = visible_checkpoints(directory)
    assert_complete(checkpoints)
    assert exit_code(start(directory, resume=bool(checkpoints))) == 0
    assert_equal_ends(directory, whole)
    assert not (directory / "out" / UNFINISHED).exists()


# Eighteen moments, evenly over all that a run does to its files once the first checkpoint is there.
@pytest.mark.parametrize("share", [index / 18 for index in range(18)])
def test_a_run_killed_at_any_moment_of_saving_goes_on_bit_for_bit(share, whole, tmp_path):
    first = whole["events"] // 4 + 1
    kill_at = first + int(share * (whole["events"] - first))
    assert exit_code(start(tmp_path, kill_at=kill_at)) == -signal.SIGKILL
    assert visible_checkpoints(tmp_path), "the run was killed before there was a checkpoint"
    resume_and_compare(tmp_path, whole)


def test_a_run_killed_while_it_saves_its_first_checkpoint_starts_anew(whole, tmp_path):
    assert exit_code(start(tmp_path, kill_at=5)) == -signal.SIGKILL
    assert visible_checkpoints(tmp_path) == []
    resume_and_compare(tmp_path, whole)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_a_random_time_goes_on_bit_for_bit(seed, whole, tmp_path):
    process = start(tmp_path)
    deadline = time.monotonic() + TIMEOUT
    while not visible_checkpoints(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    process.kill()
    assert exit_code(process) in (-signal.SIGKILL, 0)
    resume_and_compare(tmp_path, whole)


@pytest.mark.parametrize("step", [3, 10])
def test_a_run_that_is_asked_to_stop_saves_a_whole_step_and_goes_on_bit_for_bit(step, tmp_path):
    arguments = {"max_steps": 60, "save_steps": 1000, "enable_jit_checkpoint": True, "save_total_limit": None}
    assert exit_code(start(tmp_path / "whole", **arguments)) == 0
    directory = tmp_path / "stopped"
    assert exit_code(start(directory, sigterm_at=step, **arguments)) == 0
    stopped = torch.load(directory / "result.pt")["steps"]
    assert step < stopped < 60
    assert [path.name for path in visible_checkpoints(directory)] == [f"checkpoint-{stopped}"]
    assert_complete(visible_checkpoints(directory))
    assert exit_code(start(directory, resume=True, **arguments)) == 0
    assert_equal_ends(directory, torch.load(tmp_path / "whole" / "result.pt"))
