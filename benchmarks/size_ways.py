"""Ways to save a model, for `size.py` and `size_text.py`: each returns the bytes of what is needed to use it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hf_prune import save_packed


def open_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder, as the class that its configuration names."""
    (name,) = AutoConfig.from_pretrained(folder).architectures
    return getattr(transformers, name).from_pretrained(folder, dtype=dtype)


def as_it_is(folder: Path, output: Path) -> int:
    """The model as it was saved. Returns the bytes of what is needed to use it."""
    shutil.copytree(folder, output)
    return needed_bytes(output)


def in_bfloat16(folder: Path, output: Path) -> int:
    """The weights in 16 bits."""
    model = open_model(folder, torch.bfloat16)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    return needed_bytes(output)


def packed(folder: Path, output: Path) -> int:
    """The weights packed as they are."""
    save_packed(folder, output)
    return needed_bytes(output)


def packed_in_bfloat16(folder: Path, output: Path) -> int:
    """The weights packed after they were rounded to 16 bits."""
    save_packed(folder, output, dtype="bfloat16")
    return needed_bytes(output)


def needed_bytes(folder: Path) -> int:
    """The bytes of weights, configuration and tokenizer."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files = [*folder.glob("*.safetensors"), *(folder / name for name in names)]
    return sum(file.stat().st_size for file in files if file.exists() and not file.name.startswith("pruning_"))


WAYS: dict[str, Callable[[Path, Path], int]] = {
    "float32": as_it_is,
    "bfloat16": in_bfloat16,
    "packed": packed,
    "packed, bfloat16": packed_in_bfloat16,
}


def rounded_by_torchao(folder: Path, output: Path, bits: int) -> int:
    """The weights of linear layers rounded by torchao, the others in bfloat16, and written as floats to be measured.

    The head of a language model is left in bfloat16, as it is often the word embeddings.

    Returns the bytes that it takes with as many bits a weight, and a scale of 16 bits for each row (8 bits) or group of
    32 weights (4 bits), counted: torchao keeps 4 bits in a byte each on CPUs.
    """
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_

    model = open_model(folder, torch.float32)
    head = model.get_output_embeddings()

    def is_rounded(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and module is not head

    linear = {f"{name}.weight" for name, module in model.named_modules() if is_rounded(module, name)}
    group = 32
    config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(group))
    quantize_(model, config, is_rounded)
    size, weights, counted = 0, {}, set()
    for name, value in model.state_dict().items():
        if name in linear:
            scales = value.shape[0] if bits == 8 else value.numel() // group
            size += value.numel() * bits // 8 + 2 * scales
            weights[name] = value.dequantize()
        else:
            size += 2 * value.numel() * (value.data_ptr() not in counted)
            counted.add(value.data_ptr())
            weights[name] = value.bfloat16()
    rounded = open_model(folder, torch.float32)
    rounded.load_state_dict(weights)
    rounded.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    return size + needed_bytes(output) - sum(file.stat().st_size for file in output.glob("*.safetensors"))
