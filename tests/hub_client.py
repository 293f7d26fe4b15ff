"""The genuine client in processes of its own, whose environment is right before huggingface_hub is imported.

Run as a script, this is a server that has imported hf_prune and forks a process for each call. It has no threads.
"""

import atexit
import gc
import importlib
import io
import json
import os
import pickle
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ENGINES = str(Path(__file__).parent / "engines")  # where functions of groups of processes are
START_TIMEOUT = 120
SHORT_WAIT = 0.01


@dataclass(frozen=True)
class Completed:
    returncode: int
    stdout: str
    stderr: str


class Running:
    """A call under way in the process `pid`, which leads a process group of its own."""

    def __init__(self, connection: socket.socket, folder: Path, timeout: float):
        self.connection, self.folder, self.timeout = connection, folder, timeout
        self.replies = connection.makefile("r")
        self.pid = json.loads(self.replies.readline())["pid"]

    def wait(self) -> Completed:
        try:
            self.connection.settimeout(self.timeout)
            returncode = json.loads(self.replies.readline())["returncode"]
        except TimeoutError:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(
                f"not done after {self.timeout} s\n{self.printed('stdout')}\n{self.printed('stderr')}"
            ) from None
        finally:
            self.replies.close()
            self.connection.close()
        return Completed(returncode, self.printed("stdout"), self.printed("stderr"))

    def printed(self, stream: str) -> str:
        return (self.folder / stream).read_bytes().decode(errors="replace")


class HubClient:
    """`with HubClient(server.url, token) as client`: calls start with hf_prune imported, and share an HF_HOME."""

    def __init__(self, server_url: str, token: str | None = None, *, xet: bool = False, fast_retries: bool = True):
        self.token, self.xet, self.fast_retries = token, xet, fast_retries
        self.folder = Path(tempfile.mkdtemp(prefix="hub_client_"))
        self.home = self.folder / "home"
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))
        }
        environment |= {
            "PYTHONPATH": os.pathsep.join([ENGINES, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_ENDPOINT": server_url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if not xet:
            environment["HF_HUB_DISABLE_XET"] = "1"
        elif fast_retries:
            environment["HF_XET_CLIENT_RETRY_BASE_DELAY"] = "10ms"
        self.log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(self.folder / "socket")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        what: Callable | str,
        *arguments,
        token: str | bool | None = None,
        cwd: str | Path | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 120,
        fast_retries: bool | None = None,
    ) -> Running:
        """Begin a call of a function (`"module:name"` or one that can be pickled) or of a module as `python -m` does.

        `token` is this client's own unless given; False is none at all.
        """
        token = self.token if token is None else token
        call = {
            "call": pickle.dumps((what, arguments)),
            "folder": tempfile.mkdtemp(dir=self.folder),
            "cwd": str(cwd or os.getcwd()),
            "environment": ({"HF_TOKEN": token} if token else {}) | (env or {}),
            "fast_retries": self.fast_retries if fast_retries is None else fast_retries,
        }
        for stream in ("stdout", "stderr"):
            Path(call["folder"], stream).touch()
        connection = self._connect()
        connection.sendall(pickle.dumps(call))
        connection.shutdown(socket.SHUT_WR)
        return Running(connection, Path(call["folder"]), timeout)

    def run(self, what: Callable | str, *arguments, **options) -> Completed:
        return self.start(what, *arguments, **options).wait()

    def cli(self, *arguments, **options) -> Completed:
        """`hf-prune` with these arguments: the function that the console script calls."""
        return self.run("hub_client:console_script", *map(str, arguments), **options)

    def start_cli(self, *arguments, **options) -> Running:
        return self.start("hub_client:console_script", *map(str, arguments), **options)

    def python(self, source: str, *arguments, **options) -> Completed:
        """A Python program, with `arguments` as sys.argv[1:]."""
        return self.run("hub_client:program", source, *map(str, arguments), **options)

    def clear_cache(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)

    def _connect(self) -> socket.socket:
        end = time.monotonic() + START_TIMEOUT
        while True:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(str(self.folder / "socket"))
            except OSError:
                connection.close()
                if self.process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.02)
            else:
                return connection


# What runs in the processes


def console_script(*arguments):
    sys.argv = ["hf-prune", *arguments]
    from hf_prune.cli.commands import main

    main()


def program(source, *arguments):
    sys.argv = ["-c", *arguments]
    exec(compile(source, "<program>", "exec"), {"__name__": "__main__"})


def serve(path: str) -> None:
    """Fork for every connection until standard input ends."""
    importlib.import_module("forked_imports")  # before the fork, so that each call finds them there
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(16)
    gc.freeze()
    os.rename(f"{path}.new", path)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [], 1)
        if sys.stdin in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                supervise(connection)
            connection.close()
        reap()


def reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def supervise(connection: socket.socket) -> None:
    """Say on the connection which process works, and how it ended."""
    call = connection.makefile("rb").read()
    pid = os.fork()
    if pid == 0:
        connection.close()
        leave(ended(work, pickle.loads(call)))
    connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")
    returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        connection.sendall(json.dumps({"returncode": returncode}).encode() + b"\n")
    finally:
        os._exit(0)


def work(call, folder, cwd, environment, fast_retries) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    redirect(Path(folder))
    os.chdir(cwd)
    os.environ.update(environment)
    if fast_retries:
        time.sleep = shortened(time.sleep)
    what, arguments = pickle.loads(call)
    if isinstance(what, str) and ":" not in what:
        sys.argv = [what, *map(str, arguments)]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif isinstance(what, str):
        module, name = what.split(":")
        getattr(importlib.import_module(module), name)(*arguments)
    else:
        what(*arguments)


def ended(function, options) -> int:
    """The exit code that Python itself would end with, and on standard error what it would say."""
    try:
        function(**options)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:  # noqa: BLE001  # as the interpreter ends: a traceback, and an exit code
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def leave(code: int) -> None:
    """End as Python does, but without taking down the interpreter, which takes two seconds with torch in it."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def redirect(folder: Path) -> None:
    """Standard streams to files, at the level of descriptors."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open("/dev/null" if number == 0 else folder / name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))


def shortened(sleep):
    return lambda seconds: sleep(min(seconds, SHORT_WAIT))


if __name__ == "__main__":
    serve(sys.argv[1])
