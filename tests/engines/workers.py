"""Processes that train together, kept for many tests: a task is sent to all of them, and what each returns comes back.

A task is the name of a function in `tasks.py` and its arguments; all processes run it at once, joined by gloo.
"""

import datetime
import os
import pickle
import tempfile
import traceback
from pathlib import Path

import tasks
import torch.distributed
from forks import forked, redirect, start

TIMEOUT = 120  # seconds that a task may take


class Workers:
    """A number of processes with one group; ends with the `with` block."""

    def __init__(self, processes):
        self.processes = processes

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._workers, self._pipes = [], []
        for rank in range(self.processes):
            ours, theirs = forked.Pipe()
            Path(self._folder.name, str(rank)).mkdir()
            self._workers.append(start(work, rank, self.processes, self._folder.name, theirs))
            self._pipes.append(ours)
            theirs.close()
        return self

    def __exit__(self, *exception):
        for worker, pipe in zip(self._workers, self._pipes, strict=True):
            worker.kill()
            worker.join()
            pipe.close()
        self._folder.cleanup()

    def run(self, task, arguments_of_each):
        """What the task returned on each process, from the arguments of each. The first error is raised here."""
        for pipe, arguments in zip(self._pipes, arguments_of_each, strict=True):
            pipe.send_bytes(pickle.dumps((task, arguments)))
        answers = [self._answer(rank) for rank in range(self.processes)]
        failed = next((error for ok, error in answers if not ok), None)
        if failed is not None:
            raise AssertionError(failed)
        return [answer for _, answer in answers]

    def _answer(self, rank):
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            log = Path(self._folder.name, str(rank), "stderr").read_text(errors="replace")
            return False, f"process {rank} ended: {log[-4000:]}"


def work(rank, processes, folder, pipe):
    redirect(Path(folder, str(rank)))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            task, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)  # as in forks.py, and for its reason
        try:
            answer = True, getattr(tasks, task)(*arguments)
        except Exception:  # noqa: BLE001, the error goes to the test
            answer = False, f"process {rank}: {traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))
