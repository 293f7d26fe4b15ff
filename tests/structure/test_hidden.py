"""The width of a model leaves with everything that reads or writes it; masked dimensions are in no norm."""

import pytest
import torch
import transformers
from models import albert, bert, gpt2, gpt_oss, llama, mixtral, t5, vit

from hf_prune import Pruner, PruningConfig, StructureError
from hf_prune.saved.model import SavedModel
from hf_prune.saved.report import make_report
from hf_prune.structure.coupled import find_families
from hf_prune.structure.norms import normalise_others
from hf_prune.structure.proof import proven, zero_units
from hf_prune.structure.units import CoupledUnits, Part

DECODER = {
    **{"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32},
}


def gemma():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**DECODER))


def tied_llama():
    return llama(tie_word_embeddings=True)


IDS = torch.arange(3, 11).repeat(2, 1)
PICTURES = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def wide_bert():
    return bert(num_attention_heads=4)


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.RobertaForSequenceClassification(config)


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=64, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=32
    )
    return transformers.DistilBertForSequenceClassification(config)


def inputs_of(model):
    return {"pixel_values": PICTURES} if model.main_input_name == "pixel_values" else {"input_ids": IDS}


def logits_of(model):
    with torch.no_grad():
        return model(**inputs_of(model)).logits


def spread(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def config_of(**changes):
    return PruningConfig(
        **{"structure": "hidden", "sparsity": 0.5, "begin": 1, "end": 3, "frequency": 1, "method": "magnitude"}
        | changes
    )


def train(model, pruner, steps):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    labels = {"labels": IDS if hasattr(model, "lm_head") else torch.tensor([0, 1])}
    model.train()
    for _ in range(steps):
        model(**inputs_of(model), **labels).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    model.eval()
    return optimizer


@pytest.mark.parametrize("build", [llama, tied_llama, mixtral, vit])
def test_a_model_trained_with_masked_dimensions_is_the_one_that_is_left(build, tmp_path):
    model = spread(build())
    pruner = Pruner(model, config_of(), total_steps=5)
    optimizer = train(model, pruner, 4)
    masked = logits_of(model)
    pruner.shrink(optimizer)
    torch.testing.assert_close(logits_of(model), masked, atol=1e-4, rtol=1e-4)
    assert model.config.hidden_size == 8
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(logits_of(again.eval()), logits_of(model))
    train(model, pruner, 1)


@pytest.mark.parametrize(
    ("build", "width", "heads"),
    [(wide_bert, "hidden_size", "num_attention_heads"), (roberta, "hidden_size", "num_attention_heads"),
     (distilbert, "dim", "n_heads")],
)  # fmt: skip
def test_heads_leave_with_a_width_that_is_theirs(build, width, heads, tmp_path):
    model = spread(build())
    pruner = Pruner(model, config_of(sparsity=0.25), total_steps=5)
    optimizer = train(model, pruner, 4)
    masked = logits_of(model)
    pruner.shrink(optimizer)
    torch.testing.assert_close(logits_of(model), masked, atol=1e-4, rtol=1e-4)
    assert (getattr(model.config, width), getattr(model.config, heads)) == (12, 3)
    kept = [units["kept"] for name, units in pruner.removed["units"].items() if name.startswith("heads of ")]
    assert [len(heads) for heads in kept] == [3, 3]
    model.save_pretrained(tmp_path)
    pruner.save(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(logits_of(again.eval()), logits_of(model))
    removed = make_report(SavedModel(tmp_path)).removed
    assert removed.words == "25% of the hidden dimensions and 25% of the heads of each layer"
    train(model, pruner, 1)


def test_a_width_that_is_no_multiple_of_the_size_of_heads_is_refused_before_training():
    words = r"such as 0\.25 or 0\.5; got 0\.3, which leaves 11 of 16 hidden dimensions and 3 of 4 heads \("
    with pytest.raises(StructureError, match=words):
        Pruner(wide_bert(), config_of(sparsity=0.3), total_steps=5)


def qwen3():
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**DECODER))


def deberta():
    config = transformers.DebertaV2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.DebertaV2Model(config)


@pytest.mark.parametrize(("build", "tied"), [(qwen3, 0), (gpt_oss, 0), (deberta, 2), (albert, 1)])
def test_widths_of_other_classes_are_proven(build, tied):
    model = build()
    [family] = proven(find_families(model, "hidden"), model)
    assert family.groups[0].units == 16
    assert sum(len(heads.groups) for heads in family.tied) == tied


@pytest.mark.parametrize("method", ["random", "activation", "wanda", "taylor"])
def test_dimensions_are_scored_with_every_method(method):
    model = spread(llama())
    pruner = Pruner(model, config_of(method=method, sparsity=0.25), total_steps=5)
    train(model, pruner, 4)
    masked = logits_of(model)
    pruner.shrink()
    torch.testing.assert_close(logits_of(model), masked, atol=1e-4, rtol=1e-4)
    assert model.config.hidden_size == 12


