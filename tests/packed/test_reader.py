"""The reader that docs/packing.md shows needs NumPy alone, and reads what the library reads."""

import ast

import numpy as np
import pytest
import torch
from pages import PAGES, blocks_of
from safetensors.torch import save_file
from test_files import tensors

from hf_prune.packed.files import PackedReader, pack_file


@pytest.fixture(scope="module")
def reader():
    [block] = (block for block in blocks_of(PAGES["docs/packing.md"]) if "def read_packed" in block.text)
    tree = ast.parse(block.text)
    end = next(node.lineno for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "tensors")
    lines = [line for line in block.text.splitlines()[: end - 1] if line.strip()]
    assert len(lines) <= 75
    assert {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names} == {
        *("json", "struct", "zlib", "numpy")
    }
    names = {}
    exec("\n".join(lines), names)
    return names


def test_the_reader_of_the_docs_reads_every_kind_of_tensor(reader, tmp_path):
    found = tensors()
    found["signed"] = torch.randn(50, 60) * (torch.rand(50, 60) < 0.2)
    found["wide gaps"] = (torch.rand(200_000) < 0.002) * torch.randn(200_000)
    found["one value"] = (torch.rand(5000) < 0.1).float()
    save_file(found, tmp_path / "dense.safetensors")
    pack_file(tmp_path / "dense.safetensors", tmp_path / "packed.safetensors")
    expected = {entry.name: bits for entry, bits in PackedReader(tmp_path / "packed.safetensors").tensors()}
    read = dict(reader["read_packed"](tmp_path / "packed.safetensors"))
    assert read.keys() == expected.keys() == found.keys()
    for name, tensor in found.items():
        assert read[name].shape == tuple(tensor.shape)
        assert np.ascontiguousarray(read[name]).tobytes() == expected[name].tobytes(), name
    assert read["pruned"].dtype == np.float32


def test_the_reader_of_the_docs_refuses_a_damaged_file(reader, tmp_path):
    save_file({"pruned": tensors()["pruned"]}, tmp_path / "dense.safetensors")
    pack_file(tmp_path / "dense.safetensors", tmp_path / "packed.safetensors")
    content = bytearray((tmp_path / "packed.safetensors").read_bytes())
    content[-20] ^= 1
    (tmp_path / "packed.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        dict(reader["read_packed"](tmp_path / "packed.safetensors"))
