"""Which units a model has, and that removing them is the same as masking them."""

import copy

import peft
import pytest
import torch
import transformers
from models import albert, bert, gpt2, llama, mixtral, t5, vit

from hf_prune import shrink
from hf_prune.errors import StructureError
from hf_prune.structure.coupled import find_families, select_groups
from hf_prune.structure.proof import zero_units
from hf_prune.structure.shrink import cut_of, shrink_model


def shrunk_and_masked(model, structure, dropped_of):
    """A model without the units that `dropped_of(group)` says, and the whole model with their weights at zero."""
    families = find_families(model, structure)
    dropped = {group.name: dropped_of(group) for family in families for group in family.groups}
    masked = copy.deepcopy(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for family in families:
            for group in family.groups:
                gone = dropped[group.name].nonzero().squeeze(1)
                for part in group.all_parts:
                    tensor, dim = parameters[part.name], part.dim
                    if part.expert is not None:
                        tensor, dim = tensor[part.expert], dim - 1
                    tensor.index_fill_(dim, part.indices(gone), 0)
    shrink_model(model, cut_of(families, dropped))
    return model, masked


def half_of(group):
    torch.manual_seed(len(group.name))
    dropped = torch.zeros(group.units, dtype=torch.bool)
    dropped[torch.randperm(group.units)[: group.units // 2]] = True
    return dropped


def outputs_of(model, **inputs):
    model.eval()
    with torch.no_grad():
        return model(**inputs).logits


IDS = torch.arange(3, 11).repeat(2, 1)


@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (bert, {"intermediate_size": 12}),
        (llama, {"intermediate_size": 12}),
        (gpt2, {"n_inner": 32}),
        (mixtral, {"intermediate_size": 12}),
        (t5, {"d_ff": 12}),
    ],
)
def test_a_model_without_half_of_its_neurons_answers_as_if_they_were_zero(build, fields):
    inputs = {"input_ids": IDS} | ({"decoder_input_ids": IDS} if build is t5 else {})
    small, masked = shrunk_and_masked(build(), "neurons", half_of)
    assert {name: small.config.to_dict()[name] for name in fields} == fields
    torch.testing.assert_close(outputs_of(small, **inputs), outputs_of(masked, **inputs), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())


def test_a_vision_model_without_half_of_its_neurons_and_heads():
    pixels = torch.randn(2, 3, 8, 8)
    for structure in ("neurons", "heads"):
        small, masked = shrunk_and_masked(vit(), structure, half_of)
        torch.testing.assert_close(
            outputs_of(small, pixel_values=pixels), outputs_of(masked, pixel_values=pixels), rtol=0, atol=1e-6
        )


def test_groups_of_query_heads_leave_with_their_key_value_head():
    model = llama(num_attention_heads=4, num_key_value_heads=2, hidden_size=16)
    [family] = find_families(model, "heads")
    assert [group.units for group in family.groups] == [2, 2]
    small, masked = shrunk_and_masked(model, "heads", half_of)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, 4)
    assert small.model.layers[0].self_attn.q_proj.weight.shape == (8, 16)
    torch.testing.assert_close(outputs_of(small, input_ids=IDS), outputs_of(masked, input_ids=IDS), rtol=0, atol=1e-6)
    assert small.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 11)


def test_heads_without_a_number_in_the_configuration_are_refused():
    with pytest.raises(StructureError, match="no field of AlbertConfig sets the number of heads"):
        find_families(albert(), "heads")


def test_what_is_no_model_is_refused():
    with pytest.raises(StructureError, match="expected a model of transformers, got str"):
        find_families("bert", "neurons")


@pytest.mark.widths_per_layer
@pytest.mark.parametrize("build", [bert, gpt2])
def test_heads_whose_size_no_field_sets_have_rows_of_query_key_and_value(build):
    [family] = find_families(build(), "heads")
    assert family.needs_per_layer
    assert [group.units for group in family.groups] == [2, 2]
    rows = {part.name.rpartition(".")[2]: part for part in family.groups[0].parts}
    assert {len(part.indices(torch.tensor([1]))) for part in rows.values()} == {8 if build is bert else 24}
    [reader] = family.groups[0].readers
    assert reader.indices(torch.tensor([1])).tolist() == list(range(8, 16))


def test_a_model_that_is_none_of_transformers_is_refused():
    with pytest.raises(StructureError, match="expected a model of transformers"):
        find_families(torch.nn.Sequential(torch.nn.Linear(4, 4)), "neurons")


def test_a_model_with_adapters_is_refused():
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(StructureError, match="merge them first"):
        find_families(model, "neurons")


def test_encoder_and_decoder_have_layers_of_their_own():
    families = find_families(t5(), "layers")
    assert [family.stack for family in families] == ["encoder.block", "decoder.block"]


def test_lists_with_an_entry_for_each_layer_lose_those_of_removed_layers():
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        head_dim=8,
        pad_token_id=0,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    )
    model = transformers.Gemma2ForCausalLM(config)
    [family] = find_families(model, "layers")
    dropped = {group.name: torch.tensor([index in (0, 2)]) for index, group in enumerate(family.groups)}
    layers = list(model.model.layers)
    shrink_model(model, cut_of([family], dropped))
    assert list(model.model.layers) == [layers[1], layers[3]]
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    again = transformers.Gemma2ForCausalLM(model.config)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs_of(again, input_ids=IDS), outputs_of(model, input_ids=IDS))


def test_some_layers_alone_are_refused_where_the_configuration_has_one_number_for_all():
    families = find_families(bert(), "neurons")
    with pytest.raises(StructureError, match=r"not neurons of bert\.encoder\.layer\.1"):
        select_groups(families, [r".*layer\.0\..*"], [])
    assert select_groups(families, [r".*intermediate.*"], []) == families
    assert select_groups(families, None, [r".*"]) == []


def test_tied_weights_stay_tied():
    model = gpt2()
    small, _ = shrunk_and_masked(model, "neurons", half_of)
    assert small.lm_head.weight is small.transformer.wte.weight


def test_shrink_removes_the_units_of_a_model_at_hand_that_are_zero():
    small, masked = shrunk_and_masked(llama(num_attention_heads=4, num_key_value_heads=2), "neurons", half_of)
    assert shrink(masked) is masked
    assert masked.config.intermediate_size == small.config.intermediate_size == 12
    assert all(map(torch.equal, small.state_dict().values(), masked.state_dict().values()))
    dense = llama()
    before = copy.deepcopy(dense)
    assert all(map(torch.equal, shrink(dense).state_dict().values(), before.state_dict().values()))


def test_shrink_leaves_heads_that_share_a_position_bias():
    model = t5()
    for index, family in enumerate(find_families(model, "heads")):
        for place, group in enumerate(family.groups):
            dropped = torch.arange(group.units) == (index + place) % 2  # others in each layer
            zero_units(model, [group], {group.name: dropped})
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    before = outputs_of(model, **inputs)
    shrink(model)
    assert model.config.num_heads == 2
    assert torch.equal(outputs_of(model, **inputs), before)


def test_experts_are_computed_as_before():
    model = transformers.MixtralForCausalLM._from_config(mixtral().config, experts_implementation="eager")
    families = find_families(model, "neurons")
    dropped = {group.name: torch.arange(24) < 18 for family in families for group in family.groups}
    shrink_model(model, cut_of(families, dropped))
    assert model.config._experts_implementation == "eager"
    assert outputs_of(model, input_ids=IDS).isfinite().all()  # 6 neurons are too few for the grouped product
