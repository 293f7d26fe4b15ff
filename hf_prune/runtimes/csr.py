"""Products of dense activations with sparse weights on CPUs: compressed sparse rows (CSR), by MKL."""

import platform
import warnings

import torch

from ..errors import ArgumentError

# Tokens that are multiplied at once: more do not stay in the caches of a core, and the product is slower.
TILE = 128

# What indices of 32 bits can count, which the kernels read faster than those of 64.
_MOST_VALUES = 2**31 - 1


def why_no_kernels() -> str | None:
    """Why sparse products do not pay on this machine; None if they may."""
    machine = platform.machine()
    if machine.lower() not in ("x86_64", "amd64"):
        return f"sparse products need an x86 processor, this one is {machine or 'unknown'}"
    if not torch.backends.mkl.is_available():
        return "sparse products need a torch that was built with MKL, this one was not"
    return None


def to_csr(weight: torch.Tensor) -> torch.Tensor:
    """A matrix, outputs by inputs, as CSR with indices of 32 bits. Zeros are left out."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        rows = weight.detach().to_sparse_csr()
        if rows.values().numel() > _MOST_VALUES:
            raise ArgumentError(
                "weight", f"expected at most {_MOST_VALUES:,} values that are not zero, got {rows.values().numel():,}"
            )
        crow, columns = rows.crow_indices().int(), rows.col_indices().int()
        return torch.sparse_csr_tensor(crow, columns, rows.values(), size=weight.shape, check_invariants=True)


def csr_linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`inputs @ weight.T + bias` for a weight in CSR (outputs by inputs) and inputs of any leading dimensions.

    It is computed as `weight @ inputs.T` in tiles of 128 rows of the inputs; `torch.nn.functional.linear`, which
    computes the transposed product, is several times slower with a weight in CSR. The result has the layout that
    `linear` gives.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    if rows.shape[0] == 1:
        outputs = (weight @ rows[0]).unsqueeze(0)
    else:
        outputs = rows.new_empty(rows.shape[0], weight.shape[0])
        for start in range(0, rows.shape[0], TILE):
            outputs[start : start + TILE] = (weight @ rows[start : start + TILE].T).T
    if bias is not None:
        outputs += bias
    return outputs.view(*inputs.shape[:-1], weight.shape[0])
