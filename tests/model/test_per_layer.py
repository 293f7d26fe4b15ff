"""Models whose layers have different widths open after `import hf_prune`, and with a loud error without it."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from models import bert, gpt2, llama
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import hf_prune  # noqa: F401 (it teaches transformers to open them)
from hf_prune.model.per_layer import has_overrides, needs_import, reads_overrides

pytestmark = pytest.mark.widths_per_layer

IDS = torch.arange(3, 11)[None]
BERT = {0: {"intermediate_size": 6, "num_attention_heads": 1}, 1: {"intermediate_size": 7}}


def with_widths(config, widths, **more):
    return type(config).from_dict(config.to_dict() | {"per_layer_config": widths, **more})


def small_bert():
    config = with_widths(bert(num_attention_heads=4).config, BERT, head_dim=4)
    return transformers.BertForSequenceClassification(config).eval()


def test_each_layer_is_built_from_its_own_values():
    layers = small_bert().bert.encoder.layer
    assert [layer.intermediate.dense.out_features for layer in layers] == [6, 7]
    assert [tuple(layer.attention.self.query.weight.shape) for layer in layers] == [(4, 16), (16, 16)]
    assert [tuple(layer.attention.output.dense.weight.shape) for layer in layers] == [(16, 4), (16, 16)]
    assert [layer.attention.self.num_attention_heads for layer in layers] == [1, 4]
    assert [layer.attention.self.attention_head_size for layer in layers] == [4, 4]


def test_it_opens_in_every_way_that_transformers_has(tmp_path):
    model = small_bert()
    expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for again in (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        transformers.BertForSequenceClassification.from_pretrained(tmp_path, config=config),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
    ):
        assert torch.equal(again.eval()(IDS).logits, expected)
        assert len(again(IDS, output_hidden_states=True).hidden_states) == 3
    for _ in range(2):  # one configuration, several models
        built = AutoModelForSequenceClassification.from_config(model.config)
        assert {name: one.shape for name, one in built.state_dict().items()} == {
            name: one.shape for name, one in model.state_dict().items()
        }


def test_models_without_other_widths_are_built_as_before(monkeypatch):
    small_bert()
    layer_class = transformers.models.bert.modeling_bert.BertLayer
    torch.manual_seed(0)
    plain = bert()
    monkeypatch.setattr(layer_class, "__init__", layer_class.__init__.__wrapped__)
    torch.manual_seed(0)
    assert all(map(torch.equal, bert().state_dict().values(), plain.state_dict().values()))
    assert type(plain.bert.encoder.layer[0]) is layer_class
    assert len(plain(IDS, output_hidden_states=True).hidden_states) == 3


def test_a_decoder_generates_with_a_dynamic_and_a_static_cache():
    widths = {0: {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 5}}
    may_read = {"allow_global_per_layer_attribute_access": True}
    model = transformers.LlamaForCausalLM(with_widths(llama().config, widths, head_dim=8, **may_read))
    heads = transformers.GPT2LMHeadModel(with_widths(gpt2().config, {1: {"n_head": 1}}, head_dim=8))
    for one in (model, heads):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        dynamic = one.generate(IDS, **options)
        assert dynamic.shape == (1, 12)
        assert torch.equal(dynamic, one.generate(IDS, cache_implementation="static", **options))


def test_layers_that_are_not_told_their_index_are_counted():
    config = transformers.MPNetConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
    )  # fmt: skip
    config = with_widths(config, {0: {"intermediate_size": 5}, 2: {"intermediate_size": 7}})
    for _ in range(2):
        layers = transformers.MPNetModel(config).encoder.layer
        assert [layer.intermediate.dense.out_features for layer in layers] == [5, 24, 7]


def gemma4():
    return transformers.Gemma4TextConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, head_dim=8, vocab_size_per_layer_input=64, hidden_size_per_layer_input=4,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def test_a_class_that_reads_the_widths_itself_is_left_alone():
    from transformers.models.gemma4 import modeling_gemma4

    before = modeling_gemma4.Gemma4TextDecoderLayer.__init__
    config = gemma4()
    assert config.is_heterogeneous  # the heads of its full attention have another size
    transformers.Gemma4TextModel(config)
    assert modeling_gemma4.Gemma4TextDecoderLayer.__init__ is before
    assert reads_overrides(type(config))
    assert not needs_import(config)


def test_which_models_need_the_import():
    config = small_bert().config
    assert has_overrides(config)
    assert needs_import(config)
    assert not needs_import(bert().config)


OPEN = """
import sys
{first}
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        print("opened", sum(parameter.numel() for parameter in model.parameters()))
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


def opened(first, *folders):
    """What a new interpreter that begins with `first` says to each folder."""
    command = [sys.executable, "-W", "ignore", "-c", OPEN.format(first=first), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.splitlines()[-len(folders) :]


def test_without_the_import_opening_is_an_error_and_with_it_it_works(tmp_path):
    model = small_bert()
    model.save_pretrained(tmp_path / "bert")
    config = transformers.LlamaConfig(  # it reads the whole configuration when it checks itself
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, num_labels=2,
    )  # fmt: skip
    one_head = {index: {"num_attention_heads": 1, "num_key_value_heads": 1} for index in range(2)}
    config = with_widths(config, one_head, head_dim=8, allow_global_per_layer_attribute_access=True)
    reading = transformers.LlamaForSequenceClassification(config)
    reading.save_pretrained(tmp_path / "llama")
    folders = tmp_path / "bert", tmp_path / "llama"
    ambiguous, mismatch = opened("", *folders)
    assert ambiguous.startswith("AmbiguousGlobalPerLayerAttributeError 'num_attention_heads' is a per-layer attribute")
    assert mismatch.startswith("RuntimeError")
    assert "ignore_mismatched_sizes" in mismatch
    sizes = [f"opened {sum(parameter.numel() for parameter in one.parameters())}" for one in (model, reading)]
    assert opened("import hf_prune", *folders) == sizes
    assert opened("import transformers.models.bert.modeling_bert, hf_prune", *folders) == sizes


def test_a_width_that_does_not_fit_the_file_is_an_error(tmp_path):
    small_bert().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["per_layer_config"]["1"]["intermediate_size"] = 8
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(tmp_path)
