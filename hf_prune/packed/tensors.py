"""Unpacked patterns of bits as tensors of torch."""

import numpy as np
import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
}


def dense_tensor(patterns: np.ndarray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of a data type as safetensors calls it, in the memory of its patterns."""
    return torch.from_numpy(patterns.view(np.uint8)).view(DTYPES[dtype]).reshape(shape)
