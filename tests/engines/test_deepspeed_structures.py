"""Structures and targets under DeepSpeed ZeRO-1, ZeRO-2 and ZeRO-3, in the environment of `make test-deepspeed`."""

import json

import pytest
import torch
import train_structures
from forks import run_group
from launching import assert_all_succeeded, results_of, write_cases
from safetensors.torch import load_file
from test_launch import launch as accelerate_launch
from test_structures_on_processes import SIZES, cut_out_of
from test_vocabulary_run import SHARE, recipe_with_target
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_prune.publish.record import load_record
from hf_prune.saved.report import make_report
from hf_prune.structure.chosen import read_chosen
from hf_prune.structure.record import read_structure

pytest.importorskip("deepspeed", reason="make test-deepspeed runs these")

TIMES = {"begin": 1, "end": 2, "frequency": 1, "method": "magnitude"}
BY_INPUTS = TIMES | {"method": "wanda"}
BY_CHANGE = TIMES | {"method": "block_influence"}
STEPS = {"max_steps": 3}
SAVE = STEPS | {"save_strategy": "steps", "save_steps": 1}

STRUCTURES = {
    "small": [
        {"structure": "neurons", "sparsity": 0.75, **BY_INPUTS},
        {"structure": "layers", "sparsity": 0.5, **BY_CHANGE},
    ],
    "narrow": [{"structure": "hidden", "sparsity": 0.5, **TIMES}],
    "different": [
        {"structure": "neurons", "scope": "global", "sparsity": 0.75, **TIMES},
        {"structure": "layers", "sparsity": 0.25, **TIMES},
    ],
}
TARGET = {"target_parameters": 0.6, **TIMES}
TARGETS = {
    "parameters zero2": {"engine": "zero2", "configs": [TARGET]},
    "speed zero3": {"engine": "zero3", "configs": [{"target_speedup": 1.2, **TIMES}]},
    "per layer zero2": {"engine": "zero2", "configs": [TARGET | {"scope": "global"}]},
    "per layer zero3": {"engine": "zero3", "configs": [TARGET | {"scope": "global"}]},
    "callback zero2": {"engine": "zero2", "configs": [TARGET], "callback": True},
}

# What is asked for, and what all processes say.
REFUSED = {
    "not gathered": (
        {"configs": STRUCTURES["small"], "zero": {"stage3_gather_16bit_weights_on_model_save": False}},
        "PruningConfigError: structure: cannot be removed where ZeRO-3 saves no whole model, of which the smaller one "
        "is made: set stage3_gather_16bit_weights_on_model_save to true",
    ),
    "target, not gathered": (
        {"configs": [TARGET], "zero": {"stage3_gather_16bit_weights_on_model_save": False}},
        "PruningConfigError: target_parameters: cannot be removed where ZeRO-3 saves no whole model",
    ),
    "callback": (
        {"configs": STRUCTURES["small"], "callback": True},
        "PruningConfigError: structure: cannot be removed in PruningCallback from a model that is sharded",
    ),
    "sharded before": (
        {"configs": [TARGET], "opened": True},
        "PlacementError: target_parameters: cannot be measured on a model that is sharded over processes: use "
        "PruningTrainer, which measures it before, and load the model before TrainingArguments are made",
    ),
    "gradients": (
        {"configs": [{"target_speedup": 2}]},
        "PruningConfigError: method: methods that read gradients cannot be used with DeepSpeed, got 'taylor'",
    ),
    "out of reach": (
        {"configs": [TARGET | {"target_parameters": 0.01}]},
        "PruningConfigError: target_parameters: expected",
    ),
}


