"""Packed models open with from_pretrained as if they had never been packed, and without hf_prune not at all."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from models import bert, gpt2, llama, mixtral, t5
from safetensors.torch import load_file

import hf_prune
from hf_prune.errors import PackedError
from hf_prune.packed import files
from hf_prune.packed.files import read_header
from hf_prune.packed.quantizer import PackedConfig

MODELS = {
    "bert": bert,
    "llama": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "t5": t5,
    "mixtral": mixtral,  # its file has each expert, the model one tensor for all
}


@pytest.fixture(autouse=True)
def small_tensors_are_packed(monkeypatch):
    monkeypatch.setattr(files, "_SMALLEST", 100)


def sparse(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter[torch.rand_like(parameter) < 0.9] = 0
    return model


def saved(folder, model, **options):
    sparse(model).save_pretrained(folder / "dense", **options)
    hf_prune.save_packed(folder / "dense", folder / "packed")
    return folder / "dense", folder / "packed"


def equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first
    )


def tensors_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_opens_as_the_dense_one_and_is_saved_as_one(name, tmp_path):
    dense, packed = saved(tmp_path, MODELS[name]())
    assert any(entry.dtype == "U8" for entry in read_header(packed / "model.safetensors").entries)
    architecture = type(MODELS[name]())
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": torch.float16}, {"device_map": "cpu"}):
        expected = architecture.from_pretrained(dense, **options)
        found, information = architecture.from_pretrained(packed, output_loading_info=True, **options)
        assert equal(found, expected)
        assert not any(information.values())
    assert not getattr(found, "is_quantized", False)
    assert not hasattr(found.config, "quantization_config")
    found = architecture.from_pretrained(packed)
    found.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "config.json").read_text() == (dense / "config.json").read_text()


def test_a_base_model_opens_from_the_file_of_a_head_and_is_saved_under_the_same_names(tmp_path):
    dense, packed = saved(tmp_path, bert())
    models = [transformers.AutoModel.from_pretrained(folder) for folder in (dense, packed)]
    assert equal(*models)
    for name, model in zip(("a", "b"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    one, other = (tensors_of(tmp_path / name) for name in ("a", "b"))
    assert one.keys() == other.keys()


def test_shards_are_packed_one_by_one(tmp_path):
    dense, packed = saved(tmp_path, llama(), max_shard_size="8KB")
    names = sorted(path.name for path in dense.glob("*.safetensors"))
    assert len(names) > 2
    assert sorted(path.name for path in packed.glob("*.safetensors")) == names
    assert equal(*(transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, packed)))


def test_weights_can_be_offloaded_to_the_disk(tmp_path):
    dense, packed = saved(tmp_path, llama())
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    inputs = torch.arange(8)[None]
    outputs = []
    for folder, name in ((dense, "a"), (packed, "b")):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map=places | {"lm_head": "cpu"}, offload_folder=tmp_path / name
        )
        outputs.append(model(inputs).logits)
    assert torch.equal(*outputs)


@pytest.mark.widths_per_layer
def test_models_with_other_widths_in_some_layers(tmp_path):
    config = llama().config
    config.per_layer_config = {1: {"intermediate_size": 8}}
    model = transformers.LlamaForCausalLM(config)
    assert model.model.layers[1].mlp.up_proj.weight.shape == (8, 16)
    dense, packed = saved(tmp_path, model)
    assert equal(*(transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (dense, packed)))


def test_a_packed_model_trains(tmp_path):
    _, packed = saved(tmp_path, bert())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(packed)
    model(torch.arange(8)[None], labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# ---- What does not open ----

WITHOUT = """
import sys, transformers
transformers.AutoModel.from_pretrained(sys.argv[1])
"""


def test_without_the_import_from_pretrained_fails_instead_of_opening_other_weights(tmp_path):
    _, packed = saved(tmp_path, bert())
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT, str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "Unknown quantization type, got hf_prune" in done.stderr
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error" in done.stderr


def test_with_the_import_after_transformers_it_opens(tmp_path):
    _, packed = saved(tmp_path, bert())
    code = f"import transformers, sys\ntransformers.AutoConfig\nimport hf_prune\n{WITHOUT}\nprint('open')"
    command = [sys.executable, "-W", "ignore", "-c", code, str(packed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "open"


def test_a_damaged_file_does_not_open(tmp_path):
    _, packed = saved(tmp_path, mixtral())
    path = packed / "model.safetensors"
    content = bytearray(path.read_bytes())
    for name in ("embed_tokens.weight", "experts.1.w1.weight", "o_proj.weight"):
        entry = next(one for one in read_header(path).entries if one.name.endswith(name))
        damaged = bytearray(content)
        damaged[entry.end - 5] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
            transformers.AutoModelForCausalLM.from_pretrained(packed)


def test_weights_of_another_shape_do_not_open(tmp_path):
    _, packed = saved(tmp_path, bert())
    path = packed / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 32}))
    with pytest.raises((RuntimeError, PackedError)):
        transformers.AutoModel.from_pretrained(packed)


def test_a_newer_format_says_to_update(tmp_path):
    _, packed = saved(tmp_path, bert())
    path = packed / "config.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(PackedError, match="expected packed weights of version 1, got 2; update hf-prune"):
        transformers.AutoModel.from_pretrained(packed)


def test_a_dense_model_is_not_packed_by_opening_it(tmp_path):
    dense, _ = saved(tmp_path, bert())
    with pytest.raises(ValueError, match="pre-quantized"):
        transformers.AutoModel.from_pretrained(dense, quantization_config=PackedConfig())
