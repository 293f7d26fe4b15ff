"""Processes that train one model together: their number, this one's rank, and the collectives that pruning needs.

All collectives use the group of all processes, so every process must make the same calls in the same order.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch.distributed.checkpoint

from ..errors import HfPruneError, OtherProcessError


def processes() -> int:
    """The number of processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """The rank of this process, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


# ---- Collectives ----


def all_reduce(counts: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of counts (int64) or other numbers; equal on every process."""
    if processes() == 1:
        return counts
    summed = counts.to(_device(), copy=True)
    torch.distributed.all_reduce(summed)
    return summed.to(counts.device)


def of_first_process(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The first process's numbers, as processors may differ in the last bits of what they compute."""
    return [all_reduce(tensor if rank() == 0 else torch.zeros_like(tensor)) for tensor in tensors]


def gather(values: torch.Tensor) -> list[torch.Tensor]:
    """The values of every process, of equal shape everywhere, in the order of ranks."""
    if processes() == 1:
        return [values]
    sent = values.to(_device())
    received = [torch.empty_like(sent) for _ in range(processes())]
    torch.distributed.all_gather(received, sent)
    return [one.to(values.device) for one in received]


def exchange(rows: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, list[int]]:
    """Send the first `sizes[0]` rows to process 0, the next to process 1, and so on.

    Returns the rows that were sent here, in the order of ranks, and how many came from each.
    """
    if processes() == 1:
        return rows, list(sizes)
    expected = torch.empty(len(sizes), dtype=torch.int64, device=_device())
    torch.distributed.all_to_all_single(expected, torch.tensor(sizes, dtype=torch.int64, device=_device()))
    came = expected.tolist()
    received = torch.empty((sum(came), *rows.shape[1:]), dtype=rows.dtype, device=_device())
    torch.distributed.all_to_all_single(received, rows.to(_device()).contiguous(), came, list(sizes))
    return received.to(rows.device), came


def text_of(process: int, text: str) -> str:
    """The text of the process of this rank, on every process."""
    if processes() == 1:
        return text
    content = text.encode() if rank() == process else b""
    size = int(all_reduce(torch.tensor(len(content))))
    values = torch.tensor(list(content.ljust(size, b"\0")), dtype=torch.int64)
    return bytes(all_reduce(values).tolist()).decode()


@contextmanager
def raised_by_all() -> Iterator[None]:
    """What one process raises inside, all raise at the end, so that none waits for one that has failed.

    Every process must enter it, and inside call no collectives. Each raises its own error; those without one raise the
    error of the first process that has one: of the same class if it is one of ours, else OtherProcessError.
    """
    if processes() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # noqa: BLE001, raised again below
        error = raised
    failed = [bool(flag) for flag in gather(torch.tensor([int(error is not None)]))]
    if not any(failed):
        return
    told = text_of(failed.index(True), _as_text(error) if error is not None else "")
    raise error if error is not None else _told_error(told, failed.index(True))


def _as_text(error: Exception) -> str:
    kind = type(error).__name__
    ours = {"problems": error.problems, "places": error.places} if isinstance(error, HfPruneError) else {}
    return json.dumps({"kind": kind, "message": str(error), **ours})


def _told_error(text: str, process: int) -> HfPruneError:
    content = json.loads(text)
    kinds = {kind.__name__: kind for kind in HfPruneError.__subclasses__()}
    if "problems" not in content or content["kind"] not in kinds:
        return OtherProcessError(f"process {process} failed with {content['kind']}: {content['message']}")
    problems = [(key, message) for key, message in content["problems"]]
    return kinds[content["kind"]](problems=problems, at=content["places"])


def wait_for_all() -> None:
    """Return when every process has called this."""
    if processes() > 1:
        all_reduce(torch.zeros(1, dtype=torch.int64))


def _device() -> torch.device:
    """The device on which the backend needs tensors."""
    if "gloo" in torch.distributed.get_backend():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return (
        torch.device("cpu")
        if accelerator is None
        else torch.device(accelerator.type, torch.accelerator.current_device_index())
    )
