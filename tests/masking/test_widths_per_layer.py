"""Units of all layers ranked together: which go, that each layer keeps one, and a model whose layers differ."""

import copy

import pytest
import torch
import transformers
from models import ARCHITECTURES, bert, gpt2, llama, t5, vit

from hf_prune import Pruner, PruningConfig, StructureError, TargetError, shrink
from hf_prune.model import per_layer
from hf_prune.structure.coupled import find_families

pytestmark = pytest.mark.widths_per_layer

STEPS = 8


def config(structure="neurons", **changes):
    schedule = {"schedule": "linear", "begin": 1, "end": 5, "frequency": 1, "scope": "global"}
    return PruningConfig(**{"structure": structure, "method": "taylor", "sparsity": 0.75, **schedule, **changes})


def at_once(structure="neurons", **changes):
    return config(structure, **{"method": "magnitude", "schedule": "one_shot", "begin": 0, **changes})


def small_bert(**changes):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return bert(**{"num_hidden_layers": 4, "num_attention_heads": 4, **dropout, **changes})


def train(model, pruner, optimizer, steps):
    for _ in range(steps):
        model.train()
        model(**ARCHITECTURES["bert"].batch()).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        if pruner.can_shrink:
            pruner.shrink(optimizer)


def logits_of(model, kind="bert"):
    batch = ARCHITECTURES[kind].batch()
    with torch.no_grad():
        return model.eval()(**batch).logits


def widths(model):
    return [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]


# ---- Which units go ----


def scaled(model, factors):
    """Scale what the neurons of each layer write."""
    with torch.no_grad():
        for layer, factor in zip(model.bert.encoder.layer, factors, strict=True):
            layer.output.dense.weight.mul_(factor)
    return model


def test_the_layers_with_the_lowest_scores_lose_most_and_each_keeps_one():
    model = scaled(small_bert(), [1, 100, 1, 100])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, config(schedule="one_shot", begin=1, sparsity=0.5), total_steps=2)
    model.eval()
    model(**ARCHITECTURES["bert"].batch()).loss.backward()
    pruner.mask_gradients()
    scores = {name: score.clone() for name, score in pruner._structures.sums.items()}
    pruner.step(optimizer)
    left = [int(layer.output.dense.weight.any(0).sum()) for layer in model.bert.encoder.layer]
    assert sum(left) == 48
    assert min(left) >= 1
    kept = [model.bert.encoder.layer[index].output.dense.weight.any(0) for index in range(4)]
    by_layer = [scores[f"neurons of bert.encoder.layer.{index}"].float() for index in range(4)]
    lowest_kept = min(
        float(score[keep].sort().values[0]) for score, keep in zip(by_layer, kept, strict=True) if keep.sum() > 1
    )
    highest_gone = max(float(score[~keep].max()) for score, keep in zip(by_layer, kept, strict=True) if not keep.all())
    assert highest_gone <= lowest_kept


def test_one_unit_of_each_layer_stays_however_low_its_score():
    model = scaled(small_bert(), [1e-3, 1, 1, 1])
    pruner = Pruner(model, at_once(method="wanda", begin=1, sparsity=0.999), total_steps=2)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.0), 1)
    assert widths(model) == [1, 1, 1, 1]
    assert logits_of(model).isfinite().all()


def with_few_neurons_that_do_most():
    """A model in whose second layer few neurons have most of the magnitude."""
    torch.manual_seed(0)
    model = small_bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[:, :4] *= 20
    return model


def test_magnitudes_are_compared_within_what_is_usual_in_a_layer():
    plain = with_few_neurons_that_do_most()
    larger = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in larger.bert.encoder.layer[0].parameters():
            parameter.mul_(10)
    for model in (plain, larger):
        Pruner(model, at_once(sparsity=0.5), total_steps=1).shrink()
    assert widths(plain) == widths(larger)
    assert widths(plain)[1] < min(widths(plain)[index] for index in (0, 2, 3))


# ---- Widths that are multiples ----


