"""Targets in the Trainer and in loops: the structure is chosen once, pruned as if it had been named, and timed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import ARCHITECTURES, bert, bert_examples, llama, training_arguments
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, Trainer
from typer.testing import CliRunner

from hf_prune import (
    Pruner,
    PruningCallback,
    PruningConfig,
    PruningConfigError,
    PruningStateError,
    PruningTrainer,
    StructureError,
)
from hf_prune.cli.commands import app
from hf_prune.masking.searching import widths_of
from hf_prune.publish.card import write_card
from hf_prune.saved.files import find_model
from hf_prune.saved.report import make_report
from hf_prune.structure.chosen import SEARCH_NAME, Chosen, read_chosen
from hf_prune.structure.latency_table import LATENCY_NAME

TIMES = {"begin": 1, "end": 5, "frequency": 1}
HALF = PruningConfig(target_parameters=0.5, **TIMES)
TOKENS = ARCHITECTURES["llama"].batch()
PER_LAYER = PruningConfig(target_parameters=0.3, scope="global", **TIMES)


def model_of(seed=0):
    torch.manual_seed(seed)
    return bert(num_hidden_layers=4, hidden_size=32, intermediate_size=256, num_attention_heads=4)


def trainer_of(directory, config=HALF, model=None, callbacks=None, trainer_class=PruningTrainer, **arguments):
    keywords = {} if trainer_class is Trainer else {"pruning_config": config}
    return trainer_class(
        model=model if model is not None else model_of(),
        args=training_arguments(directory, max_steps=8, **arguments),
        train_dataset=bert_examples(),
        eval_dataset=bert_examples(8),
        callbacks=callbacks,
        **keywords,
    )


def parameters_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A trainer that has trained, with a checkpoint of every step in its `output_dir`."""
    trainer = trainer_of(tmp_path_factory.mktemp("whole"), save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


@pytest.fixture
def checkpoints(whole):
    return Path(whole.args.output_dir)


def test_a_target_is_reached_by_ordinary_structures_and_opened_plainly(whole, checkpoints, tmp_path):
    whole.save_model(tmp_path)
    chosen = whole.pruner.chosen
    assert whole.pruner.configs == chosen.configs
    assert all(config.structure and config.method == "taylor" for config in chosen.configs)
    assert parameters_of(whole.model) == chosen.candidate.parameters <= 0.5 * parameters_of(model_of())
    assert chosen.reached_speedup > 0
    assert read_chosen(tmp_path) == chosen
    assert (checkpoints / LATENCY_NAME).exists()
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert parameters_of(opened) == chosen.candidate.parameters
    configs = json.loads((tmp_path / "pruning_config.json").read_text())["configs"]
    assert [config["structure"] for config in configs] == list(chosen.candidate.sparsities)


@pytest.mark.parametrize("step", [1, 6])
def test_a_resumed_run_takes_what_was_chosen_and_ends_bit_for_bit_as_the_whole_one(
    whole, checkpoints, tmp_path, monkeypatch, step
):
    monkeypatch.setattr("hf_prune.masking.searching.find_structure", None)  # nothing is searched again
    resumed = trainer_of(tmp_path, model=model_of(5))
    resumed.train(resume_from_checkpoint=str(checkpoints / f"checkpoint-{step}"))
    weights, others = whole.model.state_dict(), resumed.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(map(torch.equal, weights.values(), others.values()))
    assert resumed.pruner.chosen.candidate == whole.pruner.chosen.candidate


def test_a_checkpoint_of_another_target_is_refused(checkpoints, tmp_path):
    checkpoint = shutil.copytree(checkpoints / "checkpoint-4", tmp_path / "checkpoint-4")
    other = trainer_of(tmp_path / "other", PruningConfig(target_parameters=0.7, **TIMES))
    why = "chosen for 70.0% of the parameters, but the checkpoint was saved for 50.0% of the parameters"
    with pytest.raises(PruningStateError, match=why):
        other.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / SEARCH_NAME).unlink()
    with pytest.raises(PruningStateError, match="but the checkpoint was saved without a target"):
        trainer_of(tmp_path / "third").train(resume_from_checkpoint=str(checkpoint))


