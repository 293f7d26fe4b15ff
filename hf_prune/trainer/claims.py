"""One training at a time in a folder: what must be so before it starts, and a lock that ends with its process."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..engines.processes import all_reduce
from ..errors import CheckpointError
from .checkpoints import UNFINISHED, is_checkpoint_name, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows, where folders are not locked: docs/checkpoints.md says so. Type checkers expect a module
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_LOCK_NAME = "training.lock"

# What this process has locked: its id, which a fork does not share, and the folder -> the thread.
_held: dict[tuple[int, Path], int] = {}


@contextlib.contextmanager
def claimed(directory: Path, writes: bool) -> Iterator[None]:
    """Keep other trainings out of a folder for checkpoints, and remove what a killed one left there.

    `writes`: whether this process is one that writes. Every process must call it, and each raises CheckpointError,
    before anything is changed, if the folder cannot be used or another training of hf-prune writes to it. What a thread
    has claimed it may claim again, inside.
    """
    lock: _Lock | None = None
    refused: CheckpointError | None = None
    if writes:
        try:
            _check_usable(directory)
            lock = _lock(Path(os.path.realpath(directory)))
        except CheckpointError as error:
            refused = error
    try:
        if int(all_reduce(torch.tensor([int(refused is not None)]))):
            raise refused or CheckpointError("output_dir", f"the process that writes to {directory} cannot use it")
        if writes:
            remove_leftovers(directory, everything=True)
        yield
    finally:
        if lock is not None:
            _release(lock)


def _check_usable(directory: Path) -> None:
    """Raise CheckpointError for a folder that checkpoints could not be written to."""
    problem = None
    if len(f"{directory}.".splitlines()) > 1 or "\0" in str(directory):
        problem = f"expected a path without line breaks, got {str(directory)!r}"
    elif directory.exists() and not directory.is_dir():
        problem = f"expected a folder, found a file at {directory}"
    for path in sorted(directory.iterdir()) if problem is None and directory.is_dir() else ():
        wanted = path.name == UNFINISHED or is_checkpoint_name(path.name)
        if wanted and (not path.is_dir() or (path.name == UNFINISHED and path.is_symlink())):
            found = f"a link to {path.readlink()}" if path.is_symlink() else "a file"
            problem = f"expected a folder at {path}, where checkpoints are written, found {found}; remove it"
            break
    if problem is not None:
        raise CheckpointError("output_dir", problem)


@dataclass(frozen=True)
class _Lock:
    """An open file in a folder that is locked while it is open."""

    file: int
    directory: Path


def _lock(directory: Path) -> _Lock | None:
    """Lock a folder; None if this thread has locked it already, or if its file system has no locks.

    Raises CheckpointError if another thread or process has locked it.
    """
    thread = _held.get((os.getpid(), directory))
    if thread == threading.get_ident() or fcntl is None:
        return None
    if thread is not None:
        raise _taken(directory, f"another thread of this process ({os.getpid()})")
    path = directory / UNFINISHED / _LOCK_NAME
    file: int | None = None
    try:
        while file is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the training that held it is just removing it
                file = _open_locked(path)
    except OSError as error:
        logger.warning("%s cannot be locked (%s): let no other run write to it.", directory, error.strerror)
        return None
    os.truncate(file, 0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}, since {since},".encode())
    _held[os.getpid(), directory] = threading.get_ident()
    return _Lock(file, directory)


def _open_locked(path: Path) -> int:
    """Open and lock a file. Raises CheckpointError if another process has locked it, and OSError.

    The OSError is FileNotFoundError if the file was removed before it was locked.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not shared by workers, which may live on
        if not os.path.samestat(os.fstat(file), path.stat()):
            raise FileNotFoundError(path)
    except (BlockingIOError, PermissionError) as error:
        holder = " ".join(os.read(file, 500).decode(errors="replace").split())
        os.close(file)
        raise _taken(path.parents[1], holder or "another process") from error
    except OSError:
        os.close(file)
        raise
    return file


def _taken(directory: Path, who: str) -> CheckpointError:
    return CheckpointError(
        "output_dir",
        f"expected a folder that no other run writes to, got {directory}, where {who} is training; give another "
        "output_dir",
    )


def _release(lock: _Lock) -> None:
    if _held.pop((os.getpid(), lock.directory), None) is None:
        return  # a fork of the process that holds it
    (lock.directory / UNFINISHED / _LOCK_NAME).unlink(missing_ok=True)
    os.close(lock.file)
    remove_leftovers(lock.directory)