@pytest.mark.parametrize("structure", ["neurons", "heads"])
def test_each_layer_keeps_a_multiple_at_every_update_and_the_share_is_met_to_the_nearest(structure):
    torch.manual_seed(0)
    model = small_bert(num_attention_heads=8)
    round_to = 4 if structure == "neurons" else 2
    pruner = Pruner(model, config(structure, sparsity=0.6, round_to=round_to), total_steps=STEPS)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    of = 24 if structure == "neurons" else 8
    for _ in range(4):
        train(model, pruner, optimizer, 1)
        dropped = [
            of - int(layer.output.dense.weight.any(0).sum())
            if structure == "neurons"
            else of - int(layer.attention.output.dense.weight.view(16, of, -1).any(2).any(0).sum())
            for layer in model.bert.encoder.layer
        ]
        assert not any(number % round_to for number in dropped)
    train(model, pruner, optimizer, STEPS - 4)
    left = [len(units["kept"]) for units in pruner.removed["units"].values()]
    assert not any(number % round_to for number in left)
    assert len(set(left)) > 1
    assert abs(sum(left) - 0.4 * 4 * of) <= round_to / 2


def test_blocks_with_the_lowest_means_leave_first_and_one_stays_in_each_layer():
    model = with_few_neurons_that_do_most()
    means = []
    for index, layer in enumerate(model.bert.encoder.layer):
        # magnitudes of a layer are compared after division by their norm
        rows = (layer.intermediate.dense.weight.detach() ** 2).sum(1) + layer.intermediate.dense.bias.detach() ** 2
        scores = (rows + (layer.output.dense.weight.detach() ** 2).sum(0)).double()
        ascending = (scores / scores.norm()).sort().values.view(-1, 8).mean(1)
        means += [(float(mean), index) for mean in ascending[:-1]]
    Pruner(model, at_once(sparsity=0.5, round_to=8), total_steps=1).shrink()
    expected = [24, 24, 24, 24]
    for _, index in sorted(means)[:6]:
        expected[index] -= 8
    assert widths(model) == expected
    assert expected[1] == 8
    Pruner(model, at_once(sparsity=0.99, round_to=8), total_steps=1).shrink()
    assert widths(model) == [8, 8, 8, 8]


@pytest.mark.parametrize(("width", "sparsity", "left"), [(24, 0.3, 16), (24, 0.5, 8), (48, 0.75, 16)])
def test_as_many_leave_each_layer_as_the_nearest_multiple(width, sparsity, left):
    model = small_bert(intermediate_size=width)
    Pruner(model, at_once(scope="layer", sparsity=sparsity, round_to=8), total_steps=1).shrink()
    assert widths(model) == [left] * 4


def test_what_is_gone_already_is_filled_up_to_a_multiple():
    model = small_bert()
    with torch.no_grad():
        layer = model.bert.encoder.layer[1]
        layer.intermediate.dense.weight[:3] = 0
        layer.intermediate.dense.bias[:3] = 0
        layer.output.dense.weight[:, :3] = 0
    Pruner(model, at_once(sparsity=0.25, round_to=4), total_steps=1).shrink()
    assert not any(width % 4 for width in widths(model))
    assert widths(model)[1] <= 20
    assert sum(widths(model)) == 72


def test_two_of_four_fit_widths_that_are_multiples():
    model = with_few_neurons_that_do_most()
    Pruner(model, at_once(sparsity=0.5, round_to=4), total_steps=1).shrink()
    assert len(set(widths(model))) > 1
    pruner = Pruner(model, PruningConfig(pattern="2:4", schedule="one_shot", begin=0, end=None), total_steps=1)
    for layer in model.bert.encoder.layer:
        groups = layer.output.dense.weight.view(16, -1, 4)
        assert int((groups != 0).sum(2).max()) == 2
    assert pruner.sparsity == 0.5


def test_a_number_that_the_layers_are_no_multiple_of_is_refused():
    with pytest.raises(
        StructureError,
        match=r"round_to: expected a divisor of the 24 neurons of bert\.encoder\.layer\.0, such as 2; got 10",
    ):
        Pruner(small_bert(), at_once(round_to=10), total_steps=1)


