"""Which devices torch can compute on here."""

import torch

from ..errors import first_line


def why_not_name(device: str) -> str | None:
    """Why this is no name of a device that computes, on any machine; None where it is."""
    try:
        is_meta = torch.device(device).type == "meta"
    except RuntimeError as error:
        return f"expected a device of torch, such as cuda, got {device!r}: {first_line(error)}"
    return f"expected a device that can compute, such as cpu, got {device!r}" if is_meta else None


def why_not_device(device: str) -> str | None:
    """Why torch cannot compute on a device here, in its own words where it has some; None where it can."""
    problem = why_not_name(device)
    if problem is not None:
        return problem
    try:
        torch.empty(1, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch raises all of them
        return f"expected a device that torch can use here, such as cpu, got {device!r}: {first_line(error)}"
    return None
