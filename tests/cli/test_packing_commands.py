"""`hf-prune pack` and `hf-prune unpack`: tables of bytes, and errors as lines."""

import pytest
import torch
from models import bert
from test_commands import printed, refused

import hf_prune
from hf_prune.errors import ArgumentError
from hf_prune.packed.bound import entropy_bytes

pytestmark = pytest.mark.usefixtures("eighty_columns")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing") / "dense"
    torch.manual_seed(0)
    model = bert(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[torch.rand_like(parameter) < 0.9] = 0
    model.save_pretrained(folder)
    return folder


def size_of(folder):
    return (folder / "model.safetensors").stat().st_size


def test_packing_prints_bytes_before_and_after_and_the_entropy(dense, tmp_path):
    output = printed("pack", dense, tmp_path / "packed")
    sizes = [size_of(folder) for folder in (dense, tmp_path / "packed")]
    bound = entropy_bytes(tmp_path / "packed" / "model.safetensors")
    row = next(line for line in output.splitlines() if line.startswith("model.safetensors"))
    assert row.split()[1:] == [f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[0] / sizes[1]:.2f}", f"{bound:,}"]
    output = printed("unpack", tmp_path / "packed", tmp_path / "again")
    row = next(line for line in output.splitlines() if line.startswith("model.safetensors"))
    assert row.split()[1:] == [f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[0] / sizes[1]:.2f}"]
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()


def test_weights_are_rounded_to_bfloat16_if_that_is_asked_for(dense, tmp_path):
    printed("pack", dense, tmp_path / "packed", "--dtype", "bfloat16")
    model = type(bert()).from_pretrained(tmp_path / "packed")
    assert model.dtype == torch.bfloat16


def test_mistakes_are_lines(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    for message, arguments in (
        ("config.json: expected the configuration of a dense model", ("pack", tmp_path / "packed", tmp_path / "x")),
        ("expected a new or empty folder", ("pack", dense, tmp_path / "packed")),
        ("dtype: expected bfloat16", ("pack", dense, tmp_path / "x", "--dtype", "int8")),
        ("config.json: expected the configuration of a packed model", ("unpack", dense, tmp_path / "x")),
        ("expected a folder with a saved model, found nothing", ("unpack", "./nowhere", tmp_path / "x")),
    ):
        [line] = refused(*arguments)
        assert message in line
    assert not (tmp_path / "x").exists()


def test_a_model_in_a_package_is_packed_and_counted(dense, tmp_path, monkeypatch):
    package = tmp_path / "some_packed_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "model").symlink_to(dense)
    monkeypatch.syspath_prepend(tmp_path)
    printed("pack", "package:some_packed_models/model", tmp_path / "packed", "--embeddings", "int4")
    assert "90" in printed("report", "package:some_packed_models/model")
    [line] = refused("report", "package:some_packed_models/modle")
    assert "'modle' does not exist in the package 'some_packed_models'; did you mean 'model'" in line


def test_places_that_cannot_be_written_are_lines(dense, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    for message, output in (("found a link to what does not exist", "link"), ("cannot be written: ", "file/inner")):
        [line] = refused("pack", dense, tmp_path / output)
        assert message in line


def test_a_sentence_transformer_is_to_be_saved_first(dense, tmp_path):
    class SentenceTransformer:
        def save_pretrained(self, folder):
            raise AssertionError("it is not saved for the user")

    with pytest.raises(ArgumentError, match="got SentenceTransformer; save it, and give the folder"):
        hf_prune.save_packed(SentenceTransformer(), tmp_path / "packed")
