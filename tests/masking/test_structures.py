"""Structures in a loop of one's own: which units go, exact counts on the way, and what is cut out."""

from dataclasses import replace

import pytest
import torch
from models import ARCHITECTURES, bert, llama, mixtral
from shrunk import save_shrunk

from hf_prune import Pruner, PruningConfig, PruningConfigError, PruningStateError, StructureError, TargetError
from hf_prune.structure.coupled import find_families
from hf_prune.structure.record import STRUCTURE_NAME

METHODS = ["magnitude", "random", "activation", "wanda", "taylor"]


def config(structure="neurons", **changes):
    schedule = {"schedule": "linear", "begin": 1, "end": 5, "frequency": 1}
    return PruningConfig(**{"structure": structure, "method": "taylor", "sparsity": 0.75, **schedule, **changes})


def train(model, pruner, optimizer, steps, kind="bert"):
    """Steps of a loop, with the numbers of dropped neurons of the first layer after each."""
    for _ in range(steps):
        model.train()
        model(**ARCHITECTURES[kind].batch()).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
        yield sum(not row.any() for row in pruner.masks.get("bert.encoder.layer.0.intermediate.dense.weight", ()))


@pytest.mark.parametrize("method", METHODS)
def test_units_are_masked_on_schedule_in_all_their_tensors(method):
    model = bert(hidden_dropout_prob=0.0)
    pruner = Pruner(model, config(method=method), total_steps=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    dropped = list(train(model, pruner, optimizer, 8))
    assert dropped == [0, 4, 9, 14, 18, 18, 18, 18]  # round(24 * share), half to even
    for layer in model.bert.encoder.layer:
        gone = ~layer.intermediate.dense.weight.any(dim=1)
        assert int(gone.sum()) == 18
        assert not layer.intermediate.dense.bias[gone].any()
        assert not layer.output.dense.weight[:, gone].any()
        assert layer.output.dense.weight[:, ~gone].all()
    assert pruner.sparsity == pruner.target_sparsity == 0.75


def scores_by_hand(model, batch, structure):
    """|d loss / d factor| of each unit's output, from the weights and gradients of what reads it, for one step."""
    model.zero_grad()
    model(**batch).loss.backward()
    found = {}
    for family in find_families(model, structure):
        for group in family.groups:
            [reader] = group.readers
            weight = model.get_parameter(reader.name)
            [(_, width)] = reader.runs
            found[group.name] = (weight * weight.grad).sum(0).view(group.units, width).sum(1).abs().double()
    model.zero_grad()
    return found


@pytest.mark.parametrize("structure", ["neurons", "heads"])
def test_taylor_removes_the_units_without_which_the_loss_changes_least(structure):
    model = bert() if structure == "neurons" else llama(num_attention_heads=4, num_key_value_heads=4)
    model.eval()
    batch = ARCHITECTURES["bert" if structure == "neurons" else "llama"].batch()
    expected = scores_by_hand(model, batch, structure)
    pruner = Pruner(model, config(structure, schedule="one_shot", begin=1, sparsity=0.5), total_steps=2)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    model(**batch).loss.backward()
    pruner.mask_gradients()
    frozen.step()
    pruner.step(frozen)
    for family in find_families(model, structure):
        for group in family.groups:
            [reader] = group.readers
            [(_, width)] = reader.runs
            kept = pruner.masks[reader.name].any(0).view(group.units, width).any(1)
            lowest = expected[group.name].argsort(stable=True)[: group.units // 2]
            assert torch.equal((~kept).nonzero().squeeze(1), lowest.sort().values), group.name


def test_a_layer_that_is_masked_is_skipped_and_counted_in_whole_layers():
    model = bert(num_hidden_layers=4).eval()
    at_once = config("layers", sparsity=0.5, method="magnitude", schedule="one_shot", begin=0)
    pruner = Pruner(model, at_once, total_steps=2)
    batch = ARCHITECTURES["bert"].batch()
    masked = model(**batch).logits
    gone = [index for index in range(4) if not model.bert.encoder.layer[index].output.dense.weight.any()]
    assert len(gone) == 2
    kept = [layer for index, layer in enumerate(model.bert.encoder.layer) if index not in gone]
    pruner.shrink()
    assert list(model.bert.encoder.layer) == kept
    assert torch.equal(model(**batch).logits, masked)


def test_the_plan_counts_neurons_of_layers_that_are_removed_once():
    model = bert(num_hidden_layers=4)
    pruner = Pruner(model, [config(), config("layers", sparsity=0.5)], total_steps=8)
    assert pruner.target_sparsity == pruner.plan().final_sparsity
    list(train(model, pruner, torch.optim.AdamW(model.parameters(), lr=1e-2), 8))
    assert pruner.sparsity == pytest.approx(pruner.target_sparsity)
    pruner.shrink()
    assert pruner.sparsity == pytest.approx(pruner.target_sparsity)


def test_a_loop_goes_on_with_the_moments_of_what_is_left():
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pruner = Pruner(model, config(), total_steps=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    list(train(model, pruner, optimizer, 5))
    assert pruner.can_shrink
    weight = model.bert.encoder.layer[0].output.dense.weight
    moment = optimizer.state[weight]["exp_avg"].clone()
    kept = pruner.masks["bert.encoder.layer.0.output.dense.weight"].any(0)
    pruner.shrink(optimizer)
    assert not pruner.can_shrink
    small = model.bert.encoder.layer[0].output.dense.weight
    assert torch.equal(optimizer.state[small]["exp_avg"], moment[:, kept])
    assert {id(one) for group in optimizer.param_groups for one in group["params"]} == set(map(id, model.parameters()))
    list(train(model, pruner, optimizer, 3))
    assert pruner.sparsity == 0.75
    assert pruner.at_final_sparsity


@pytest.mark.parametrize("step", [2, 6])
def test_a_loop_resumes_before_and_after_the_units_are_cut_out(tmp_path, step):
    torch.manual_seed(1)
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pruner = Pruner(model, config(), total_steps=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    list(train(model, pruner, optimizer, step))
    if pruner.can_shrink:
        pruner.shrink(optimizer)
    pruner.save(tmp_path)
    model.save_pretrained(tmp_path)
    list(train(model, pruner, optimizer, 8 - step))
    again = type(model).from_pretrained(tmp_path)
    resumed = Pruner(again, config())
    resumed.resume(8, tmp_path)
    list(train(again, resumed, torch.optim.SGD(again.parameters(), lr=1e-2), 8 - step))
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert resumed.sparsity == pruner.sparsity == resumed.target_sparsity == 0.75
    assert resumed.removed == pruner.removed


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model = bert()
    pruner = Pruner(model, config(method="magnitude", schedule="one_shot", begin=0), total_steps=1)
    pruner.shrink()
    pruner.save(tmp_path)
    other = Pruner(bert(intermediate_size=48), config(method="magnitude", schedule="one_shot", begin=0))
    with pytest.raises(PruningStateError, match="expected a model with intermediate_size 24, or 6 after"):
        other.resume(1, tmp_path)


def test_an_optimizer_with_state_of_another_shape_is_refused_and_nothing_is_changed():
    model = bert()
    pruner = Pruner(model, config(method="magnitude", schedule="one_shot", begin=1), total_steps=2)
    optimizer = torch.optim.Adam(model.parameters())
    list(train(model, pruner, optimizer, 1))
    weight = model.bert.encoder.layer[0].output.dense.weight
    optimizer.state[weight]["rows"] = torch.ones(16)
    with pytest.raises(StructureError, match="Adam keeps 'rows' of another shape than its parameter"):
        pruner.shrink(optimizer)
    assert weight.shape == (16, 24)
    assert pruner.removed is None
    assert pruner.can_shrink


def test_weights_that_read_units_must_be_trained_for_taylor():
    model = bert()
    model.bert.encoder.requires_grad_(False)
    with pytest.raises(ValueError, match="methods that read gradients cannot be used for weights that are not trained"):
        Pruner(model, config())


@pytest.mark.parametrize("structure", ["neurons", "layers"])
def test_one_unit_stays_however_high_the_sparsity(structure):
    model = bert()
    at_once = config(structure, method="magnitude", sparsity=0.999, schedule="one_shot", begin=0)
    pruner = Pruner(model, at_once, total_steps=1)
    assert pruner.sparsity == pruner.target_sparsity
    pruner.shrink()
    assert (model.config.intermediate_size, model.config.num_hidden_layers) == (
        (1, 2) if structure == "neurons" else (24, 1)
    )
    assert model(**ARCHITECTURES["bert"].batch()).logits.isfinite().all()


def test_rows_that_the_product_of_experts_cannot_have_are_refused_at_once():
    with pytest.raises(StructureError, match=r"a number of neurons that 4 divides.*which leaves 6 of 24"):
        Pruner(mixtral(), config(sparsity=0.75))
    model = mixtral()
    pruner = Pruner(model, config(sparsity=0.5, schedule="one_shot", begin=0, method="magnitude"), total_steps=1)
    pruner.shrink()
    model(**ARCHITECTURES["mixtral"].batch())["loss"].backward()
    eager = type(model)._from_config(mixtral().config, experts_implementation="eager")
    assert Pruner(eager, config(sparsity=0.75)).targets


def test_the_record_of_another_model_is_removed_where_nothing_was_cut_out(tmp_path):
    pruner = Pruner(bert(), config(method="magnitude", schedule="one_shot", begin=0), total_steps=1)
    pruner.shrink()
    pruner.save(tmp_path)
    assert (tmp_path / STRUCTURE_NAME).exists()
    Pruner(bert(), PruningConfig(sparsity=0.5), total_steps=1).save(tmp_path)
    assert not (tmp_path / STRUCTURE_NAME).exists()


@pytest.mark.parametrize("structure", ["neurons", "layers"])
def test_several_configurations_remove_the_same_units_one_after_another(structure):
    model = bert(num_hidden_layers=4)
    configs = [config(structure, sparsity=0.25, end=2), config(structure, sparsity=0.5, begin=3)]
    pruner = Pruner(model, configs, total_steps=8)
    plan = pruner.plan()
    assert {one.removed for one in plan.units} == ({12} if structure == "neurons" else {2})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    list(train(model, pruner, optimizer, 5))
    assert pruner.sparsity == pytest.approx(plan.final_sparsity)
    pruner.shrink(optimizer)
    assert pruner.removed["parameters"][1] == plan.of_model(bert(num_hidden_layers=4)).weights_left
    list(train(model, pruner, optimizer, 3))
    left = (model.config.intermediate_size, model.config.num_hidden_layers)
    assert left == ((12, 4) if structure == "neurons" else (24, 2))


def test_two_configurations_do_not_remove_the_same_units_at_the_same_time():
    with pytest.raises(PruningConfigError, match="expected configuration 2 to begin at or after step 5"):
        Pruner(bert(), [config(sparsity=0.25), config(sparsity=0.5)], total_steps=8)


@pytest.mark.parametrize("step", [5, 6])
def test_weights_of_the_layers_that_are_left_have_the_configured_zeros(step):
    model = bert(num_hidden_layers=4)
    weights = PruningConfig(sparsity=0.5, begin=step, end=7, frequency=1)
    pruner = Pruner(model, [config("layers", sparsity=0.5, method="magnitude"), weights], total_steps=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    list(train(model, pruner, optimizer, 5))
    pruner.shrink(optimizer)
    list(train(model, pruner, optimizer, 3))
    assert pruner.at_final_sparsity
    assert pruner.sparsity == pruner.target_sparsity
    matrices = [one for name, one in model.named_parameters() if "encoder.layer" in name and one.dim() == 2]
    assert [int((one == 0).sum()) / one.numel() for one in matrices] == [0.5] * 12


def test_scores_of_gradients_are_added_up_while_layers_are_skipped():
    model = bert(num_hidden_layers=4)
    pruner = Pruner(model, [config(), config("layers", sparsity=0.5)], total_steps=8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {}
    for _ in train(model, pruner, optimizer, 4):
        sums = {name: score.sum().item() for name, score in pruner._structures.sums.items()}
        kept = pruner._structures.layers
        grew = [
            sums[f"layers of bert.encoder.layer.{index}"] > before.get(index, 0) for index in range(4) if kept[index]
        ]
        assert all(grew)
        before = {index: sums[f"layers of bert.encoder.layer.{index}"] for index in range(4)}
    assert kept.count(False) == 2


def test_what_was_changed_in_the_modules_stays_when_units_are_cut_out():
    model = bert(num_hidden_layers=4)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    configs = [
        config(structure, method="magnitude", schedule="one_shot", begin=0) for structure in ("neurons", "layers")
    ]
    Pruner(model, configs, total_steps=1).shrink()
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == 6


def test_another_model_is_pruned_from_the_beginning():
    at_once = config(method="magnitude", schedule="one_shot", begin=0)
    pruner = Pruner(bert(), at_once, total_steps=1)
    pruner.shrink()
    other = bert()
    pruner.start(1, other)
    assert pruner.removed is None
    assert pruner.target_sparsity == 0.75
    pruner.shrink()
    assert other.config.intermediate_size == 6


def test_a_model_is_not_cut_before_the_schedule_has_ended():
    model = bert()
    pruner = Pruner(model, config(method="magnitude"))
    with pytest.raises(PruningStateError, match="has not been started"):
        pruner.shrink()
    pruner.start(8)
    with pytest.raises(PruningStateError, match="after step 5 at the latest"):
        pruner.shrink()
    list(train(model, pruner, torch.optim.AdamW(model.parameters()), 5))
    pruner.shrink()
    pruner.shrink()
    assert model.config.intermediate_size == 6


def test_a_model_that_its_configuration_does_not_describe_is_refused_at_once():
    model = bert()
    model.classifier = torch.nn.Linear(16, 2, bias=False)
    with pytest.raises(StructureError, match=r"got no classifier\.bias, where it builds one of shape \(2,\)"):
        Pruner(model, config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": 0.001}, "No neurons will be removed: sparsity=0.001 of 24 in each layer rounds to 0."),
        ({"structure": "layers", "sparsity": 0.1}, "No layers will be removed: sparsity=0.1 of 4 rounds to 0."),
        (
            {"structure": "layers", "targets": [r".*layer\.0\..*"]},
            "sparsity=0.75 is 3 of 4 layers, but only 1 of them can be removed",
        ),
    ],
)
def test_what_removes_nothing_or_less_than_asked_is_told(caplog, changes, words):
    Pruner(bert(num_hidden_layers=4), config(**changes), total_steps=8)
    assert words in caplog.text


@pytest.mark.parametrize("structure", ["neurons", "layers"])
def test_nothing_is_told_of_what_is_removed_as_asked_and_of_what_is_to_stay(caplog, structure):
    Pruner(bert(num_hidden_layers=4), config(structure), total_steps=8)
    Pruner(bert(num_hidden_layers=4), config(structure, sparsity=0.0), total_steps=8)
    Pruner(bert(num_hidden_layers=4), config(structure, sparsity=0.99), total_steps=8)
    assert not caplog.text


def test_a_configuration_that_takes_no_more_than_an_earlier_one_is_told(caplog):
    first, second = config(sparsity=0.5, end=4), config(sparsity=0.25, begin=4)
    Pruner(bert(), [first, second], total_steps=8)
    assert caplog.text.count("Configuration 2 (sparsity=0.25) changes nothing in") == 1
    caplog.clear()
    Pruner(bert(), [first, replace(second, sparsity=0.75)], total_steps=8)
    Pruner(bert(), [first, config("layers", sparsity=0.5)], total_steps=8)
    assert not caplog.text


@pytest.mark.parametrize("field", ["targets", "exclude"])
def test_an_expression_that_matches_no_parameter_is_refused(field):
    with pytest.raises(TargetError, match=f"{field}: 'nothing.*' matches no parameter name"):
        Pruner(bert(), config(**{field: ["nothing.*"]}))


def test_saving_before_the_masked_units_are_cut_out_is_told(tmp_path, caplog):
    pruner = Pruner(bert(), config(method="magnitude", schedule="one_shot", begin=0), total_steps=1)
    pruner.save(tmp_path)
    assert "the masked units are still in the model" in caplog.text
    caplog.clear()
    pruner.shrink()
    pruner.save(tmp_path)
    assert not caplog.text


def test_a_model_out_of_which_units_were_cut_says_how_to_resume_where_it_cannot_lose_as_many_again(tmp_path):
    of_layers = PruningConfig(structure="layers", sparsity=0.75, begin=0, end=1, frequency=1)
    save_shrunk(tmp_path, [of_layers])
    small = type(bert()).from_pretrained(tmp_path)
    with pytest.raises(StructureError, match="to resume its training, give the model that it began with") as error:
        Pruner(small, of_layers)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(StructureError) as error:
        Pruner(bert(num_hidden_layers=1), of_layers)
    assert "resume" not in str(error.value)