# ---- What is left ----


@pytest.mark.parametrize(
    ("kind", "build"),
    [
        ("bert", small_bert),
        ("llama", lambda: llama(num_attention_heads=4, num_key_value_heads=2)),
        ("gpt2", gpt2),
        ("vit", vit),
    ],
)
@pytest.mark.parametrize("structure", ["neurons", "heads"])
def test_the_smaller_model_answers_as_the_masked_one_and_opens_equal(tmp_path, kind, build, structure):
    torch.manual_seed(0)
    model = build()
    [family] = find_families(model, structure)
    pruner = Pruner(model, at_once(structure, sparsity=0.5), total_steps=1)
    masked = logits_of(model, kind)
    pruner.shrink()
    torch.testing.assert_close(logits_of(model, kind), masked, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    pruner.save(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, kind), logits_of(model, kind))
    left = [len(one["kept"]) for one in pruner.removed["units"].values()]
    assert sum(left) == sum(group.units for group in family.groups) // 2


_SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_WIDER = _SIZES | {"intermediate_size": 24, "pad_token_id": 0}
_DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True, "position_buckets": 4}
_SPECIAL = {"bos_token_id": 2, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}
_OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}
LIKE_BERT = {
    "Roberta": _WIDER | {"max_position_embeddings": 32},
    "Electra": _WIDER | {"embedding_size": 16},
    "DistilBert": {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24},
    "DebertaV2": _WIDER | _DEBERTA | {"max_relative_positions": 8},
    "ModernBert": _WIDER | _SPECIAL,
    "OPT": _SIZES | _OPT,
}


@pytest.mark.parametrize("name", LIKE_BERT)
def test_heads_of_models_like_bert_are_removed_and_open_equal(tmp_path, name):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**LIKE_BERT[name])
    model = getattr(transformers, f"{name}Model")(config).eval()
    ids = torch.arange(3, 11)[None]
    pruner = Pruner(model, at_once("heads", sparsity=0.5), total_steps=1)
    with torch.no_grad():
        masked = model(ids)[0]
        pruner.shrink()
        torch.testing.assert_close(model(ids)[0], masked, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(ids)[0], model(ids)[0])
    assert sum(len(one["kept"]) for one in pruner.removed["units"].values()) == 4


