"""Layers chosen by how much they change what they get."""

import pytest
import torch
from models import ARCHITECTURES, bert, llama

from hf_prune import Pruner, PruningConfig, PruningConfigError


def config(**changes):
    values = {"structure": "layers", "method": "block_influence", "sparsity": 0.25, "schedule": "one_shot", "begin": 1}
    return PruningConfig(**values | changes)


def influences_by_hand(model, data):
    """1 - mean cosine of each layer's input and output, over the tokens that are no padding."""
    cosines = [[] for _ in model.model.layers]
    for batch in data:
        states = model.model(**batch, output_hidden_states=True).hidden_states
        hidden = [model.model.embed_tokens(batch["input_ids"]), *states[1:-1], None]
        for index, layer in enumerate(model.model.layers):
            after = hidden[index + 1]
            if after is None:  # the last state has been through the final norm
                seen = []
                with layer.register_forward_hook(lambda module, arguments, output, seen=seen: seen.append(output)):
                    model(**batch)
                after = seen[0]
            both = torch.nn.functional.cosine_similarity(hidden[index], after, dim=-1)
            cosines[index].append(both[batch["attention_mask"].bool()])
    return torch.stack([1 - torch.cat(found).mean() for found in cosines])


@pytest.mark.parametrize("seed", range(3))
def test_the_layers_that_change_their_inputs_least_are_removed(seed):
    torch.manual_seed(seed)
    model = llama(num_hidden_layers=4)
    with torch.no_grad():
        for layer in model.model.layers:
            scale = float(torch.rand(())) + 0.1
            layer.mlp.down_proj.weight.mul_(20 * scale)
            layer.self_attn.o_proj.weight.mul_(20 * scale)
    batch = ARCHITECTURES["llama"].batch()["input_ids"]
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    data = [{"input_ids": batch, "attention_mask": mask}, {"input_ids": batch.flip(1), "attention_mask": mask}]
    expected = influences_by_hand(model, data)
    pruner = Pruner(model.train(), config(sparsity=0.5), total_steps=2)
    for one in data:
        model(**one)
    pruner.step()
    names = [f"model.layers.{index}.mlp.down_proj.weight" for index in range(4)]
    gone = {index for index, name in enumerate(names) if not pruner.masks[name].any()}
    assert gone == set(expected.argsort()[:2].tolist())
    pruner.shrink()
    assert model.config.num_hidden_layers == 2


def test_gradual_updates_measure_the_layers_that_are_left():
    torch.manual_seed(0)
    model = bert(num_hidden_layers=4)
    pruner = Pruner(model, config(sparsity=0.75, schedule="linear", end=3, frequency=1), total_steps=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        model(**ARCHITECTURES["bert"].batch()).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    pruner.shrink(optimizer)
    assert model.config.num_hidden_layers == 1


def test_it_ranks_no_other_units():
    with pytest.raises(
        PruningConfigError, match="method: expected one of magnitude, random, activation, wanda, taylor"
    ):
        config(structure="neurons")
    with pytest.raises(PruningConfigError, match="method: expected one of magnitude"):
        config(structure=None)
