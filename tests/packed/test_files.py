"""Packed safetensors files: the dense file comes back bit for bit, and hostile ones are refused."""

import contextlib
import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hf_prune.errors import PackedError
from hf_prune.packed.files import METADATA_KEY, PackedReader, is_packed, pack_file, read_header, unpack_file
from hf_prune.packed.tensors import dense_tensor


def tensors():
    torch.manual_seed(0)
    weights = torch.randn(64, 96)
    pruned = torch.where(torch.rand(64, 96) < 0.1, weights, 0.0)
    return {
        "pruned": pruned,
        "half": pruned.half(),
        "brain": pruned.bfloat16(),
        "dense": weights,
        "shared": torch.round(pruned * 2) / 2,
        "eighth": pruned.to(torch.float8_e4m3fn),
        "double": pruned.double(),
        "norm": torch.ones(96),
        "positions": torch.arange(2000),
        "bytes": torch.randint(0, 256, (1700,), dtype=torch.uint8),
        "flags": torch.rand(2000) < 0.5,
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(1.5),
        "nothing left": torch.zeros(300, 300),
    }


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense") / "model.safetensors"
    save_file(tensors(), path, metadata={"format": "pt", "who": "ada"})
    return path


@pytest.fixture(scope="module")
def packed(dense):
    path = dense.parent / "packed.safetensors"
    pack_file(dense, path)
    return path


def test_the_dense_file_comes_back(dense, packed, tmp_path):
    unpack_file(packed, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == dense.read_bytes()
    assert is_packed(packed)
    assert not is_packed(dense)
    assert packed.stat().st_size < 0.6 * dense.stat().st_size


def test_a_packed_file_is_safetensors_in_which_blocks_have_the_names_of_tensors(packed):
    with safe_open(packed, framework="pt") as file:
        assert set(file.keys()) == tensors().keys()
        assert file.metadata()["format"] == "pt"
        assert file.metadata()["who"] == "ada"
        kinds = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    as_they_are = {"norm", "positions", "flags", "empty", "scalar"}
    assert {name for name, kind in kinds.items() if kind != torch.uint8} == as_they_are
    assert all(shapes[name] != list(tensor.shape) for name, tensor in tensors().items() if name not in as_they_are)


def test_tensors_are_read_one_at_a_time(packed):
    found = {entry.name: dense_tensor(bits, entry.dtype, entry.shape) for entry, bits in PackedReader(packed).tensors()}
    for name, tensor in tensors().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())


def test_headers_with_other_spaces_and_order_come_back(tmp_path):
    """Of other writers: names in another order than their bytes, spaces, escapes, no metadata."""
    header = (
        b'  { "b\\u00e9": {"shape": [2], "data_offsets": [8, 16], "dtype": "F32"},\n "a":{"dtype":"F64","shape":[1], '
    )
    header += b'"data_offsets":[0,8]}}   '
    path = tmp_path / "other.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(16)))
    pack_file(path, tmp_path / "packed.safetensors")
    unpack_file(tmp_path / "packed.safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    assert set(safe_open(tmp_path / "packed.safetensors", framework="pt").keys()) == {"a", "bé"}


def test_what_cannot_be_packed_smaller_costs_a_header_at_most(tmp_path):
    path = tmp_path / "random.safetensors"
    save_file(
        {f"t{i}": torch.randint(-(2**31), 2**31, (40, 40), dtype=torch.int32).view(torch.float32) for i in range(9)},
        path,
    )
    pack_file(path, tmp_path / "packed.safetensors")
    assert (tmp_path / "packed.safetensors").stat().st_size <= path.stat().st_size + 2500


def test_float32_becomes_bfloat16_where_that_is_asked_for(dense, tmp_path):
    pack_file(dense, tmp_path / "packed.safetensors", to_bfloat16=True)
    unpack_file(tmp_path / "packed.safetensors", tmp_path / "again.safetensors")
    with safe_open(tmp_path / "again.safetensors", framework="pt") as file:
        for name, tensor in tensors().items():
            expected = tensor.bfloat16() if tensor.dtype == torch.float32 else tensor
            found = file.get_tensor(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found.float(), expected.float())


def test_packing_holds_one_tensor_in_memory(tmp_path):
    path = tmp_path / "many.safetensors"
    weights = torch.where(torch.rand(500, 1000) < 0.1, torch.randn(500, 1000), 0.0)
    save_file({f"t{index}": weights + index * (weights != 0) for index in range(12)}, path)
    tracemalloc.start()
    pack_file(path, tmp_path / "packed.safetensors")
    unpack_file(tmp_path / "packed.safetensors", tmp_path / "again.safetensors")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * weights.nbytes  # of 12


def test_what_is_packed_is_not_packed_again(packed, tmp_path):
    with pytest.raises(PackedError, match="expected dense weights, got packed ones"):
        pack_file(packed, tmp_path / "twice.safetensors")


def test_what_is_not_packed_is_not_unpacked(dense, tmp_path):
    with pytest.raises(PackedError, match="expected packed weights, got a file without them"):
        unpack_file(dense, tmp_path / "again.safetensors")
    (tmp_path / "text").write_text("x")
    with pytest.raises(PackedError, match="expected safetensors, got a file without a header"):
        unpack_file(tmp_path / "text", tmp_path / "again.safetensors")


# ---- Hostile files ----


def with_header(path, target, change):
    """The file with another header, of any length."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    target.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    return target


def swap(header):
    header["half"], header["brain"] = header["brain"], header["half"]


def longer(header):
    header["norm"]["shape"] = [97]


def overlapping(header):
    header["norm"]["data_offsets"] = header["flags"]["data_offsets"]


def without(header):
    del header["scalar"]


def renamed(header):
    header["other"] = header.pop("pruned")


def of_metadata(**changes):
    def change(header):
        said = json.loads(header["__metadata__"][METADATA_KEY])
        header["__metadata__"][METADATA_KEY] = json.dumps(said | changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, "expected F16 of shape .*, got BF16|expected BF16 of shape .*, got F16"),
        (longer, "does not have the bytes of its shape"),
        (overlapping, "a gap or an overlap|bytes of its shape"),
        (without, "more or fewer|a gap or an overlap"),
        (renamed, "expected the tensors of the dense file, got others"),
        (of_metadata(format_version=2), "format version is 2, expected 1; update hf-prune"),
        (of_metadata(header="AAAA"), "expected packed weights"),
        (of_metadata(header=7), "expected packed weights"),
        (of_metadata(sha256="0" * 64), r"expected the weights that were packed \(by their SHA-256\), got others"),
    ],
)
def test_a_header_with_lies_is_refused(packed, tmp_path, change, message):
    path = with_header(packed, tmp_path / "lying.safetensors", change)
    with pytest.raises(PackedError, match=message):
        unpack_file(path, tmp_path / "again.safetensors")


@settings(deadline=None, derandomize=True, max_examples=150)
@given(data=st.data())
def test_any_change_of_a_packed_file_is_refused_or_changes_nothing(packed, dense, data):
    content = bytearray(packed.read_bytes())
    header = 8 + len(read_header(packed).content)
    place = st.one_of(st.integers(0, header), st.integers(header, len(content) - 1))
    at = data.draw(place)
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        content = content[:at]
    path, again = packed.parent / "changed.safetensors", packed.parent / "again.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    with contextlib.suppress(PackedError):
        unpack_file(path, again)
        assert again.read_bytes() == dense.read_bytes()  # a space of the header, or what only other readers see
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20 * dense.stat().st_size
