"""What layers cost and change is measured on the model itself, which is left as it was."""

import copy

import pytest
import torch
from models import ARCHITECTURES, bert, llama, t5

from hf_prune import Pruner, PruningConfig, PruningConfigError, StructureError
from hf_prune.structure.batches import first_rows, inputs_to_time, on_model
from hf_prune.structure.chosen import Chosen, read_chosen, write_chosen
from hf_prune.structure.coupled import families_of
from hf_prune.structure.latency import layer_paths, measure_layers
from hf_prune.structure.latency_table import LATENCY_NAME
from hf_prune.structure.sensitivity import measure_changes
from hf_prune.structure.targeting import find_structure

SHARES = {"neurons": [0.5, 0.75]}


def neurons_of(model):
    return {"neurons": families_of(model, "neurons")}


def wide_bert():
    torch.manual_seed(0)
    return bert(num_hidden_layers=4, hidden_size=32, intermediate_size=256, num_attention_heads=4).eval()


def batch_of(kind="bert"):
    return ARCHITECTURES[kind].batch()


# ---- Inputs ----


def test_the_sample_of_median_length_is_timed_without_its_padding():
    ids = torch.arange(1, 25).view(3, 8)
    mask = torch.tensor([[1] * 8, [0] * 5 + [1] * 3, [1] * 2 + [0] * 6])
    inputs = inputs_to_time({"input_ids": ids, "attention_mask": mask, "other": "as it is"}, 2, None)
    assert torch.equal(inputs["input_ids"], ids[1:2, 5:].repeat(2, 1))
    assert inputs["attention_mask"].tolist() == [[1] * 3] * 2
    assert inputs["other"] == "as it is"


@pytest.mark.parametrize("length", [1, 3, 20])
def test_a_length_cuts_or_repeats_the_tokens(length):
    ids = torch.arange(1, 9).view(1, 8)
    inputs = inputs_to_time({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, length)
    assert inputs["input_ids"].tolist() == [[index % 8 + 1 for index in range(length)]]
    assert inputs["attention_mask"].tolist() == [[1] * length]


def test_a_length_is_refused_for_images():
    with pytest.raises(PruningConfigError, match="target_length: must not be set for a model whose inputs are no"):
        inputs_to_time({"pixel_values": torch.zeros(2, 3, 8, 8)}, None, 16)
    assert inputs_to_time({"pixel_values": torch.zeros(2, 3, 8, 8)}, 5, None)["pixel_values"].shape == (5, 3, 8, 8)


def test_the_first_rows_are_those_of_all_tensors():
    batch = first_rows({"input_ids": torch.zeros(4, 2), "scale": torch.ones(3), "flag": True}, 1)
    assert (batch["input_ids"].shape, batch["scale"].shape, batch["flag"]) == ((1, 2), (3,), True)


# ---- Times ----


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5", "vit", "mixtral"])
def test_every_layer_has_times_that_add_up_to_those_of_the_model(kind):
    torch.manual_seed(0)
    model = ARCHITECTURES[kind].build().eval()
    before = copy.deepcopy(model.state_dict())
    inputs = on_model(batch_of(kind), model)
    with torch.no_grad():
        table = measure_layers(model, neurons_of(model), {"neurons": [1 / 3, 2 / 3]}, inputs)
        model(**inputs)
    assert list(table.layers) == layer_paths(model)
    added = table.rest_seconds + sum(layer.seconds for layer in table.layers.values())
    assert added == pytest.approx(table.seconds)
    for path, layer in table.layers.items():
        whole = sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
        assert layer.parameters == whole
        two_thirds, a_third = (layer.with_share["neurons"][share][1] for share in (1 / 3, 2 / 3))
        assert whole > two_thirds > a_third
        assert whole - two_thirds == pytest.approx(two_thirds - a_third, rel=0.1)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert not [module for module in model.modules() if "forward" in vars(module) or module._forward_hooks]


def test_layers_that_the_machine_runs_with_fewer_neurons_take_less_time():
    model = bert(hidden_size=64, intermediate_size=8192, num_hidden_layers=2).eval()
    inputs = {"input_ids": torch.ones(8, 32, dtype=torch.long)}
    with torch.no_grad():
        layer = next(iter(measure_layers(model, neurons_of(model), {"neurons": [0.9375]}, inputs).layers.values()))
    assert layer.with_share["neurons"][0.9375][0] < 0.7 * layer.seconds


def test_inputs_that_the_model_does_not_take_are_refused():
    words = r"BertForSequenceClassification does not run with inputs of the shapes .*; for a target, target_length and "
    with pytest.raises(StructureError, match=words):
        measure_layers(bert(), {}, {}, {"input_ids": torch.zeros(1, 99, dtype=torch.long)})


# ---- Changes ----


def test_the_changes_without_layers_are_those_of_the_outputs():
    model, batch = wide_bert(), {"input_ids": batch_of()["input_ids"]}
    with torch.no_grad():
        found = measure_changes(model, neurons_of(model), SHARES, batch)
        whole = model(**batch).logits
        for index, changes in enumerate(found.values()):
            smaller = copy.deepcopy(model)
            del smaller.bert.encoder.layer[index]
            smaller.config.num_hidden_layers = 3
            expected = (smaller(**batch).logits - whole).square().sum() / whole.square().sum()
            assert changes.removal == pytest.approx(float(expected), rel=1e-4)
            half, quarter = (changes.with_share["neurons"][share] for share in (0.5, 0.75))
            assert 0 < half < quarter


def test_neurons_that_do_nothing_are_the_first_to_go_and_change_nothing():
    model, batch = wide_bert(), {"input_ids": batch_of()["input_ids"]}
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.weight[:, ::2] = 0
        before = copy.deepcopy(model.state_dict())
        found = measure_changes(model, neurons_of(model), SHARES, batch)
    for changes in found.values():
        assert changes.with_share["neurons"][0.5] == 0
        assert changes.with_share["neurons"][0.75] > 0
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


# ---- The choice ----


@pytest.mark.parametrize("build", [wide_bert, llama, t5], ids=["bert", "llama", "t5"])
def test_a_share_of_parameters_is_reached_with_the_fewest_removed(build):
    model = build()
    kind = type(model).__name__[:2].lower()
    batch = batch_of({"be": "bert", "ll": "llama", "t5": "t5"}[kind])
    dense = sum(parameter.numel() for parameter in model.parameters())
    chosen = find_structure(model, PruningConfig(target_parameters=0.8), batch)
    assert 0.6 * dense < chosen.candidate.parameters <= 0.8 * dense
    assert chosen.dense.parameters == dense
    assert {config.structure for config in chosen.configs} <= {"neurons", "heads", "layers"}
    assert chosen.off_by >= 0


def test_the_choice_is_written_and_read_and_leaves_model_and_random_numbers(tmp_path):
    model, batch = wide_bert().train(), batch_of()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    chosen = find_structure(model, PruningConfig(target_speedup=1.5, target_batch_size=2), batch, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    assert model.training
    assert chosen.conditions["inputs"]["input_ids"] == [2, 8]
    write_chosen(tmp_path, chosen)
    assert read_chosen(tmp_path) == chosen == Chosen.from_dict(chosen.to_dict())
    write_chosen(tmp_path, None)
    assert read_chosen(tmp_path) is None


@pytest.mark.widths_per_layer
@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "vit", "mixtral"])
def test_each_layer_gets_its_own_numbers_and_the_parameters_are_those_predicted(kind):
    torch.manual_seed(0)
    model, batch = ARCHITECTURES[kind].build(), batch_of(kind)
    dense = sum(parameter.numel() for parameter in model.parameters())
    config = PruningConfig(target_parameters=0.75, scope="global", method="magnitude", schedule="one_shot", begin=1)
    pruner = Pruner(model, config, total_steps=1, example=batch)
    chosen = pruner.chosen
    alike = find_structure(model, PruningConfig(target_parameters=0.75), batch).candidate
    assert chosen.candidate.parameters <= 0.75 * dense
    assert chosen.candidate.change <= 1.05 * alike.change  # costs are rounded to parts
    assert list(chosen.candidate.layers) == layer_paths(model)
    pruner.step()
    pruner.shrink()
    assert sum(parameter.numel() for parameter in model.parameters()) == chosen.candidate.parameters
    with torch.no_grad():
        model.eval()(**batch)


