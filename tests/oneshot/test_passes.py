"""Functions in threads of their own that run one at a time, also when a program is interrupted meanwhile."""

import signal
import threading
import time

import pytest
import torch

from hf_prune.oneshot.passes import Pass


def test_passes_run_in_turns_and_their_operations_in_the_thread_that_lets_them():
    said, threads = [], set()

    def make(name):
        def work():
            for step in range(3):
                said.append((name, step))
                threads.add(threading.current_thread())
                torch.ones(3) + 1
                passes[name].pause()
            return name

        return Pass(work)

    passes = {name: make(name) for name in "ab"}
    while not all(one.is_done for one in passes.values()):
        for one in passes.values():
            one.go()
    assert said == [(name, step) for step in range(3) for name in "ab"]
    assert [one.result for one in passes.values()] == ["a", "b"]
    assert len(threads) == 2
    for one in passes.values():
        one.end()
        one.end()


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals that come after a while are those of POSIX")
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pass_that_was_interrupted_while_it_ran_can_be_ended():
    reached = []

    def work():
        time.sleep(0.5)
        reached.append("pause")
        interrupted.pause()
        reached.append("never")

    def interrupt(number, frame):
        raise KeyboardInterrupt

    interrupted = Pass(work)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(KeyboardInterrupt):
            interrupted.go()
    finally:
        signal.signal(signal.SIGALRM, before)
    interrupted.end()
    assert reached == ["pause"]
    assert not interrupted._thread.is_alive()
