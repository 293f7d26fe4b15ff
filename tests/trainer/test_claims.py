"""One training at a time in an output_dir, and nothing of anyone else's is deleted there."""

import logging
import re
import subprocess
import sys
import threading

import pytest
from test_checkpoints import CONFIG, SAVE, checkpoints_in
from test_trainer import pruning_trainer
from transformers import TrainerCallback

from hf_prune.errors import CheckpointError
from hf_prune.trainer.checkpoints import UNFINISHED, is_complete, remove
from hf_prune.trainer.claims import claimed

# A process that holds the lock of a training, as one without torch starts at once.
HOLD = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b"process 7 on ada, since noon,")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def other_process(tmp_path):
    """Another process that trains into `tmp_path`, and half a checkpoint that it writes."""
    half = tmp_path / UNFINISHED / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    lock = tmp_path / UNFINISHED / "training.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_training_is_refused_while_the_first_lives_and_not_after_it_was_killed(tmp_path, other_process):
    trainer = pruning_trainer(tmp_path, CONFIG, **SAVE)
    expected = (
        f"output_dir: expected a folder that no other run writes to, got {tmp_path}, where process 7 on ada, "
        "since noon, is training; give another output_dir"
    )
    with pytest.raises(CheckpointError, match=f"^{re.escape(expected)}$"):
        trainer.train()
    assert (tmp_path / UNFINISHED / "checkpoint-2" / "model.safetensors").read_bytes() == b"half"
    assert checkpoints_in(tmp_path) == []
    other_process.kill()
    other_process.wait()
    trainer.train()
    assert checkpoints_in(tmp_path) == [2, 4, 6, 8, 10]
    assert not (tmp_path / UNFINISHED).exists()


def test_a_second_training_of_another_thread_is_refused_and_the_first_is_whole(tmp_path):
    second = pruning_trainer(tmp_path, CONFIG, **SAVE)
    refused = []

    def train():
        try:
            second.train()
        except CheckpointError as error:
            refused.append(str(error))

    class Start(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (2, 5):
                thread = threading.Thread(target=train)
                thread.start()
                thread.join()

    trainer = pruning_trainer(tmp_path, CONFIG, **SAVE)
    trainer.add_callback(Start())
    trainer.train()
    assert [f"got {tmp_path}, where another thread of this process" in error for error in refused] == [True, True]
    assert checkpoints_in(tmp_path) == [2, 4, 6, 8, 10]
    assert all(is_complete(tmp_path / f"checkpoint-{step}") for step in checkpoints_in(tmp_path))


def test_trainings_one_after_another_are_no_obstacle_to_each_other_even_if_one_fails(tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    trainer = pruning_trainer(tmp_path, CONFIG, **SAVE)
    callback = Fail()
    trainer.add_callback(callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / UNFINISHED).exists()
    trainer.remove_callback(callback)
    trainer.train()
    assert checkpoints_in(tmp_path) == [2, 4, 6, 8, 10]


def test_a_claim_inside_a_claim_is_part_of_it_under_any_name_of_the_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    with claimed(tmp_path, writes=True):
        with claimed(tmp_path / "link", writes=True):
            assert (tmp_path / UNFINISHED / "training.lock").exists()
        assert (tmp_path / UNFINISHED / "training.lock").exists()
    assert not (tmp_path / UNFINISHED).exists()


def test_a_folder_of_the_users_own_is_left_alone_with_what_is_in_it(tmp_path):
    mine = tmp_path / UNFINISHED / "poems" / "checkpoint-2"
    mine.mkdir(parents=True)
    (tmp_path / UNFINISHED / "notes.txt").write_text("mine")
    pruning_trainer(tmp_path, CONFIG, **SAVE, save_total_limit=1).train()
    assert mine.is_dir()
    assert (tmp_path / UNFINISHED / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / UNFINISHED).iterdir()) == ["notes.txt", "poems"]
    assert checkpoints_in(tmp_path) == [10]


@pytest.mark.parametrize(
    ("name", "words"),
    [("checkpoint-4", "found a link to"), ("checkpoint-4", "found a file"), (UNFINISHED, "found a file")],
)
def test_what_lies_where_checkpoints_go_is_an_error_before_training(tmp_path, name, words):
    trainer = pruning_trainer(tmp_path, CONFIG, **SAVE)
    if "link" in words:
        (tmp_path / name).symlink_to(tmp_path / "nowhere", target_is_directory=True)
    else:
        (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"output_dir: expected a folder at {tmp_path / name}, .*{words}"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_line_break_in_output_dir_is_an_error_before_training(tmp_path):
    trainer = pruning_trainer(f"{tmp_path}/a\nb", CONFIG, **SAVE)
    with pytest.raises(CheckpointError, match=r"output_dir: expected a path without line breaks, got '.*a\\nb'"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert list((tmp_path / "a\nb").iterdir()) == []


def test_of_a_checkpoint_that_is_a_link_the_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    remove(tmp_path / "checkpoint-2")
    assert (tmp_path / "elsewhere" / "file").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_where_a_folder_cannot_be_locked_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def no_locks(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("hf_prune.trainer.claims.fcntl.lockf", no_locks)
    with caplog.at_level(logging.WARNING, "hf_prune"), claimed(tmp_path, writes=True):
        pass
    assert f"{tmp_path} cannot be locked (No locks available): let no other run write to it." in caplog.text