@pytest.mark.widths_per_layer
def test_layers_of_an_encoder_and_a_decoder_cannot_have_their_own_numbers():
    with pytest.raises(StructureError, match=r"scope: expected one stack of layers with neurons"):
        find_structure(t5(), PruningConfig(target_parameters=0.8, scope="global"), batch_of("t5"))


@pytest.mark.widths_per_layer
def test_a_table_without_heads_is_not_used_where_heads_are_removed(tmp_path):
    model, batch = wide_bert(), batch_of()
    find_structure(model, PruningConfig(target_parameters=0.8), batch, tmp_path)
    chosen = find_structure(model, PruningConfig(target_parameters=0.8, scope="global"), batch, tmp_path)
    assert chosen.units["heads"] == 16
    assert "heads" in (tmp_path / LATENCY_NAME).read_text()


def test_a_latency_table_is_used_again_under_the_same_conditions_only(tmp_path):
    model, batch = wide_bert(), batch_of()
    config = PruningConfig(target_parameters=0.8)
    find_structure(model, config, batch, tmp_path)
    written = (tmp_path / LATENCY_NAME).read_bytes()
    find_structure(model, config, batch, tmp_path)
    assert (tmp_path / LATENCY_NAME).read_bytes() == written
    find_structure(model, PruningConfig(target_parameters=0.8, target_length=16), batch, tmp_path)
    assert (tmp_path / LATENCY_NAME).read_bytes() != written
    (tmp_path / LATENCY_NAME).write_text("{")
    find_structure(model, config, batch, tmp_path)
    assert len((tmp_path / LATENCY_NAME).read_bytes()) > 100


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (
            {"target_speedup": 1e6},
            r"target_speedup: expected at most .*, the fastest that fewer neurons and layers give",
        ),
        (
            {"target_latency": 1e-6},
            r"target_latency: expected at least .* milliseconds, the fastest that fewer neurons",
        ),
        ({"target_latency": 1e6}, r"target_latency: expected less than .* milliseconds, which the dense model needs"),
        ({"target_parameters": 10}, r"target_parameters: expected at least .* parameters .*; got 10"),
        ({"target_parameters": 1e9}, r"target_parameters: expected fewer than the model's .* parameters; got 1e\+09"),
    ],
)
def test_a_target_that_cannot_be_reached_says_what_can(target, problem):
    with pytest.raises(PruningConfigError, match=problem):
        find_structure(wide_bert(), PruningConfig(**target), batch_of())