def test_both_towers_of_a_model_with_two_configurations_have_their_own_widths(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = tower | {"vocab_size": 64, "intermediate_size": 24, "max_position_embeddings": 16, "eos_token_id": 2}
    vision = tower | {"intermediate_size": 20, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = transformers.CLIPModel(config).eval()
    batch = {"input_ids": torch.arange(3, 11).repeat(2, 1), "pixel_values": torch.randn(2, 3, 8, 8)}
    configs = [at_once(structure, sparsity=0.5) for structure in ("neurons", "heads")]
    pruner = Pruner(model, configs, total_steps=1, example=batch)
    with torch.no_grad():
        masked = model(**batch).logits_per_image
        pruner.shrink()
        torch.testing.assert_close(model(**batch).logits_per_image, masked, rtol=1e-5, atol=1e-6)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again(**batch).logits_per_image, model(**batch).logits_per_image)
    for tower in (model.text_model, model.vision_model):
        left = [layer.mlp.fc1.out_features for layer in tower.encoder.layers]
        assert left == [one.intermediate_size for one in tower.config.per_layer_config]
    assert per_layer.needs_import(again.config)


def test_heads_of_bert_leave_the_same_number_in_each_layer_by_default(caplog):
    model = small_bert()
    pruner = Pruner(model, at_once("heads", scope="layer", sparsity=0.5), total_steps=1)
    assert "import hf_prune" in caplog.text
    masked = logits_of(model)
    pruner.shrink()
    assert torch.equal(logits_of(model), masked)
    assert [layer.attention.self.query.out_features for layer in model.bert.encoder.layer] == [8] * 4
    values = model.config.to_dict()
    assert values["per_layer_config"] == {str(index): {"num_attention_heads": 2} for index in range(4)}
    assert values["head_dim"] == 4


# ---- In as few values as possible ----


@pytest.mark.parametrize("by", ["scope", "shrink"])
def test_layers_that_end_alike_are_saved_with_one_number_for_all(tmp_path, by):
    torch.manual_seed(0)
    model = llama(num_attention_heads=4, num_key_value_heads=2)
    neurons, heads = (find_families(model, structure)[0] for structure in ("neurons", "heads"))
    with torch.no_grad():
        for group, kept in [(neurons.groups[0], 8), (neurons.groups[1], 8), (heads.groups[0], 1), (heads.groups[1], 1)]:
            for part in group.all_parts:
                weight = model.get_parameter(part.name)
                weight.index_fill_(part.dim, part.indices(torch.arange(kept, group.units)), 0)
    whole = logits_of(model, "llama")
    if by == "scope":
        share = 1 - 8 / neurons.groups[0].units
        Pruner(model, [at_once(sparsity=share), at_once("heads", sparsity=0.5)], total_steps=1).shrink()
    else:
        shrink(model, per_layer=True)
    torch.testing.assert_close(logits_of(model, "llama"), whole, rtol=1e-5, atol=1e-6)
    assert not per_layer.has_overrides(model.config)
    saved = model.config.to_dict()
    assert "per_layer_config" not in saved
    assert (saved["intermediate_size"], saved["num_attention_heads"], saved["num_key_value_heads"]) == (8, 2, 1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path), "llama"), logits_of(model, "llama"))


def test_layers_that_end_alike_after_they_differed_are_saved_with_one_number_for_all():
    model = zeroed([3, 0, 20, 8])
    shrink(model, per_layer=True)
    assert per_layer.has_overrides(model.config)
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[4:] = 0
            layer.intermediate.dense.bias[4:] = 0
            layer.output.dense.weight[:, 4:] = 0
    expected = logits_of(model)
    shrink(model, per_layer=True)
    assert widths(model) == [4] * 4
    assert "per_layer_config" not in model.config.to_dict()
    assert model.config.intermediate_size == 4
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("build", [small_bert, lambda: llama(num_attention_heads=4, num_key_value_heads=2)])
def test_the_configuration_says_no_more_of_units_of_which_none_are_removed(build, scope):
    model = build()
    before = model.config.to_dict()
    few = at_once("heads", sparsity=0.02, scope=scope)
    Pruner(model, [at_once(sparsity=0.5, scope="layer"), few], total_steps=1).shrink()
    changed = {name for name, value in model.config.to_dict().items() if value != before.get(name)}
    assert changed == {"intermediate_size"}


def test_a_run_whose_layers_end_alike_goes_on_from_its_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = zeroed([12, 12, 12, 12])
    whole = copy.deepcopy(model)
    pruner = Pruner(model, at_once(sparsity=0.5), total_steps=1)
    pruner.shrink()
    assert widths(model) == [12] * 4
    pruner.save(tmp_path)
    resumed = Pruner(whole, at_once(sparsity=0.5))
    resumed.cut_as_saved(tmp_path)
    assert whole.config.to_dict() == model.config.to_dict()
    assert all(map(torch.equal, model.state_dict().values(), whole.state_dict().values()))


def configs():
    return [config(), config("heads", sparsity=0.5), config("layers", sparsity=0.25, scope="layer")]


def test_layers_that_are_left_take_their_widths_along():
    model = small_bert()
    pruner = Pruner(model, configs(), total_steps=STEPS)
    train(model, pruner, torch.optim.AdamW(model.parameters(), lr=1e-2), STEPS)
    units = pruner.removed["units"]
    kept = [index for index in range(4) if units[f"layers of bert.encoder.layer.{index}"]["kept"]]
    assert len(kept) == 3
    assert widths(model) == [len(units[f"neurons of bert.encoder.layer.{index}"]["kept"]) for index in kept]
    values = model.config.per_layer_config
    assert [values[index].intermediate_size for index in range(3)] == widths(model)
    rebuilt = type(model)(model.config)
    assert {name: one.shape for name, one in rebuilt.named_parameters()} == {
        name: one.shape for name, one in model.named_parameters()
    }


