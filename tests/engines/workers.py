"""Processes that train together, kept for many tests: a task is sent to all of them, and what each returns comes back.

A task is the name of a function in `tasks.py` and its arguments; all processes run it at once, joined by gloo.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 120  # seconds that a task may take


class Workers:
    """A number of processes with one group; ends with the `with` block."""

    def __init__(self, processes):
        self.processes = processes

    def __enter__(self):
        self._folder = tempfile.TemporaryDirectory()
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
            "PYTHONWARNINGS": "default",
        }
        self._workers = []
        for rank in range(self.processes):
            arguments = [
                str(HERE / "workers.py"),
                str(rank),
                str(self.processes),
                str(Path(self._folder.name, "store")),
            ]
            with Path(self._folder.name, f"log{rank}").open("wb") as log:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
                self._workers.append(subprocess.Popen([sys.executable, *arguments], env=environment, **pipes))
        return self

    def __exit__(self, *exception):
        for worker in self._workers:
            worker.kill()
            worker.communicate()
        self._folder.cleanup()

    def run(self, task, arguments_of_each):
        """What the task returned on each process, from the arguments of each. The first error is raised here."""
        for worker, arguments in zip(self._workers, arguments_of_each, strict=True):
            pickle.dump((task, arguments), worker.stdin)
            worker.stdin.flush()
        answers = [self._answer(rank) for rank in range(self.processes)]
        failed = next((error for ok, error in answers if not ok), None)
        if failed is not None:
            raise AssertionError(failed)
        return [answer for _, answer in answers]

    def _answer(self, rank):
        try:
            return pickle.load(self._workers[rank].stdout)
        except EOFError:
            log = Path(self._folder.name, f"log{rank}").read_text(errors="replace")
            return False, f"process {rank} ended: {log[-4000:]}"


def main(rank, processes, store):
    import datetime

    import torch.distributed

    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what is printed is no answer
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=processes,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    import tasks

    while True:
        try:
            task, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            os._exit(0)  # as train_replicated.py, and for its reason
        try:
            answer = True, getattr(tasks, task)(*arguments)
        except Exception:  # noqa: BLE001, the error goes to the test
            answer = False, f"process {rank}: {traceback.format_exc()}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