def test_a_target_that_cannot_be_reached_is_refused_before_training(tmp_path):
    trainer = trainer_of(tmp_path, PruningConfig(target_speedup=1e6))
    with pytest.raises(PruningConfigError, match="target_speedup: expected at most"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_plan_shows_what_is_chosen_and_training_keeps_it(tmp_path):
    trainer = trainer_of(tmp_path)
    plan = trainer.pruner.plan()
    chosen = trainer.pruner.chosen
    assert {unit.structure for unit in plan.units} == set(chosen.candidate.sparsities)
    assert plan.of_model(trainer.model).weights_left == chosen.candidate.parameters
    trainer.train()
    assert trainer.pruner.chosen.candidate == chosen.candidate
    assert parameters_of(trainer.model) == chosen.candidate.parameters


def test_the_callback_reaches_a_target_in_a_stock_trainer(tmp_path):
    callback = PruningCallback(HALF)
    trainer = trainer_of(tmp_path, callbacks=[callback], trainer_class=Trainer)
    trainer.train()
    assert parameters_of(trainer.model) == callback.pruner.chosen.candidate.parameters


def test_a_loop_of_ones_own_gives_an_example():
    model, batch = model_of(), ARCHITECTURES["bert"].batch()
    with pytest.raises(PruningConfigError, match="target_parameters: needs a batch to measure the model with"):
        Pruner(model, HALF, total_steps=8)
    pruner = Pruner(model, HALF, total_steps=8, example=batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        model(**batch).loss.backward()
        pruner.mask_gradients()
        optimizer.step()
        pruner.step(optimizer)
        optimizer.zero_grad()
    pruner.shrink(optimizer)
    assert parameters_of(model) == pruner.chosen.candidate.parameters
    assert pruner.measure_target().reached_speedup > 0


def test_a_target_may_refer_to_a_dense_model_that_had_more_tokens():
    """So many that most of its time is that of the last layer; it is the dense model's time, then and later."""
    before = {"vocab_size": 300_000}
    small = llama(num_hidden_layers=3, intermediate_size=64)
    pruner = Pruner(small, PruningConfig(target_parameters=0.001, method="magnitude", begin=0, end=1), example=TOKENS)
    chosen = pruner.search(dense_fields=before)
    assert chosen.dense.parameters == parameters_of(small) + 2 * 16 * (300_000 - 64)
    assert chosen.candidate.parameters <= 0.001 * chosen.dense.parameters < parameters_of(small)
    assert chosen.speedup > 1.1
    assert Chosen.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    pruner.start(2)
    pruner.step()
    pruner.shrink()
    assert pruner.measure_target().reached_speedup > 1.1
    with pytest.raises(PruningConfigError, match=r"target_speedup: expected more than .*, the speed-up without unused"):
        Pruner(llama(), PruningConfig(target_speedup=1.01), example=TOKENS).search(dense_fields=before)
    with pytest.raises(
        PruningConfigError, match=r"milliseconds, which the model without unused tokens needs; got 1e\+"
    ):
        Pruner(llama(), PruningConfig(target_latency=1e6), example=TOKENS).search(dense_fields=before)


@pytest.mark.parametrize(
    "beside", [PruningConfig(target_speedup=2), PruningConfig(structure="neurons", sparsity=0.5)], ids=["two", "both"]
)
def test_a_target_stands_alone_among_structures(beside):
    with pytest.raises(PruningConfigError, match="target_parameters: "):
        Pruner(model_of(), [HALF, beside])


def test_weights_are_pruned_beside_a_target(tmp_path):
    weights = PruningConfig(sparsity=0.5, begin=5, end=7, frequency=1, targets=[r".*attention\.self\.query\.weight"])
    trainer = trainer_of(tmp_path, [HALF, weights])
    trainer.train()
    for layer in trainer.model.bert.encoder.layer:
        assert int((layer.attention.self.query.weight == 0).sum()) == 32 * 32 // 2


def test_a_target_of_a_model_with_adapters_is_refused():
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    with pytest.raises(StructureError, match="target_parameters: must not be set for a model with adapters; merge"):
        Pruner(model, PruningConfig(target_parameters=0.9), total_steps=1)


def test_a_model_without_units_is_refused(tmp_path):
    examples = ARCHITECTURES["resnet"].examples(4)
    batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
    with pytest.raises(StructureError, match="ResNetForImageClassification"):
        Pruner(ARCHITECTURES["resnet"].build(), PruningConfig(target_speedup=2), total_steps=2, example=batch)


def test_card_and_report_say_what_was_asked_for_and_reached(tmp_path):
    trainer = trainer_of(tmp_path / "run", PruningConfig(target_speedup=1.5, **TIMES))
    trainer.train()
    trainer.save_model(tmp_path / "small")
    write_card(find_model(tmp_path / "small"))
    card = (tmp_path / "small" / "README.md").read_text()
    chosen = trainer.pruner.chosen
    assert "Asked for 1.5 times the speed of the dense model; of the structures that should reach it, " in card
    assert f"Measured after training: {chosen.reached_speedup:.2f} times as fast" in card
    assert "](assets/search.png)" in card
    assert (tmp_path / "small" / "assets" / "search.png").read_bytes().startswith(b"\x89PNG")
    report = make_report(tmp_path / "small")
    assert report.chosen == chosen
    assert report.to_dict()["chosen"] == json.loads(json.dumps(chosen.to_dict()))
    printed = CliRunner().invoke(app, ["report", str(tmp_path / "small")]).stdout
    assert " ".join(chosen.told().split()) in " ".join(printed.split())


# ---- Numbers for each layer ----


def widths_in(model):
    """What is left of each layer that is left: neurons and heads."""
    return [
        (layer.intermediate.dense.out_features, layer.attention.self.query.out_features // 8)
        for layer in model.bert.encoder.layer
    ]


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """A trainer that has trained for numbers of each layer, with a checkpoint of every step in its `output_dir`."""
    folder = tmp_path_factory.mktemp("layered")
    trainer = trainer_of(folder, PER_LAYER, save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer


@pytest.mark.widths_per_layer
def test_each_layer_ends_with_the_numbers_that_were_chosen_for_it(layered, tmp_path):
    chosen = layered.pruner.chosen
    left = [(one["neurons"], one["heads"]) for one in chosen.left_of_layers.values() if one is not None]
    assert widths_in(layered.model) == left
    assert len(set(left)) > 1
    assert len(left) < 4
    assert parameters_of(layered.model) == chosen.candidate.parameters <= 0.3 * parameters_of(model_of())
    assert layered.pruner.at_final_sparsity
    assert layered.pruner.sparsity == pytest.approx(layered.pruner.target_sparsity)
    assert chosen.reached_speedup > 0
    layered.save_model(tmp_path)
    assert read_chosen(tmp_path) == chosen
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert widths_in(opened) == left
    batch = ARCHITECTURES["bert"].batch()
    with torch.no_grad():
        assert torch.allclose(opened(**batch).logits, layered.model.eval()(**batch).logits, atol=1e-6)
    assert make_report(tmp_path).chosen == chosen
    write_card(find_model(tmp_path))
    card = (tmp_path / "README.md").read_text()
    assert f"of the structures that should reach it, {chosen.words_of(chosen.candidate)}, with " in card
    assert "in the 4 layers that have shares of their own; schedule:" in card


@pytest.mark.widths_per_layer
@pytest.mark.parametrize(("step", "small"), [(2, False), (6, False), (6, True)])
def test_numbers_of_each_layer_are_resumed_bit_for_bit_without_measuring(layered, tmp_path, monkeypatch, step, small):
    monkeypatch.setattr("hf_prune.masking.searching.find_structure", None)  # nothing is searched again
    checkpoint = Path(layered.args.output_dir) / f"checkpoint-{step}"
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint) if small else model_of(5)
    resumed = trainer_of(tmp_path, PER_LAYER, model=model)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    weights, others = layered.model.state_dict(), resumed.model.state_dict()
    assert weights.keys() == others.keys()
    assert all(map(torch.equal, weights.values(), others.values()))
    assert resumed.pruner.chosen.candidate == layered.pruner.chosen.candidate
    assert resumed.pruner.removed == layered.pruner.removed


@pytest.mark.widths_per_layer
def test_the_plan_has_the_numbers_of_each_layer():
    pruner = Pruner(model_of(), PER_LAYER, total_steps=8, example=ARCHITECTURES["bert"].batch())
    plan, chosen = pruner.plan().of_model(pruner.model), pruner.chosen
    assert plan.weights_left == chosen.candidate.parameters
    planned = {(one.structure, one.path): one.left for one in plan.units}
    for path, left in chosen.left_of_layers.items():
        if left is not None:
            assert planned["neurons", path] == left["neurons"]
            assert planned["heads", f"{path}.attention"] == left["heads"]
    gone = [path for path, left in chosen.left_of_layers.items() if left is None]
    assert planned["layers", "bert.encoder.layer"] == 4 - len(gone)
    [heading, *rows] = widths_of(chosen)
    assert heading == ("layer", "neurons", "heads")
    assert [path for path, *cells in rows if cells == ["removed", "removed"]] == gone