def run_cases(directory, cases):
    """Run cases on two processes; of those that train, what each ended with."""
    write_cases(directory, cases)
    assert_all_succeeded(run_group(2, train_structures.main_of_cases, directory))
    return results_of(directory, [name for name, case in cases.items() if not case.get("refused")])


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Trainings with structures that are named."""
    directory = tmp_path_factory.mktemp("ended")
    small = {"configs": STRUCTURES["small"], "arguments": STEPS}
    cases = {f"small {engine}": small | {"engine": engine} for engine in ("ddp", "zero1", "zero2", "zero3")}
    for engine in ("zero2", "zero3"):
        cases[f"small {engine}"] |= {"card": True, "arguments": SAVE}
        for step in (1, 2):
            checkpoint = str(directory / f"small {engine}" / f"checkpoint-{step}")
            cases[f"small {engine} from {step}"] = small | {"engine": engine, "resume": checkpoint}
    others = {
        "narrow": {"configs": STRUCTURES["narrow"]},
        "different": {"configs": STRUCTURES["different"]},
        "bf16": {"configs": STRUCTURES["small"], "arguments": STEPS | {"bf16": True}},
        "opened": {"configs": STRUCTURES["small"], "opened": True},
        "heads": {"configs": [{"structure": "heads", "sparsity": 0.5, **BY_INPUTS}], "model": "llama"},
    }
    cases |= {f"{name} zero3": small | {"engine": "zero3"} | case for name, case in others.items()}
    cases["callback zero2"] = small | {"engine": "zero2", "callback": True}
    return directory, run_cases(directory, cases)


@pytest.fixture(scope="module")
def aimed(tmp_path_factory):
    """Trainings for targets, and what is refused before training."""
    directory = tmp_path_factory.mktemp("aimed")
    cases = {name: {"arguments": STEPS} | case for name, case in TARGETS.items()}
    cases |= {f"refused {name}": {"engine": "zero3", "refused": True} | case for name, (case, _) in REFUSED.items()}
    for engine in ("zero2", "zero3"):
        cases[f"refused on one {engine}"] = {"engine": engine, "refused": True, "configs": [TARGET], "fails": 0}
    return directory, run_cases(directory, cases)


def opened(folder, auto_class=AutoModelForSequenceClassification):
    """A saved model as plain transformers opens it; its file has exactly its weights."""
    model, loading = auto_class.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model


def sizes_of(config):
    return config.hidden_size, config.intermediate_size, config.num_hidden_layers


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2", "zero3"])
def test_every_stage_saves_the_small_model_that_processes_without_deepspeed_train(ended, engine):
    directory, results = ended
    model = opened(directory / f"small {engine}" / "saved")
    assert sizes_of(model.config) == SIZES["small"]
    expected = load_file(directory / "small ddp" / "saved" / "model.safetensors")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)
    ours, theirs = results[f"small {engine}"], results["small ddp"]
    assert ours["sparsity"] == theirs["sparsity"] > 0.5
    for kind, tolerance in (("loss", 1e-3), ("grad_norm", 1e-2)):
        torch.testing.assert_close(torch.tensor(ours[kind]), torch.tensor(theirs[kind]), rtol=tolerance, atol=1e-3)


@pytest.mark.parametrize("kind", ["small", "narrow", "different", "bf16", "opened"])
def test_stage_three_saves_what_is_left_of_the_whole_weights(ended, kind):
    directory, results = ended
    folder, structures = directory / f"{kind} zero3" / "saved", kind if kind in STRUCTURES else "small"
    model = opened(folder)
    if structures != "different":
        assert sizes_of(model.config) == SIZES[structures]
    expected = cut_out_of(results[f"{kind} zero3"]["weights"], read_structure(folder), directory, structures)
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(weight, expected[name].to(weight.dtype)), name


def test_stage_three_removes_heads(ended):
    directory, _ = ended
    model = opened(directory / "heads zero3" / "saved", AutoModelForCausalLM)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (2, 1)


def test_a_callback_in_a_stock_trainer_removes_them_in_stage_two(ended):
    directory, _ = ended
    expected = load_file(directory / "small zero2" / "saved" / "model.safetensors")
    found = opened(directory / "callback zero2" / "saved").state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_resumed_training_ends_with_the_same_small_model(ended, engine, step):
    """Before the last mask update, and after it, when the model has its full size still."""
    directory, results = ended
    weights, others = (
        load_file(directory / name / "saved" / "model.safetensors")
        for name in (f"small {engine}", f"small {engine} from {step}")
    )
    assert weights.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    assert results[f"small {engine}"]["loss"][step:] == results[f"small {engine} from {step}"]["loss"][step:]


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_card_record_and_report_say_what_was_removed(ended, engine):
    directory, results = ended
    folder = directory / f"small {engine}"
    removed = make_report(folder).removed
    assert removed.parameters == (parameters_of(train_structures.dense()), parameters_of(opened(folder)))
    card = (folder / "README.md").read_text()
    assert "were removed: {:,} parameters became {:,}".format(*removed.parameters) in card
    record = load_record(folder)
    assert record.target_sparsity == pytest.approx(results[f"small {engine}"]["sparsity"])
    assert [evaluation.part for evaluation in record.evaluations] == ["eval"]


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_first_process_chooses_for_a_target_is_saved_and_timed(aimed, name):
    directory, results = aimed
    folder = directory / name / "saved"
    chosen, left = read_chosen(folder), parameters_of(opened(folder))
    assert chosen.candidate.parameters == results[name]["left"] == left < chosen.dense.parameters
    if chosen.target.name == "target_parameters":
        assert left <= 0.6 * chosen.dense.parameters
    assert chosen.reached_speedup > 0
    assert "Measured after training: " in make_report(folder).chosen.told()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_removed_is_refused_by_all_processes_before_training(aimed, name):
    directory, _ = aimed
    said = [(directory / f"refused {name}" / f"{rank}.txt").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith(REFUSED[name][1])


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_an_error_of_one_process_in_the_search_is_raised_by_all(aimed, engine):
    directory, _ = aimed
    said = [(directory / f"refused on one {engine}" / f"{rank}.txt").read_text() for rank in range(2)]
    assert said == ["OSError: no more room", "OtherProcessError: process 0 failed with OSError: no more room"]


def test_a_recipe_removes_tokens_and_what_a_target_asks_for_in_stage_three(tmp_path):
    """Over both models' files: the share of all parameters is that of the dense model with all its tokens."""
    recipe = recipe_with_target(tmp_path, target_parameters=SHARE)
    more = ("training.optim=adamw_torch", "training.use_cpu=false", "training.max_steps=3")
    code, output, errors = accelerate_launch("zero3", "-m", "hf_prune", "run", recipe, *more, timeout=400)
    assert code == 0, errors[-4000:]
    assert output.count("Pruned model on the test split") == 1
    dense, pruned = (parameters_of(opened(tmp_path / "out" / name)) for name in ("dense", "model"))
    written = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert written["parameters"] == {"dense": dense, "pruned": pruned}
    chosen = read_chosen(tmp_path / "out" / "model")
    assert (chosen.dense.parameters, chosen.candidate.parameters) == (dense, pruned)
    assert pruned <= SHARE * dense
    assert chosen.reached_speedup > 0
