"""Processes that train one model together: what each holds of a tensor, and the few collectives that pruning needs.

The only file that imports `torch.distributed`. All collectives are on the group of all processes, so every process must
make the same calls in the same order.
"""

from collections.abc import Sequence

import torch.distributed.checkpoint


def processes() -> int:
    """How many processes train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


# ---- Collectives ----


def all_reduce(counts: torch.Tensor) -> torch.Tensor:
    """The sum of the counts (int64), or of other numbers, of all processes, the same on each."""
    if processes() == 1:
        return counts
    summed = counts.to(_device(), copy=True)
    torch.distributed.all_reduce(summed)
    return summed.to(counts.device)


def gather(values: torch.Tensor) -> list[torch.Tensor]:
    """The values (of one shape everywhere) of every process, in the order of ranks."""
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


def wait_for_all() -> None:
    """Return when every process has come here."""
    if processes() > 1:
        all_reduce(torch.zeros(1, dtype=torch.int64))


def _device() -> torch.device:
    """Where tensors must be that go over the wire."""
    if "gloo" in torch.distributed.get_backend():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    return (
        torch.device("cpu")
        if accelerator is None
        else torch.device(accelerator.type, torch.accelerator.current_device_index())
    )