def test_a_loop_goes_on_with_the_moments_of_what_is_left():
    model = small_bert()
    pruner = Pruner(model, config(), total_steps=STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, pruner, optimizer, 4)
    pruner_shrinks, pruner.shrink = pruner.shrink, lambda optimizer: None
    train(model, pruner, optimizer, 1)
    weight = model.bert.encoder.layer[0].output.dense.weight
    moment = optimizer.state[weight]["exp_avg"].clone()
    kept = pruner.masks["bert.encoder.layer.0.output.dense.weight"].any(0)
    pruner.shrink = pruner_shrinks
    pruner.shrink(optimizer)
    small = model.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(optimizer.state[small]["exp_avg"], moment[:, kept])
    train(model, pruner, optimizer, 3)
    assert pruner.sparsity == pruner.target_sparsity == 0.75


@pytest.mark.parametrize("step", [2, 6])
@pytest.mark.parametrize("with_the_small_model", [True, False])
def test_a_loop_resumes_before_and_after_the_units_are_cut_out(tmp_path, step, with_the_small_model):
    torch.manual_seed(1)
    model = small_bert()
    whole = copy.deepcopy(model)
    pruner = Pruner(model, configs(), total_steps=STEPS)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=1e-2), step)
    pruner.save(tmp_path)
    model.save_pretrained(tmp_path)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=1e-2), STEPS - step)
    again = type(model).from_pretrained(tmp_path) if with_the_small_model else whole
    resumed = Pruner(again, configs())
    resumed.cut_as_saved(tmp_path)
    again.load_state_dict(type(model).from_pretrained(tmp_path).state_dict())
    resumed.resume(STEPS, tmp_path)
    train(again, resumed, torch.optim.SGD(again.parameters(), lr=1e-2), STEPS - step)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert resumed.sparsity == pruner.sparsity
    assert resumed.removed == pruner.removed


@pytest.mark.parametrize("structure", ["neurons", "heads", "layers"])
def test_a_model_whose_layers_differ_can_be_pruned_further(structure):
    torch.manual_seed(0)
    model = small_bert()
    for one in ("neurons", "heads"):
        Pruner(model, at_once(one, sparsity=0.5), total_steps=1).shrink()
    before = [layer.intermediate.dense.out_features for layer in model.bert.encoder.layer]
    further = at_once(structure, sparsity=0.5, scope="layer" if structure == "layers" else "global")
    pruner = Pruner(model, further, total_steps=1)
    masked = logits_of(model)
    pruner.shrink()
    torch.testing.assert_close(logits_of(model), masked, rtol=1e-5, atol=1e-6)
    if structure == "neurons":
        assert sum(widths(model)) == sum(before) // 2
    elif structure == "layers":
        assert len(widths(model)) == 2
        assert set(widths(model)) <= set(before)


def test_the_plan_says_what_is_removed_of_all_layers_together():
    model = small_bert()
    pruner = Pruner(model, config(sparsity=0.5), total_steps=STEPS)
    plan = pruner.plan().of_model(model)
    [units] = plan.units
    assert (units.path, units.of, units.removed) == ("bert.encoder.layer", 96, 48)
    train(model, pruner, torch.optim.AdamW(model.parameters(), lr=1e-2), STEPS)
    assert plan.weights_left == sum(parameter.numel() for parameter in model.parameters())
    assert pruner.sparsity == plan.final_sparsity == 0.5


# ---- hf_prune.shrink ----


def zeroed(gone):
    """A BERT some of whose neurons are zero: so many of each layer."""
    model = small_bert()
    with torch.no_grad():
        for layer, number in zip(model.bert.encoder.layer, gone, strict=True):
            layer.intermediate.dense.weight[:number] = 0
            layer.intermediate.dense.bias[:number] = 0
            layer.output.dense.weight[:, :number] = 0
    return model


