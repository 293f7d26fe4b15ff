"""Widths per layer in the Trainer: cut out in training, saved, opened with the import, resumed bit for bit."""

import copy
import json

import pytest
import torch
import transformers
from models import ARCHITECTURES, bert, bert_examples, gpt2, training_arguments
from transformers import AutoModelForSequenceClassification, Trainer

from hf_prune import DistillationConfig, PruningCallback, PruningConfig, PruningTrainer
from hf_prune.structure.record import STRUCTURE_NAME

pytestmark = pytest.mark.widths_per_layer

TIMES = {"method": "taylor", "begin": 1, "end": 5, "frequency": 1}
CONFIGS = [
    PruningConfig(structure="neurons", scope="global", sparsity=0.75, **TIMES),
    PruningConfig(structure="heads", scope="global", sparsity=0.5, **TIMES),
    PruningConfig(structure="layers", sparsity=0.25, **TIMES),
]


def dense():
    return bert(num_hidden_layers=4, num_attention_heads=4)


def trainer_of(directory, model=None, trainer_class=PruningTrainer, callbacks=None, **arguments):
    keywords = {} if trainer_class is Trainer else {"pruning_config": CONFIGS}
    return trainer_class(
        model=model if model is not None else dense(),
        args=training_arguments(directory, **{"max_steps": 8, **arguments}),
        train_dataset=bert_examples(),
        eval_dataset=bert_examples(8),
        callbacks=callbacks,
        **keywords,
    )


def logits_of(model):
    with torch.no_grad():
        return model.eval()(**ARCHITECTURES["bert"].batch()).logits


def are_equal(one, other):
    return one.state_dict().keys() == other.state_dict().keys() and all(
        map(torch.equal, one.state_dict().values(), other.state_dict().values())
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder, save_strategy="steps", save_steps=1)
    trainer.train()
    return trainer, folder


def test_what_is_saved_opens_equal_and_says_what_was_removed(whole, tmp_path):
    trainer, _ = whole
    trainer.save_model(str(tmp_path))
    opened, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    assert torch.equal(logits_of(opened), logits_of(trainer.model))
    removed = json.loads((tmp_path / STRUCTURE_NAME).read_text())
    assert removed["parameters"][1] == sum(parameter.numel() for parameter in opened.parameters())
    values = json.loads((tmp_path / "config.json").read_text())
    assert removed["fields"]["per_layer_config"] == [None, values["per_layer_config"]]
    heads = [len(one["kept"]) for name, one in removed["units"].items() if name.startswith("heads")]
    assert heads == [values["per_layer_config"].get(str(index), {}).get("num_attention_heads", 4) for index in range(3)]


@pytest.mark.parametrize("step", [3, 6])
def test_a_resumed_run_ends_bit_for_bit_as_the_whole_one(whole, tmp_path, step):
    trainer, folder = whole
    checkpoint = folder / f"checkpoint-{step}"
    small = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    for name, model in (("dense", dense()), ("small", small)):
        resumed = trainer_of(tmp_path / name, model=model)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert are_equal(trainer.model, resumed.model)
        assert resumed.pruner.removed == trainer.pruner.removed
        assert resumed.pruner.sparsity == trainer.pruner.sparsity


def distilbert():
    config = transformers.DistilBertConfig(
        vocab_size=64, dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=32
    )
    return transformers.DistilBertForSequenceClassification(config)


@pytest.mark.parametrize(("build", "kind"), [(gpt2, "gpt2"), (distilbert, "bert")])
def test_a_class_that_names_the_number_of_its_layers_otherwise_is_resumed(build, kind, tmp_path):
    def trainer_of_class(model, **arguments):
        return PruningTrainer(
            model=model,
            args=training_arguments(tmp_path, max_steps=8, **arguments),
            train_dataset=ARCHITECTURES[kind].examples(40),
            pruning_config=PruningConfig(structure="neurons", scope="global", sparsity=0.5, **TIMES),
        )

    torch.manual_seed(0)
    first = build()
    whole = trainer_of_class(copy.deepcopy(first), save_strategy="steps", save_steps=6)
    whole.train()
    small = type(first).from_pretrained(tmp_path / "checkpoint-6")
    for model in (first, small):
        resumed = trainer_of_class(model)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert are_equal(whole.model, resumed.model)


def test_the_callback_makes_the_model_of_a_stock_trainer_smaller_and_it_is_resumed(tmp_path):
    def stock(model=None, **arguments):
        callbacks = [PruningCallback(CONFIGS)]
        return trainer_of(tmp_path, model, Trainer, callbacks, save_strategy="steps", save_steps=6, **arguments)

    ended = stock()
    ended.train()
    resumed = stock(AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-6"))
    resumed.train(resume_from_checkpoint=True)
    assert are_equal(ended.model, resumed.model)
    assert ended.model.config.per_layer_config[0].num_attention_heads <= 4


def test_an_optimizer_with_other_state_has_the_units_cut_out_at_the_end(tmp_path):
    trainer = trainer_of(tmp_path, optim="adafactor", learning_rate=1e-3)
    trainer.train()
    trainer.save_model(str(tmp_path / "small"))
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(logits_of(opened), logits_of(trainer.model))


def test_a_small_model_is_distilled_from_one_with_all_layers(tmp_path):
    trainer = PruningTrainer(
        model=dense(),
        args=training_arguments(tmp_path, max_steps=8),
        train_dataset=bert_examples(),
        pruning_config=CONFIGS,
        teacher_model=dense(),
        distillation_config=DistillationConfig(hidden_weight=1.0),
    )
    trainer.train()
    assert len(trainer.pruner.layer_pairs(4)) == 4


def test_the_zeros_of_a_model_whose_layers_differ_are_kept_and_new_ones_made(whole, tmp_path):
    trainer, _ = whole
    trainer.save_model(str(tmp_path / "small"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    later = PruningTrainer(
        model=model,
        args=training_arguments(tmp_path / "later", max_steps=3),
        train_dataset=bert_examples(),
        pruning_config=PruningConfig(sparsity=0.5, begin=0, end=1, frequency=1),
    )
    later.train()
    later.save_model(str(tmp_path / "sparse"))
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    assert torch.equal(logits_of(opened), logits_of(later.model))
    assert later.pruner.sparsity == pytest.approx(0.5, abs=0.01)
