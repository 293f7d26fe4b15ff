"""What one process raises, all raise: none waits for one that has failed."""

import pytest
import train_structures
from forks import run_group
from workers import Workers


@pytest.fixture(scope="module")
def workers():
    with Workers(2) as workers:
        yield workers


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "own", "told"),
    [
        ("PruningConfigError", "here: sparsity: expected ü, got 2", None),
        ("ValueError", "too wide", ("OtherProcessError", "process {rank} failed with ValueError: too wide")),
    ],
)
def test_all_raise_what_one_has_raised(workers, rank, kind, own, told):
    raised = (kind, own)
    told = (told[0], told[1].format(rank=rank)) if told is not None else raised
    assert workers.run("raised_by_one", [(rank, kind)] * 2) == ([raised, told] if rank == 0 else [told, raised])


def test_nothing_is_raised_where_nothing_was(workers):
    assert workers.run("raised_by_one", [(None, "")] * 2) == [None, None]


def test_each_raises_its_own_error_where_several_have_one(workers):
    found = workers.run("raised_by_one", [(0, "ValueError"), (1, "PruningConfigError")])
    assert [name for name, _ in found] == ["ValueError", "PruningConfigError"]


def test_a_search_that_fails_on_the_first_process_ends_on_all(workers):
    found = workers.run("failing_search", [(), ()])
    assert found == [("OSError", "no more room"), ("OtherProcessError", "process 0 failed with OSError: no more room")]


@pytest.mark.slow
def test_a_smaller_model_that_would_not_open_is_refused_on_all(tmp_path):
    ended = run_group(2, train_structures.refused_save, tmp_path)
    assert [one.returncode for one in ended] == [0, 0], "\n".join(one.stderr[-3000:] for one in ended)
    told = [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert "the smaller model would not open" in told[0]