def test_shrink_cuts_each_layer_by_itself_if_asked(caplog):
    gone = [3, 0, 20, 8]
    model, uniform = zeroed(gone), zeroed(gone)
    expected = logits_of(model)
    assert widths(shrink(model, per_layer=True)) == [24 - number for number in gone]
    assert torch.equal(logits_of(model), expected)
    assert not caplog.text
    assert widths(shrink(uniform)) == [24] * 4
    assert "Nothing was cut out: not every layer has neurons or heads" in caplog.text
    assert not per_layer.has_overrides(uniform.config)


def test_shrink_leaves_heads_that_only_differ_per_layer_unless_asked():
    model = small_bert()
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            for linear in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                linear.weight[:4] = 0
                linear.bias[:4] = 0
            layer.attention.output.dense.weight[:, :4] = 0
    expected = logits_of(model)
    shrink(model)
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 16
    shrink(model, per_layer=True)
    assert model.bert.encoder.layer[0].attention.self.query.out_features == 12
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-5, atol=1e-6)


# ---- What is refused ----


def test_what_cannot_differ_from_layer_to_layer_is_refused(monkeypatch):
    with pytest.raises(StructureError, match=r"expected one stack of layers with neurons .* \(scope='layer'\)"):
        Pruner(t5(), at_once(), total_steps=1)
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    bart = transformers.BartModel(
        transformers.BartConfig(vocab_size=64, encoder_attention_heads=2, decoder_attention_heads=2, **sizes)
    )
    with pytest.raises(StructureError, match="no field of BartConfig sets the number of heads of BartModel alone"):
        Pruner(bart, at_once("heads"), total_steps=1)
    monkeypatch.setattr("hf_prune.structure.coupled.can_differ", lambda: False)
    monkeypatch.setattr("hf_prune.structure.heads.can_differ", lambda: False)
    with pytest.raises(StructureError, match=r"scope: expected transformers 5\.15 or later .* got 5\."):
        Pruner(small_bert(), at_once(), total_steps=1)
    with pytest.raises(StructureError, match="no field of BertConfig sets the number of heads"):
        Pruner(small_bert(), at_once("heads", scope="layer"), total_steps=1)


def test_heads_of_layers_that_share_a_position_bias_are_refused():
    model = transformers.MPNetModel(
        transformers.MPNetConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        )
    )  # fmt: skip
    with pytest.raises(StructureError, match=r"heads of encoder\.layer\.0\.attention.* cannot be removed"):
        Pruner(model, at_once("heads"), total_steps=1)


# ---- Shares by layer ----


def test_overrides_say_how_many_leave_each_layer():
    model = small_bert()
    overrides = {r"bert\.encoder\.layer\.0\..*": 0.5, r".*layer\.[02]\..*": 0.25}
    pruner = Pruner(model, at_once(scope="layer", sparsity=0.75, overrides=overrides), total_steps=1)
    plan = pruner.plan().of_model(model)
    assert [one.left for one in sorted(plan.units, key=lambda one: one.path)] == [12, 6, 18, 6]
    pruner.step()
    before = logits_of(model)
    pruner.shrink()
    assert widths(model) == [12, 6, 18, 6]
    assert torch.allclose(logits_of(model), before, atol=1e-6)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.weights_left


def test_layers_without_an_override_are_ranked_together_if_asked():
    model = scaled(small_bert(), [1, 1, 100, 100])
    overrides = {r".*layer\.0\..*": 0.25}
    Pruner(model, at_once(sparsity=0.5, overrides=overrides), total_steps=1).step()
    left = [int(layer.output.dense.weight.any(0).sum()) for layer in model.bert.encoder.layer]
    assert left[0] == 18
    assert sum(left[1:]) == 36