def test_dimensions_that_nothing_writes_leave_first_by_activation():
    model = spread(llama())
    [family] = proven(find_families(model, "hidden"), model)
    silent = torch.arange(16) % 2 == 1
    with torch.no_grad():
        for part in family.groups[0].parts:
            if "norm" not in part.name:
                model.get_parameter(part.name).index_fill_(part.dim, silent.nonzero().squeeze(1), 0)
    pruner = Pruner(model, config_of(method="activation", begin=1, schedule="one_shot"), total_steps=5)
    model.train()
    model(**inputs_of(model), labels=IDS).loss.backward()
    pruner.step()
    pruner.shrink()
    assert pruner.removed["units"]["hidden of model"]["kept"] == list(range(0, 16, 2))


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm(16), torch.nn.RMSNorm(16)])
def test_a_norm_without_some_dimensions_is_that_of_the_others(norm):
    gone = torch.arange(16) % 3 == 0
    model = torch.nn.ModuleDict({"norm": norm.double()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(16).masked_fill(gone, 0))
    states = torch.randn(4, 16, dtype=torch.float64).masked_fill(gone, 0)
    smaller = type(norm)(int((~gone).sum()), eps=norm.eps).double()
    smaller.load_state_dict({name: tensor[~gone] for name, tensor in norm.state_dict().items()})
    parts = tuple(Part(f"norm.{name}", 0, ((0, 1),)) for name, _ in norm.named_parameters())
    handles = normalise_others(model, CoupledUnits("hidden", "", 16, parts, ()), gone)
    found = norm(states)
    torch.testing.assert_close(found[:, ~gone], smaller(states[:, ~gone]))
    assert bool((found[:, gone] == 0).all())
    for handle in handles:
        handle.remove()
    assert not torch.allclose(norm(states)[:, ~gone], found[:, ~gone])


def test_width_neurons_and_layers_leave_together():
    model = spread(llama(num_hidden_layers=3))
    kinds = {"hidden": 0.25, "neurons": 0.5, "layers": 1 / 3}
    configs = [config_of(structure=structure, sparsity=sparsity) for structure, sparsity in kinds.items()]
    pruner = Pruner(model, configs, total_steps=5)
    train(model, pruner, 4)
    masked = logits_of(model)
    pruner.shrink()
    torch.testing.assert_close(logits_of(model), masked, atol=1e-4, rtol=1e-4)
    left = (model.config.hidden_size, model.config.intermediate_size, model.config.num_hidden_layers)
    assert left == (12, 12, 2)


def test_only_zeros_are_not_enough_as_norms_divide_by_the_number_of_dimensions():
    model = spread(llama())
    [family] = find_families(model, "hidden")
    zero_units(model, family.groups, {"hidden of model": torch.arange(16) % 2 == 0})
    plain = logits_of(model)
    normalise_others(model, family.groups[0], torch.arange(16) % 2 == 0)
    assert not torch.allclose(logits_of(model), plain, atol=1e-3)


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (gemma, r"hidden of model cannot be removed: the smaller model's outputs differ"),  # scales by the width
        (t5, r"hidden of .* cannot be removed: the smaller model's outputs differ"),  # so does its head
        (gpt2, r"no field of GPT2Config sets the number of hidden dimensions .*; remove another structure: docs/"),
    ],
)
def test_what_depends_on_the_width_in_another_way_is_refused(build, why):
    with pytest.raises(StructureError, match=why):
        Pruner(build(), config_of(), total_steps=5)


def test_a_width_whose_half_the_class_cannot_be_built_with_is_tried_with_another(tmp_path):
    model = spread(
        llama(hidden_size=36, num_attention_heads=12, num_key_value_heads=4, head_dim=8)
    )  # 18 is no multiple
    pruner = Pruner(model, config_of(sparsity=1 / 3), total_steps=5)
    pruner.shrink(train(model, pruner, 4))
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert (again.config.hidden_size, again.config.num_attention_heads, again.config.head_dim) == (24, 12, 8)
    assert torch.equal(logits_of(again.eval()), logits_of(model.eval()))


def test_a_width_that_the_class_cannot_be_built_with_is_refused_before_training():
    with pytest.raises(
        StructureError,
        match=r"sparsity: expected a share of the hidden dimensions .* leaves 13 of 16 hidden dimensions \(.*\)",
    ):
        Pruner(llama(), config_of(sparsity=0.2), total_steps=5)


def test_a_width_that_weights_which_are_not_saved_depend_on_cannot_be_changed():
    config = transformers.MarianConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = transformers.MarianMTModel(config)  # computes sinusoids of its width anew whenever it is opened
    with pytest.raises(StructureError, match="outputs differ"):
        Pruner(model, PruningConfig(structure="hidden", sparsity=0.5), total_steps=1)
    assert Pruner(model, PruningConfig(structure="neurons", sparsity=0.5), total_steps=1).masks


def test_a_tensor_without_weights_is_no_part_of_a_plan():
    config = transformers.DINOv3ViTConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_register_tokens=0,
    )  # fmt: skip
    model = transformers.DINOv3ViTModel(config)
    assert any(parameter.numel() == 0 for parameter in model.parameters())
    pruner = Pruner(model, PruningConfig(structure="hidden", sparsity=0.5, method="magnitude"), total_steps=10)
    assert pruner.plan().units[0].removed == 8
