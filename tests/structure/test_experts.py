"""Whole experts leave a mixture: while they are masked no token is sent to them, and the smaller model is the same."""

import copy

import pytest
import torch
import transformers
from models import gpt_oss, mixtral

from hf_prune import Pruner, PruningConfig, StructureError, TargetError
from hf_prune.structure.coupled import find_families
from hf_prune.structure.proof import proven
from hf_prune.structure.routing import avoid

SIZES = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "moe_intermediate_size": 24, "max_position_embeddings": 32, "num_experts_per_tok": 2,
}  # fmt: skip


def qwen3_moe(**changes):
    config = transformers.Qwen3MoeConfig(**SIZES | {"num_experts": 6, "head_dim": 8} | changes)
    return transformers.Qwen3MoeForCausalLM(config)


def deepseek(**changes):
    config = transformers.DeepseekV3Config(
        **SIZES | {"n_routed_experts": 6, "n_group": 1, "topk_group": 1} | changes, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-2, 2, len(buffer)))  # larger than any score
    return model


def spread(model):
    """A model with weights that are large enough for experts and routers to differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


IDS = torch.arange(3, 23).repeat(2, 1)


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def config_of(**changes):
    return PruningConfig(
        **{"structure": "experts", "sparsity": 0.5, "begin": 1, "end": 3, "frequency": 1, "method": "magnitude"}
        | changes
    )


def train(model, pruner, steps):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize(
    ("build", "field", "left"),
    [
        (mixtral, "num_local_experts", 2),
        (gpt_oss, "num_local_experts", 2),
        (qwen3_moe, "num_experts", 3),
        (deepseek, "n_routed_experts", 3),
    ],
)
def test_a_model_trained_with_masked_experts_is_the_one_that_is_left(build, field, left, tmp_path):
    model = spread(build())
    pruner = Pruner(model, config_of(), total_steps=5)
    optimizer = train(model, pruner, 4)
    masked = logits_of(model.eval())
    assert pruner.can_shrink
    pruner.shrink(optimizer)
    torch.testing.assert_close(logits_of(model), masked)
    assert getattr(model.config, field) == left
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(model))
    train(model, pruner, 1)


@pytest.mark.parametrize("method", ["random", "taylor"])
def test_experts_are_scored_with_other_methods(method):
    model = spread(mixtral())
    pruner = Pruner(model, config_of(method=method), total_steps=5)
    train(model, pruner, 4)
    masked = logits_of(model)
    pruner.shrink()
    torch.testing.assert_close(logits_of(model), masked)
    assert model.config.num_local_experts == 2


def test_methods_that_read_inputs_are_refused_for_fused_experts():
    with pytest.raises(TargetError, match="expected the weight of a linear layer for a method that reads inputs"):
        Pruner(mixtral(), config_of(structure="neurons", method="activation"), total_steps=5)


def test_experts_that_no_token_is_sent_to_leave_first_by_taylor():
    model = spread(mixtral())
    [family] = proven(find_families(model, "experts"), model)
    unused = torch.tensor([False, True, False, True])
    handles = [handle for group in family.groups for handle in avoid(model, group, unused)]
    pruner = Pruner(model, config_of(method="taylor"), total_steps=5)
    train(model, pruner, 4)
    for handle in handles:
        handle.remove()
    pruner.shrink()
    assert {tuple(units["kept"]) for units in pruner.removed["units"].values()} == {(0, 2)}


def test_no_token_is_sent_to_a_masked_expert_and_to_all_after_the_handles_are_removed():
    model = spread(mixtral())
    [family] = find_families(model, "experts")
    router = model.model.layers[0].mlp.gate
    states = torch.randn(50, 16)
    _, _, before = router(states)
    handles = avoid(model, family.groups[0], torch.tensor([True, False, False, False]))
    logits, weights, chosen = router(states)
    assert 0 in before
    assert 0 not in chosen
    assert bool((logits[:, 0] == -torch.inf).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    for handle in handles:
        handle.remove()
    assert torch.equal(router(states)[2], before)


def test_experts_and_their_neurons_leave_together():
    model = spread(mixtral())
    configs = [config_of(), config_of(structure="neurons", sparsity=1 / 3)]
    pruner = Pruner(model, configs, total_steps=5)
    train(model, pruner, 4)
    masked = logits_of(model)
    pruner.shrink()
    torch.testing.assert_close(logits_of(model), masked)
    assert (model.config.num_local_experts, model.config.intermediate_size) == (2, 16)


def test_masks_that_are_loaded_are_routed_around_too(tmp_path):
    model = spread(mixtral())
    pruner = Pruner(model, config_of(end=4), total_steps=6)
    train(model, pruner, 3)
    masked = logits_of(model)
    pruner.save(tmp_path)
    other = copy.deepcopy(model)
    for module in other.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    assert not torch.equal(logits_of(other), masked)
    again = Pruner(other, config_of(end=4), total_steps=6)
    again.load(tmp_path)
    assert torch.equal(logits_of(other), masked)


def test_fewer_experts_than_each_token_is_sent_to_are_refused():
    with pytest.raises(StructureError, match=r"sparsity: expected at least 2 of 4 experts to be left, .* got 0\.75"):
        Pruner(mixtral(), config_of(sparsity=0.75), total_steps=5)
    with pytest.raises(StructureError, match=r"experts of .* cannot be removed: each token is sent to 6 of them"):
        Pruner(qwen3_moe(num_experts_per_tok=6), config_of(), total_steps=5)


def test_experts_that_are_chosen_by_groups_are_refused():
    with pytest.raises(StructureError, match=r"experts of model\.layers\.1\.mlp cannot be removed"):
        Pruner(deepseek(n_group=2, n_routed_experts=8), config_of(), total_steps=5)