def test_an_override_that_matches_no_units_is_refused():
    with pytest.raises(TargetError, match=r"overrides: .*layer.*9.* matches no parameter"):
        Pruner(small_bert(), at_once(scope="layer", overrides={r".*layer\.9\..*": 0.5}), total_steps=1)


@pytest.mark.parametrize("gone", [[1], [1, 3]])
def test_only_the_layers_that_are_named_can_be_removed(gone):
    model = small_bert()
    layers = list(model.bert.encoder.layer)
    targets = [rf".*layer\.{index}\..*" for index in gone]
    named = at_once("layers", scope="layer", sparsity=len(gone) / 4, targets=targets)
    pruner = Pruner(model, named, total_steps=1)
    plan = pruner.plan().of_model(model)
    assert [(one.path, one.of, one.removed) for one in plan.units] == [("bert.encoder.layer", 4, len(gone))]
    pruner.step()
    pruner.shrink()
    assert list(model.bert.encoder.layer) == [layer for index, layer in enumerate(layers) if index not in gone]
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.weights_left


def test_of_the_layers_that_are_named_as_many_go_as_the_sparsity_says():
    model = small_bert()
    first = model.bert.encoder.layer[0]
    pruner = Pruner(model, at_once("layers", scope="layer", sparsity=0.5, exclude=[r".*layer\.0\..*"]), total_steps=1)
    pruner.step()
    pruner.shrink()
    assert len(model.bert.encoder.layer) == 2
    assert model.bert.encoder.layer[0] is first


def test_fused_experts_are_not_ranked_over_layers():
    with pytest.raises(StructureError, match=r"scope: expected 'layer' for the neurons of experts .* multiples of 4"):
        Pruner(ARCHITECTURES["mixtral"].build(), at_once(), total_steps=1)
    with pytest.raises(StructureError, match=r"round_to: expected a multiple of 4 for the neurons of experts .* got 6"):
        Pruner(ARCHITECTURES["mixtral"].build(), at_once(round_to=6), total_steps=1)


def test_fused_experts_are_ranked_over_layers_in_multiples_that_they_can_have(tmp_path):
    model = ARCHITECTURES["mixtral"].build()
    with torch.no_grad():
        for parameter in model.model.layers[0].mlp.experts.parameters():
            parameter[0, :8] *= 30  # so that the other neurons of this layer rank low
    pruner = Pruner(model, at_once(sparsity=0.5, round_to=4), total_steps=1)
    pruner.shrink()
    left = {name: len(units["kept"]) for name, units in pruner.removed["units"].items()}
    assert not any(number % 4 for number in left.values())
    assert len(set(left.values())) > 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, "mixtral"), logits_of(model, "mixtral"))


def test_heads_of_all_layers_are_found_where_only_some_have_a_number_of_their_own():
    model = small_bert()
    some = {r".*layer\.1\..*": 0.5, ".*": 0.0}
    example = ARCHITECTURES["bert"].batch()
    pruner = Pruner(model, at_once("heads", scope="layer", overrides=some), total_steps=1, example=example)
    pruner.step()
    pruner.shrink()
    assert model.config.to_dict()["per_layer_config"] == {"1": {"num_attention_heads": 2}}
    (family,) = find_families(model, "heads")
    assert [group.units for group in family.groups] == [4, 2, 4, 4]
    again = Pruner(model, at_once("heads", sparsity=0.5), total_steps=1, example=example)
    again.step()
    masked = logits_of(model)
    again.shrink()
    assert sum(group.units for group in find_families(model, "heads")[0].groups) == 7
    assert torch.allclose(logits_of(model), masked, atol=1e-5)


def test_heads_that_layers_count_by_themselves_are_not_taken_for_neurons(caplog):
    model = small_bert()
    Pruner(model, at_once("heads", sparsity=0.5), total_steps=1).shrink()
    [family] = find_families(model, "neurons")
    assert [field.path for field in family.fields] == [("intermediate_size",)]
    caplog.clear()
    Pruner(model, at_once("neurons", sparsity=0.5), total_steps=1)
    assert "they are not pruned" not in caplog.text
