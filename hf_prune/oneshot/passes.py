"""Forward passes in threads of their own, which run one at a time and can be paused anywhere in between.

What they compute is computed in the thread that lets them run. Libraries for matrix products keep buffers for each
thread that calls them (some megabytes on CPUs, and on accelerators the workspaces of their handles), and the C library
keeps what a thread has freed for this thread: with hundreds of paused passes, that may be as much as what they hold."""

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..foreign.torch import dispatch_state, with_dispatch_state


class Pass:
    """A function in a thread of its own. It runs only while `go` waits for it, until it pauses or returns.

    Its operations on tensors are computed in the thread that calls `go`. Gradients are off in them. The number of
    threads for operations, the current accelerator, and context variables are those of the thread that makes the pass.
    At most one pass runs at a time.

    Args:
        work: what is run.
        contexts: make the contexts that it runs in, such as autocast, which belong to one thread.
    """

    def __init__(self, work: Callable[[], Any], contexts: Sequence[Callable[[], AbstractContextManager[Any]]] = ()):
        self._work: Callable[[], Any] | None = work
        self._contexts = contexts
        self._operation_threads = torch.get_num_threads()
        self._accelerator = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        # Locked until the other side releases them: a semaphore of Python's takes several times as long.
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._is_ending = False
        self._asked: _Operation | None = None
        self._error: BaseException | None = None
        self.result: Any = None
        self.is_done = False
        context = contextvars.copy_context()
        # A daemon: a program that ends with a stream half way must not wait for threads that wait for it.
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True, name="hf_prune pass")

    def go(self) -> None:
        """Run until the next pause or the end. Raises what the work raises."""
        if self._thread.ident is None:
            self._thread.start()
        self._turn.release()
        self._back.acquire()
        while self._asked is not None:
            self._asked.compute()
            self._asked = None
            self._turn.release()
            self._back.acquire()
        if self.is_done:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Called by the work: wait for the next `go`.

        Raises GeneratorExit if there will be none, as in a generator that is closed: no `Exception`, so that no model's
        code takes it for one of its own.
        """
        self._back.release()
        self._turn.acquire()
        if self._is_ending:
            raise GeneratorExit

    def call(self, function: Callable[[], Any]) -> Any:
        """Called by the work: let `go` call a function, outside the contexts of the work. Returns what it does."""
        return self.ask(_Operation(function))

    def ask(self, operation: "_Operation") -> Any:
        """Called by the work: let `go` compute an operation. Returns or raises what it does."""
        if not self._is_ending:  # else nobody waits, and this is what the work does at its end
            self._asked = operation
            self.pause()
        else:
            operation.compute()
        return operation.outcome()

    def end(self) -> None:
        """End the pass where it is, and wait until its thread has ended."""
        self._is_ending = True
        if self._thread.is_alive():
            _open(self._turn)
            self._thread.join()
        self._work, self.is_done = None, True

    def _run(self) -> None:
        self._turn.acquire()
        try:
            if not self._is_ending and self._work is not None:
                self.result = self._compute(self._work)
        except BaseException as error:  # noqa: BLE001 - raised in the thread that called `go`
            self._error = None if self._is_ending else error
        finally:
            self._work, self.is_done = None, True
            _open(self._back)

    def _compute(self, work: Callable[[], Any]) -> Any:
        torch.set_num_threads(self._operation_threads)
        if self._accelerator is not None:
            torch.accelerator.set_device_index(self._accelerator)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(_Asking(self))
            for context in self._contexts:
                stack.enter_context(context())
            return work()


def _open(lock: threading.Lock) -> None:
    """Release a lock that nobody else will, unless it is released: `go` was interrupted, and so nobody waits for it."""
    if lock.locked():
        lock.release()


class _Operation:
    """A function, for another thread to call; one on tensors with the state of the thread that asks."""

    def __init__(self, function: Callable[[], Any], state: Any = None):
        self._function = function
        self._state = state
        self._result: Any = None
        self._error: Exception | None = None

    def compute(self) -> None:
        function = self._function
        del self._function
        try:
            with torch.no_grad(), nullcontext() if self._state is None else with_dispatch_state(self._state):
                self._result = function()
        except Exception as error:  # noqa: BLE001 - raised in the thread that asked
            self._error = error

    def outcome(self) -> Any:
        if self._error is not None:
            raise self._error
        return self._result


class _Asking(TorchDispatchMode):
    def __init__(self, asking: Pass):
        super().__init__()
        self._pass = asking

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view:  # nothing to compute
            return func(*args, **(kwargs or {}))
        return self._pass.ask(_Operation(partial(func, *args, **(kwargs or {})), dispatch_state()))
