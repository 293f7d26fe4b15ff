"""Processes forked from one that has imported what tests need: a start takes a moment, and not six seconds.

That one is the fork server of `multiprocessing`, one for each process of pytest. It imports `forked_imports` first,
finds the modules of the tests by PYTHONPATH, and has the environment that pytest had when the first process began.
"""

import faulthandler
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic

import pytest
import torch.distributed

TESTS = Path(__file__).parent
TIMEOUT = 580  # seconds that processes may take

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["forked_imports"])


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


def start(target, *arguments, **keywords):
    """A process that calls a function of a module that it can import."""
    process = forked.Process(target=target, args=arguments, kwargs=keywords)
    with import_path():
        process.start()
    return process


@contextmanager
def import_path():
    """Processes that are started here find the modules of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        path = [str(TESTS), str(TESTS / "engines"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(path))
        yield


def exit_codes(processes, timeout=TIMEOUT):
    """How processes ended. When one fails the others are killed, for they would wait for it."""
    running, end = list(processes), monotonic() + timeout
    try:
        while running and not any(process.exitcode for process in processes):
            if not wait([process.sentinel for process in running], end - monotonic()):
                pytest.fail(f"not ended after {timeout} s")
            running = [process for process in running if process.exitcode is None]
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def run_script(path, *arguments, timeout=TIMEOUT):
    """What `python PATH ARGUMENTS` comes to."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(_run_script, str(path), list(map(str, arguments)), os.getcwd(), folder)
        [returncode] = exit_codes([process], timeout)
        stdout, stderr = (Path(folder, name).read_text(errors="replace") for name in ("stdout", "stderr"))
    return Ended(returncode, stdout, stderr)


def _run_script(path, arguments, directory, folder):
    redirect(folder)
    os.chdir(directory)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def make_group(processes):
    """The store by which so many processes find each other, and the environment that torchrun would give to each."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_all = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    return store, [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run_group(processes, target, *arguments, timeout=TIMEOUT):
    """Call a function in so many processes that form a group, as torchrun would; how each of them ended.

    When one of them crashes, all are started once more: rarely, on a busy machine, gloo's own thread in torch 2.13
    (`pt_gloo_runloop`) reads memory that is no longer there. Python code alone does not end in a segmentation fault.
    """
    ended = _run_group(processes, target, arguments, timeout)
    if any(one.returncode == -signal.SIGSEGV for one in ended):
        print("A process crashed; all are started again.", *(one.stderr[-2000:] for one in ended), file=sys.__stderr__)
        ended = _run_group(processes, target, arguments, timeout)
    return ended


def _run_group(processes, target, arguments, timeout):
    store, environments = make_group(processes)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder, str(rank)) for rank in range(processes)]
        group = []
        for its_folder, environment in zip(folders, environments, strict=True):
            its_folder.mkdir()
            group.append(start(_run_in_group, target, arguments, environment, str(its_folder)))
        codes = exit_codes(group, timeout)
        texts = [[(its / name).read_text(errors="replace") for name in ("stdout", "stderr")] for its in folders]
    del store  # it serves until all have ended
    return [Ended(code, *text) for code, text in zip(codes, texts, strict=True)]


def _run_in_group(target, arguments, environment, folder):
    redirect(folder)
    os.environ.update(environment)
    leave_group_after(target, *arguments)


def leave_group_after(target, *arguments):
    """Call a function in a process of a group, and end the process."""
    target(*arguments)
    sys.stdout.flush()
    # Without taking the process group down: torch 2.13 joins gloo's thread with the interpreter's lock held, and that
    # thread, about to free a tensor, may be waiting for the lock. One run in three then never ended.
    os._exit(0)


def redirect(folder):
    """Standard output and error to files, at the level of descriptors."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        with Path(folder, name).open("wb") as file:
            os.dup2(file.fileno(), number)
    faulthandler.enable()  # a crash in a library says where, and not only in an exit code
