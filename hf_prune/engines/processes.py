"""Processes that train one model together: their number, this one's rank, and the collectives that pruning needs.

All collectives use the group of all processes, so every process must make the same calls in the same order.
"""

from collections.abc import Sequence

import torch.distributed.checkpoint


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


def text_of_first(text: str) -> str:
    """The text of the first process, on every process."""
    if processes() == 1:
        return text
    content = text.encode() if rank() == 0 else b""
    size = int(all_reduce(torch.tensor(len(content))))
    values = torch.tensor(list(content.ljust(size, b"\0")), dtype=torch.int64)
    return bytes(all_reduce(values).tolist()).decode()


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
