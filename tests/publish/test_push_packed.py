"""Packed models on the stand-in Hub: alone and beside the dense one, reopened from there, and what their cards say."""

import json
import shutil

import pytest
import torch
from models import bert
from safetensors.torch import load_file
from text_models import tokenizer

import hf_prune
from hf_prune.errors import PackedError, PushError
from hf_prune.publish.packing import packed_beside

REPO = "somebody/small"

# Opens a repository as its card says, and keeps what was opened.
REOPEN = """
import sys
import hf_prune
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
options = {"subfolder": sys.argv[3]} if len(sys.argv) > 3 else {}
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], **options)
assert not hasattr(model.config, "quantization_config")
save_file(dict(model.state_dict()), sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1])
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A folder with a model of 90% zeros and its tokenizer; no test may change it but for its card."""
    folder = tmp_path_factory.mktemp("packed push") / "dense"
    torch.manual_seed(0)
    model = bert(hidden_size=64, intermediate_size=128)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[torch.rand_like(parameter) < 0.9] = 0
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pushed(client, *arguments):
    done = client.cli("push", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def reopened(client, tmp_path, *subfolder):
    """The tensors of the model that a process of its own opens from the Hub."""
    client.clear_cache()
    done = client.python(REOPEN, REPO, tmp_path / "opened.safetensors", *subfolder)
    assert done.returncode == 0, done.stderr
    return load_file(tmp_path / "opened.safetensors")


def check_equal(found, dense):
    expected = type(bert()).from_pretrained(dense).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def size_of(files, *names):
    return f"{sum(len(files[name]) for name in names):,}"


def test_a_packed_model_alone(hub, lfs_client, dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    pushed(lfs_client, tmp_path / "packed", REPO)
    files = hub.repos[REPO].files()
    assert {name for name in files if name.endswith(".safetensors")} == {"model.safetensors"}
    card = files["README.md"].decode()
    assert f"The files are packed: {size_of(files, 'model.safetensors')} bytes in place of" in card
    assert f"| bytes unpacked | {(dense / 'model.safetensors').stat().st_size:,} |" in card
    assert "import hf_prune  # unpacks the weights" in card
    assert "The folder `packed`" not in card
    check_equal(reopened(lfs_client, tmp_path), dense)


def test_a_packed_model_beside_the_dense_one(hub, xet_client, dense, tmp_path):
    before = sorted(path.name for path in dense.iterdir())
    dry = pushed(xet_client, dense, REPO, "--with-packed", "--dry-run")
    assert "packed/model.safetensors" in dry
    assert sorted(path.name for path in dense.iterdir()) == before
    pushed(xet_client, dense, REPO, "--with-packed")
    files = hub.repos[REPO].files()
    assert {name for name in files if name.startswith("packed/")} == {"packed/config.json", "packed/model.safetensors"}
    assert not (dense / "packed").exists()
    card, size = files["README.md"].decode(), size_of(files, "packed/model.safetensors")
    assert f"The folder `packed` has the same weights in {size} bytes" in card
    assert f"| bytes on disk | {size_of(files, 'model.safetensors')} |" in card
    assert f"| bytes of the same weights, packed | {size} |" in card
    assert f'BertForSequenceClassification.from_pretrained("{REPO}", subfolder="packed")' in card
    assert json.loads(files["sparsity.json"])["packed_bytes"] == len(files["packed/model.safetensors"])
    for subfolder in ((), ("packed",)):
        check_equal(reopened(xet_client, tmp_path, *subfolder), dense)

    output = pushed(xet_client, dense, REPO, "--with-packed")
    assert "Nothing to upload" in output
    pushed(xet_client, dense, REPO)  # without: what is packed there would be of other weights at the next change
    files = hub.repos[REPO].files()
    assert not [name for name in files if name.startswith("packed/")]
    assert "packed" not in files["README.md"].decode()


def test_what_is_packed_is_not_packed_beside_itself(dense, tmp_path):
    hf_prune.save_packed(dense, tmp_path / "packed")
    with (
        pytest.raises(PackedError, match="expected the configuration of a dense model"),
        packed_beside(tmp_path / "packed"),
    ):
        pass


def test_modules_of_sentence_transformers_are_refused_beside(dense, tmp_path):
    module = shutil.copytree(dense, tmp_path / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": module.name, "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(PushError, match="pack the model and push that"), packed_beside(tmp_path):
        pass
