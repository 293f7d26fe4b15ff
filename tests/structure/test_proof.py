"""What is removed was tried: a smaller twin answers as the masked one, or the units are refused with the reason."""

from dataclasses import replace

import pytest
import torch
import transformers
from models import bert, gpt2, gpt_oss, llama, mixtral, t5, vit

from hf_prune import Pruner, PruningConfig, StructureError
from hf_prune.structure.coupled import find_families
from hf_prune.structure.proof import proven, sample_inputs
from hf_prune.structure.skipping import skip


def phi3(**changes):
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, pad_token_id=0, **changes,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


@pytest.mark.parametrize("build", [bert, llama, gpt2, mixtral, gpt_oss, t5, vit, phi3])
def test_neurons_and_layers_of_real_classes_are_proven(build):
    model = build()
    for structure in ("neurons", "layers"):
        families = proven(find_families(model, structure), model)
        assert families
        assert all(family.removable for family in families)


def test_query_key_and_value_in_blocks_are_told_from_those_of_each_head():
    model = phi3()
    [family] = proven(find_families(model, "heads"), model)
    fused = next(part for part in family.groups[0].all_parts if "qkv" in part.name)
    assert fused.runs == ((0, 8), (16, 4), (24, 4))


def test_heads_that_share_a_position_bias_across_layers_are_refused():
    model = t5()
    with pytest.raises(StructureError, match=r"heads of encoder.*Attention cannot be removed: .* outputs differ"):
        proven(find_families(model, "heads"), model)


def test_the_first_layers_of_t5_stay_as_they_compute_the_position_bias_of_all():
    config = PruningConfig(structure="layers", method="magnitude", sparsity=0.9, schedule="one_shot", begin=0)
    model = t5()
    pruner = Pruner(model, config, total_steps=1)
    pruner.shrink()
    assert [len(model.encoder.block), len(model.decoder.block)] == [1, 1]
    assert model.encoder.block[0].layer[0].SelfAttention.has_relative_attention_bias


def test_units_that_do_not_hang_together_are_refused():
    model = llama()
    [family] = find_families(model, "neurons")
    without_gate = [
        replace(group, parts=tuple(part for part in group.parts if "gate" not in part.name)) for group in family.groups
    ]
    broken = replace(family, groups=tuple(without_gate))
    from hf_prune.structure import shrink

    dropped = {group.name: torch.arange(24) < 12 for group in broken.groups}
    with pytest.raises(StructureError, match=r"gate_proj\.weight: expected the shape \(24, 16\)"):
        shrink.shrink_model(model, shrink.cut_of([broken], dropped))
    assert model.model.layers[0].mlp.up_proj.weight.shape == (24, 16)  # nothing was changed


@pytest.mark.parametrize("build", [bert, llama, gpt2, t5, vit])
def test_inputs_are_found_for_a_model(build):
    model = build().eval()
    assert model.main_input_name in sample_inputs(model)


def test_a_layer_that_changes_the_shape_cannot_be_skipped():
    layer = torch.nn.Linear(4, 2)
    skip(layer)
    with pytest.raises(ValueError, match="cannot be skipped"):
        layer(torch.ones(1, 4))


def test_a_batch_is_used_where_no_inputs_can_be_made_from_the_configuration():
    config = transformers.LxmertConfig(
        vocab_size=64, hidden_size=16, num_attention_heads=2, intermediate_size=24, l_layers=1, x_layers=1, r_layers=1,
        visual_feat_dim=8, visual_pos_dim=4, num_qa_labels=3,
    )  # fmt: skip
    model = transformers.LxmertForQuestionAnswering(config)
    neurons = PruningConfig(structure="neurons", sparsity=0.5, schedule="one_shot", begin=0)
    with pytest.raises(StructureError, match="no inputs were found to try LxmertForQuestionAnswering"):
        Pruner(model, neurons, total_steps=1)
    batch = {
        "input_ids": torch.arange(3, 9).repeat(2, 1),
        "visual_feats": torch.randn(2, 5, 8),
        "visual_pos": torch.rand(2, 5, 4),
    }
    pruner = Pruner(model, neurons, total_steps=1, example=batch)
    model.eval()
    masked = model(**batch).question_answering_score
    pruner.shrink()
    assert model.config.intermediate_size == 12
    torch.testing.assert_close(model(**batch).question_answering_score, masked)
