"""Structures in the Trainer: masked on schedule, cut out at the end of it, saved small, resumed bit for bit."""

import json

import pytest
import torch
from models import ARCHITECTURES, bert, bert_examples, training_arguments
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback

from hf_prune import DistillationConfig, DistillationConfigError, PruningCallback, PruningConfig, PruningTrainer
from hf_prune.publish.record import load_record
from hf_prune.structure.record import STRUCTURE_NAME
from hf_prune.trainer import latency

NEURONS = PruningConfig(structure="neurons", method="taylor", sparsity=0.75, begin=1, end=5, frequency=1)
LAYERS = PruningConfig(structure="layers", method="taylor", sparsity=0.5, begin=1, end=5, frequency=1)

WIDTH = PruningConfig(structure="hidden", method="taylor", sparsity=0.5, begin=1, end=5, frequency=1)


def trainer_of(
    directory, config=(NEURONS, LAYERS), model=None, callbacks=None, trainer_class=PruningTrainer, **arguments
):
    keywords = {} if trainer_class is Trainer else {"pruning_config": list(config)}
    return trainer_class(
        model=model if model is not None else bert(num_hidden_layers=4),
        args=training_arguments(directory, max_steps=8, **arguments),
        train_dataset=bert_examples(),
        eval_dataset=bert_examples(8),
        callbacks=callbacks,
        **keywords,
    )


def logits_of(model):
    model.eval()
    with torch.no_grad():
        return model(**ARCHITECTURES["bert"].batch()).logits


class Sizes(TrainerCallback):
    def __init__(self):
        self.parameters = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.parameters.append(sum(parameter.numel() for parameter in model.parameters()))


