"""Which devices torch can compute on here."""

import torch

from ..errors import first_line


def why_not_device(device: str) -> str | None:
    """Why torch cannot compute on a device here, in its own words where it has some; None where it can."""
    try:
        is_meta = torch.empty(1, device=device).is_meta
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # torch raises all of them
        return f"expected a device that torch can use here, such as cpu, got {device!r}: {first_line(error)}"
    return f"expected a device that can compute, such as cpu, got {device!r}" if is_meta else None