class SkippedLayers(TrainerCallback):
    """From the end of the schedule on, half of the layers return what they get."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 5:
            hidden = torch.randn(1, 3, 16)
            assert sum(torch.equal(layer(hidden), hidden) for layer in model.bert.encoder.layer) == 2


def test_what_is_saved_is_the_small_model_that_training_ends_with(tmp_path):
    sizes = Sizes()
    trainer = trainer_of(tmp_path / "run")
    trainer.add_callback(sizes)
    dense = sum(parameter.numel() for parameter in trainer.model.parameters())
    trainer.train()
    trainer.save_model(tmp_path / "small")
    assert sizes.parameters[:4] == [dense] * 4
    assert sizes.parameters[4] == sizes.parameters[-1] < 0.6 * dense
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["intermediate_size"] == 6
    assert config["num_hidden_layers"] == 2
    opened, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert not loading["mismatched_keys"]
    assert torch.equal(logits_of(opened), logits_of(trainer.model))
    linear = [
        value for name, value in opened.named_parameters() if name.startswith("bert.encoder") and value.dim() == 2
    ]
    assert all(value.count_nonzero() == value.numel() for value in linear)
    removed = json.loads((tmp_path / "small" / STRUCTURE_NAME).read_text())
    assert removed["parameters"] == [dense, sizes.parameters[-1]]
    assert removed["fields"] == {"intermediate_size": [24, 6], "num_hidden_layers": [4, 2]}


def test_the_card_compares_the_small_model_with_one_of_the_original_sizes(tmp_path):
    trainer = trainer_of(tmp_path, (NEURONS,))
    trainer.train()
    trainer.create_model_card()
    weights = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    one, several = load_record(tmp_path).costs
    assert (one.samples, several.samples) == (1, 8)
    for cost in (one, several):
        assert cost.dense_is_new
        assert cost.model.flops < cost.dense.flops
        assert weights < cost.model.memory_bytes < cost.dense.memory_bytes
    card = (tmp_path / "README.md").read_text()
    assert "| forward pass | dense | pruned | |\n|---|---:|---:|---:|\n| 1 sample: milliseconds | " in card
    assert "with the original sizes and new weights" in card


def test_a_very_large_dense_model_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "_MOST_PARAMETERS", 1000)
    trainer = trainer_of(tmp_path, (NEURONS,))
    trainer.train()
    trainer.create_model_card()
    assert [cost.dense for cost in load_record(tmp_path).costs] == [None, None]
    assert "The dense model was not measured." in (tmp_path / "README.md").read_text()


def test_the_sparsity_goes_on_when_the_model_is_smaller(tmp_path):
    trainer = trainer_of(tmp_path, (NEURONS,), logging_steps=1)
    trainer.train()
    logged = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert logged == sorted(logged)
    assert logged[-1] == logged[-3] == 0.75
    assert trainer.pruner.target_sparsity == 0.75
    assert trainer.pruner.at_final_sparsity


@pytest.mark.parametrize("step", [1, 3, 5, 7])
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(tmp_path, step):
    whole = trainer_of(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    torch.manual_seed(5)  # another model than that which was trained
    resumed = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    weights, others = whole.model.state_dict(), resumed.model.state_dict()
    assert weights.keys() == others.keys()
    assert not [name for name in weights if not torch.equal(weights[name], others[name])]
    assert resumed.pruner.removed == whole.pruner.removed


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_whose_width_is_pruned_is_resumed_bit_for_bit(tmp_path, step):
    whole = trainer_of(tmp_path / "whole", (WIDTH,), save_strategy="steps", save_steps=3)
    whole.train()
    torch.manual_seed(5)
    resumed = trainer_of(tmp_path / "resumed", (WIDTH,))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))
    assert (whole.model.config.hidden_size, whole.model.config.num_attention_heads) == (8, 1)
    whole.save_model(tmp_path / "small")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(logits_of(opened), logits_of(whole.model))


def test_hidden_states_of_another_width_are_not_compared(tmp_path):
    with pytest.raises(DistillationConfigError, match="hidden_weight: must be 0 where structure='hidden' removes"):
        PruningTrainer(
            model=bert(),
            args=training_arguments(tmp_path, max_steps=8),
            train_dataset=bert_examples(),
            pruning_config=WIDTH,
            teacher_model=bert(),
            distillation_config=DistillationConfig(hidden_weight=1.0),
        )


def test_a_run_is_resumed_with_the_small_model_too(tmp_path):
    whole = trainer_of(tmp_path / "whole", save_strategy="steps", save_steps=1)
    whole.train()
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    resumed = trainer_of(tmp_path / "resumed", model=small)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))


def test_the_callback_makes_the_model_of_a_stock_trainer_smaller(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[PruningCallback([NEURONS, LAYERS])], trainer_class=Trainer)
    trainer.train()
    trainer.save_model(tmp_path / "small")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert opened.config.intermediate_size == 6
    assert len(opened.bert.encoder.layer) == 2
    assert torch.equal(logits_of(opened), logits_of(trainer.model))


def test_an_optimizer_with_other_state_has_the_units_cut_out_at_the_end(tmp_path):
    sizes = Sizes()
    trainer = trainer_of(tmp_path, optim="adafactor", learning_rate=1e-3)
    trainer.add_callback(sizes)
    trainer.add_callback(SkippedLayers())
    trainer.train()
    assert len(set(sizes.parameters)) == 1
    assert trainer.model.config.intermediate_size == 6
    assert len(trainer.model.bert.encoder.layer) == 2


def test_the_best_model_is_loaded_among_the_small_ones(tmp_path):
    trainer = trainer_of(
        tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    trainer.train()
    assert trainer.state.best_global_step >= 5
    assert trainer.model.config.num_hidden_layers == 2


def test_distillation_compares_the_layers_that_are_kept(tmp_path):
    teacher = bert(num_hidden_layers=4)
    trainer = PruningTrainer(
        model=bert(num_hidden_layers=4),
        args=training_arguments(tmp_path, max_steps=8),
        train_dataset=bert_examples(),
        pruning_config=[LAYERS],
        teacher_model=teacher,
        distillation_config=DistillationConfig(hidden_weight=1.0),
    )
    assert trainer.pruner.layer_pairs(4) == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4]]
    trainer.train()
    kept = [int(name.rpartition(".")[2]) for name, units in trainer.pruner.removed["units"].items() if units["kept"]]
    assert trainer.pruner.layer_pairs(4) == [[0, 0], [1, kept[0] + 1], [2, 4]]
    assert trainer.pruner.layer_pairs(6) is None


def test_weights_are_pruned_beside_structures_and_after_them(tmp_path):
    weights = PruningConfig(sparsity=0.5, begin=5, end=7, frequency=1, targets=[r".*intermediate\.dense\.weight"])
    trainer = trainer_of(tmp_path, (NEURONS, weights))
    trainer.train()
    for layer in trainer.model.bert.encoder.layer:
        weight = layer.intermediate.dense.weight
        assert weight.shape == (6, 16)
        assert int((weight == 0).sum()) == 48


def test_a_model_of_model_init_is_made_smaller_in_every_training_and_resumed(tmp_path):
    def trainer(folder, **arguments):
        return PruningTrainer(
            model_init=lambda: bert(num_hidden_layers=4),
            args=training_arguments(tmp_path / folder, max_steps=8, **arguments),
            train_dataset=bert_examples(),
            pruning_config=[NEURONS, LAYERS],
        )

    whole = trainer("whole", save_strategy="steps", save_steps=6)
    sizes = []
    for _ in range(2):
        whole.train()
        assert whole.pruner.sparsity == whole.pruner.target_sparsity > 0.6
        sizes.append((whole.model.config.intermediate_size, whole.model.config.num_hidden_layers))
    assert sizes == [(6, 2)] * 2
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))


def test_a_stock_trainer_is_resumed_with_the_small_model(tmp_path):
    def trainer(model=None, **arguments):
        callback = PruningCallback([NEURONS, LAYERS])
        return trainer_of(tmp_path, model=model, callbacks=[callback], trainer_class=Trainer, **arguments)

    whole = trainer(save_strategy="steps", save_steps=6)
    whole.train()
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6")
    resumed = trainer(small)
    resumed.train(resume_from_checkpoint=True)
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))


@pytest.mark.parametrize("kind", ["vit", "mixtral"])
def test_weights_that_are_saved_under_other_names_are_resumed_and_loaded(tmp_path, kind):
    def trainer(folder, **arguments):
        torch.manual_seed(len(folder))
        return PruningTrainer(
            model=ARCHITECTURES[kind].build(),
            args=training_arguments(tmp_path / folder, max_steps=8, **arguments),
            train_dataset=ARCHITECTURES[kind].examples(40),
            eval_dataset=ARCHITECTURES[kind].examples(8),
            pruning_config=PruningConfig(structure="neurons", sparsity=0.5, begin=1, end=5, frequency=1),
        )

    whole = trainer("whole", save_strategy="steps", save_steps=6)
    whole.train()
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))

    every = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = trainer("best", load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, **every)
    best.train()
    opened = type(best.model).from_pretrained(best.state.best_model_checkpoint)
    assert all(map(torch.equal, best.model.state_dict().values(), opened.state_dict().values()))
