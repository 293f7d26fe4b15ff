"""Cards and pushes of a trainer: what is measured, of which weights, and what becomes of pushes that fail."""

import copy
import json
import logging
import pickle
import re

import numpy as np
import pytest
import torch
from hub_server import OTHER_TOKEN, READ_TOKEN, WRITE_TOKEN
from models import bert, bert_examples, llama, training_arguments
from peft import LoraConfig, get_peft_model
from reads import of_weights
from safetensors.torch import save_file
from test_trainer import AT_ONCE, CONFIG, PruningSeq2SeqTrainer, pruning_trainer
from transformers import Seq2SeqTrainingArguments

from hf_prune import DistillationConfig, PruningConfig, PruningTrainer
from hf_prune.publish.card import write_card
from hf_prune.publish.record import load_record
from hf_prune.saved.report import make_report
from hf_prune.trainer.pushes import UnsavedToken, copy_folder

EVALUATION = bert_examples(12)


def accuracy(prediction):
    return {"accuracy": float(np.mean(np.argmax(prediction.predictions, axis=-1) == prediction.label_ids))}


def trainer_of(directory, config=CONFIG, **arguments):
    return PruningTrainer(
        model=bert(),
        args=training_arguments(directory, **arguments),
        train_dataset=bert_examples(),
        eval_dataset=EVALUATION,
        compute_metrics=accuracy,
        pruning_config=config,
    )


def card_of(directory):
    return (directory / "README.md").read_text(encoding="utf-8")


def sections(card):
    return re.findall(r"^<!-- hf-prune: begin (\w+) -->$", card, re.MULTILINE)


def measured(trainer):
    """Accuracy and loss of the model as it is, without the trainer's knowledge."""
    trainer.model.eval()
    with torch.no_grad():
        batch = {name: torch.stack([example[name] for example in EVALUATION]) for name in EVALUATION[0]}
        output = trainer.model(**batch)
    return {"accuracy": accuracy(output_as_prediction(output, batch)), "loss": output.loss.item()}


def output_as_prediction(output, batch):
    class Prediction:
        predictions, label_ids = output.logits.numpy(), batch["labels"].numpy()

    return Prediction


# ---- What is measured ----


def test_an_evaluation_of_weights_that_were_not_held_does_not_count_for_those_that_are_saved(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter[parameter == 0] = 0.5  # an average of earlier weights
    trainer.evaluate()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation is None
    metrics = trainer.evaluate()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation.metrics["loss"] == metrics["eval_loss"]


def test_the_card_says_what_the_last_evaluation_measured(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(model_name="Tiny", dense_metrics={"eval_accuracy": 1.0, "eval_loss": 0.5})
    record, card = load_record(tmp_path), card_of(tmp_path)
    assert record.evaluation.metrics == {"accuracy": metrics["eval_accuracy"], "loss": metrics["eval_loss"]}
    assert record.evaluation.samples == len(EVALUATION)
    assert record.evaluation.main_metric == "accuracy"
    assert record.target_sparsity == pytest.approx(trainer.pruner.sparsity)
    assert (record.steps, record.seed, record.train_samples) == (10, 42, 40)
    assert f"| `accuracy` | 1.0000 | {metrics['eval_accuracy']:.4f} |" in card
    assert f"| `loss` | 0.5000 | {metrics['eval_loss']:.4f} |" in card
    assert f"{len(EVALUATION)} samples" in card
    assert f"{make_report(tmp_path).prunable_sparsity:.2%} of the prunable weights" in card
    assert card.startswith("---\n")
    assert "# Tiny" in card


def test_the_card_says_which_frozen_layers_were_left_out_also_when_it_is_made_again(tmp_path):
    trainer = trainer_of(tmp_path)
    assert "because it was not trained" not in card_of_trained(trainer, tmp_path)
    model = bert()
    model.bert.encoder.layer[0].requires_grad_(False)
    frozen = PruningTrainer(model, training_arguments(tmp_path), train_dataset=bert_examples(), pruning_config=CONFIG)
    said = (
        "Not pruned, because it was not trained: 6 tensors, such as `bert.encoder.layer.0.attention.self.query.weight`."
    )
    assert said in card_of_trained(frozen, tmp_path)
    write_card(tmp_path)
    assert said in card_of(tmp_path)


def card_of_trained(trainer, directory):
    trainer.train()
    trainer.create_model_card()
    return card_of(directory)


def test_the_card_says_what_a_model_learned_from(tmp_path):
    """A teacher that is given as a model may have been trained since it was opened: it is not called by that name."""
    bert().save_pretrained(tmp_path / "plain")
    opened = type(bert()).from_pretrained(tmp_path / "plain")
    for teacher, said in (
        (opened, "Distilled from a model based on `plain`"),
        (tmp_path / "plain", "Distilled from `plain`"),
        (bert(), "Distilled from a teacher of unknown name"),
    ):
        trainer = PruningTrainer(
            model=bert(),
            args=training_arguments(tmp_path / "run", logging_steps=1),
            train_dataset=bert_examples(),
            pruning_config=PruningConfig(sparsity=0.5, penalty="l1", penalty_weight=1e-4),
            teacher_model=teacher,
            distillation_config=DistillationConfig(hidden_weight=0.5, hidden_layers=[[1, 2]]),
        )
        trainer.train()
        trainer.create_model_card()
        card = card_of(tmp_path / "run")
        assert said in card
        assert "hidden-state loss 0.5 (layers of the model with layers of the teacher: 1 with 2)." in card
        assert "penalty on the weights to prune (l1) was added to the loss; its weight grew towards 0.0001" in card
        assert "Sparse Fine-tuning for Inference Acceleration" in card
        logged = [entry for entry in load_record(tmp_path / "run").history if "loss" in entry]
        assert all(entry["hidden_loss"] >= 0 for entry in logged)
        assert any(entry.get("l1_penalty", 0) > 0 for entry in logged)


def test_without_a_dense_baseline_the_card_says_so(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert "The dense baseline was not measured." in card_of(tmp_path)
    assert "| metric | pruned |" in card_of(tmp_path)


def test_a_dense_baseline_of_other_metrics_is_refused_before_anything_is_written(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    with pytest.raises(
        ValueError,
        match=r"dense_metrics: expected values of eval_loss, eval_accuracy, .* got f1",
    ):
        trainer.create_model_card(dense_metrics={"f1": 0.5})
    assert not (tmp_path / "README.md").exists()
    trainer.create_model_card()
    assert "The dense baseline was not measured." in card_of(tmp_path)


def test_a_model_that_was_not_evaluated_has_no_evaluation_in_its_card(tmp_path):
    trainer = pruning_trainer(tmp_path)
    trainer.train()
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert {"evaluation", "citation"} - set(sections(card)) == {"evaluation"}
    assert "The model was not evaluated" in card
    assert load_record(tmp_path).costs == []
    assert "model-index" not in card


def test_an_evaluation_of_earlier_weights_does_not_count(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation is not None
    trainer.train()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation is None


def test_an_evaluation_before_training_counts_only_for_the_model_before_training(tmp_path):
    trainer = trainer_of(tmp_path, config=AT_ONCE)
    trainer.evaluate()
    trainer.train()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation is None


def test_the_best_model_has_the_evaluation_of_its_own_step(tmp_path):
    trainer = trainer_of(
        tmp_path,
        config=PruningConfig(sparsity=0.7, schedule="linear", begin=1, end=4, frequency=1),
        learning_rate=0.3,
        max_steps=12,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert 4 <= best < 12
    trainer.create_model_card()
    record = load_record(tmp_path)
    (entry,) = [entry for entry in trainer.state.log_history if entry["step"] == best and "eval_loss" in entry]
    assert (record.steps, record.kept_step) == (12, best)
    assert f"The weights are those of step {best}, which had the best evaluation." in card_of(tmp_path)
    assert record.evaluation.metrics["loss"] == entry["eval_loss"] == pytest.approx(measured(trainer)["loss"])
    later = trainer.evaluate()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation.metrics["loss"] == later["eval_loss"]


def test_what_was_evaluated_before_a_run_was_resumed_is_not_known_to_be_of_these_weights(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 5}
    trainer_of(tmp_path, **arguments).train()
    trainer = trainer_of(tmp_path, **arguments)
    trainer.train(resume_from_checkpoint=True)
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation is None
    trainer.evaluate()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation.metrics["loss"] == pytest.approx(measured(trainer)["loss"])


def test_what_predict_measured_counts_too(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    metrics = trainer.predict(bert_examples(30)).metrics
    trainer.create_model_card()
    first, second = load_record(tmp_path).evaluations
    assert (first.part, first.samples) == ("eval", len(EVALUATION))
    assert (second.part, second.samples) == ("test", 30)
    assert second.metrics == {"accuracy": metrics["test_accuracy"], "loss": metrics["test_loss"]}
    assert "the Trainer's `test` data, 30 samples" in card_of(tmp_path)


def test_the_training_data_is_no_evaluation(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate(bert_examples(40), metric_key_prefix="train")
    trainer.create_model_card()
    assert [one.part for one in load_record(tmp_path).evaluations] == ["eval"]


def test_several_evaluation_sets_are_all_in_the_card(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.eval_dataset = {"news": bert_examples(8), "films": EVALUATION}
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card(dense_metrics=metrics | {"eval_news_accuracy": 1.0})
    news, films = load_record(tmp_path).evaluations
    assert (news.part, news.samples, films.part, films.samples) == ("eval_news", 8, "eval_films", 12)
    assert news.metrics["loss"] == metrics["eval_news_loss"]
    assert news.dense_metrics["accuracy"] == 1.0
    assert films.dense_metrics["accuracy"] == metrics["eval_films_accuracy"]
    assert card_of(tmp_path).count("| metric | dense | pruned | difference | recovery |") == 2


def test_weights_that_were_changed_since_they_were_evaluated_have_no_evaluation(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    with torch.no_grad():
        trainer.model.classifier.weight[0, 0] += 1
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation is None


def test_files_that_were_changed_since_they_were_saved_are_saved_again(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    saved = (tmp_path / "model.safetensors").read_bytes()
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    trainer.create_model_card()
    assert (tmp_path / "model.safetensors").read_bytes() == saved


def generating_trainer(folder, model, config=AT_ONCE):
    examples = [{"input_ids": example["input_ids"], "labels": example["input_ids"]} for example in bert_examples()]
    return pruning_trainer(folder, model=model, examples=examples, config=config, max_steps=2)


def test_a_model_that_is_saved_is_not_saved_again_for_its_card(tmp_path):
    trainer = generating_trainer(tmp_path, llama())
    trainer.train()
    trainer.save_model()
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": 7}')
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    trainer.evaluate(trainer.train_dataset[:4])
    trainer.create_model_card()
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    trainer.model.config.id2label = {0: "no", 1: "yes"}
    trainer.create_model_card()
    assert '"yes"' in (tmp_path / "config.json").read_text()
    assert (tmp_path / "generation_config.json").read_text() == '{"max_new_tokens": 7}'
    opened = type(trainer.model).from_pretrained(tmp_path)
    generating_trainer(tmp_path, opened, PruningConfig(method="keep")).create_model_card()
    assert (tmp_path / "generation_config.json").read_text() == '{"max_new_tokens": 7}'
    trainer.train()
    trainer.create_model_card()
    assert (tmp_path / "generation_config.json").read_text() != '{"max_new_tokens": 7}'


def test_what_was_said_once_holds_for_later_cards(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(dense_metrics={"eval_accuracy": 0.9}, license="mit")
    trainer.create_model_card()
    assert "| `accuracy` | 0.9000 |" in card_of(tmp_path)
    assert "license: mit" in card_of(tmp_path)


def test_a_metric_that_is_not_a_number_is_told(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.compute_metrics = lambda prediction: {"f1": float("nan"), "accuracy": 0.5}
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert "| `f1` | not a finite number |" in card_of(tmp_path)


def test_a_model_that_was_not_trained_is_not_said_to_be(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.evaluate()
    trainer.create_model_card()
    card = card_of(tmp_path)
    assert "A model, dense." in card
    assert "Trained for" not in card
    assert "- pruned" not in card
    assert "evaluation" in sections(card)


def test_a_model_that_is_opened_again_keeps_the_record_of_its_training(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    record = load_record(tmp_path)
    again = PruningTrainer(
        model=type(trainer.model).from_pretrained(tmp_path),
        args=training_arguments(tmp_path),
        pruning_config=PruningConfig(method="keep"),
    )
    again.create_model_card()
    assert load_record(tmp_path) == record


def test_a_license_of_an_earlier_base_model_is_not_that_of_a_new_one(tmp_path):
    for name, license_name in (("first", "mit"), ("second", "apache-2.0")):
        model = bert()
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "README.md").write_text(f"---\nlicense: {license_name}\n---\n")
        trainer = pruning_trainer(tmp_path / "out", model=type(model).from_pretrained(tmp_path / name))
        trainer.train()
        trainer.create_model_card()
        assert f"license: {license_name}\n" in card_of(tmp_path / "out")


def test_the_saved_model_is_the_one_that_the_card_is_about(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert (tmp_path / "model.safetensors").read_bytes() != before
    assert load_record(tmp_path).evaluation.metrics["loss"] == pytest.approx(measured(trainer)["loss"])


def test_measuring_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.model.train()
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    trainer.create_model_card()
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())
    costs = load_record(tmp_path).costs
    samples = min(len(trainer.eval_dataset), 32)
    assert [cost.shapes for cost in costs] == [{"input_ids": [1, 8]}, {"input_ids": [samples, 8]}]
    for cost in costs:
        low, high = cost.model.quartiles
        assert 0 < low <= cost.model.seconds <= high < 5
        assert 1 <= cost.passes <= 20
        assert cost.dense is None
    assert costs[1].model.flops == samples * costs[0].model.flops > 0
    weights = sum(parameter.nbytes for parameter in trainer.model.parameters())
    assert weights < costs[0].model.memory_bytes < costs[1].model.memory_bytes


def test_what_a_person_says_goes_into_the_card(tmp_path, caplog):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card(
        language="de",
        license="mit",
        tags="film",
        model_name="Kino",
        finetuned_from="somebody/base",
        tasks="text-classification",
        dataset_tags="somebody/reviews",
        dataset="Reviews",
        dataset_args="plain",
    )
    card = card_of(tmp_path)
    head = card.split("\n---\n")[0]
    for line in ("license: mit", "- de", "- film", "base_model: somebody/base", "- somebody/reviews", "name: Reviews"):
        assert line in head
    assert "Evaluated on [`Reviews`](" in card
    assert "configuration `plain`" in card


def test_a_license_that_is_not_known_is_left_out_with_a_warning(tmp_path, caplog):
    model = bert()
    model.save_pretrained(tmp_path / "base")
    trainer = pruning_trainer(tmp_path / "out", model=type(model).from_pretrained(tmp_path / "base"))
    trainer.train()
    with caplog.at_level(logging.WARNING):
        trainer.create_model_card()
    assert "The card names no license" in caplog.text
    assert "license" not in card_of(tmp_path / "out").split("\n---\n")[0]
    assert "`base`, fine-tuned" in card_of(tmp_path / "out")
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "out").iterdir() if path.suffix in (".md", ".json")
    )


def test_the_text_of_a_person_survives_a_new_card(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.create_model_card()
    card = card_of(tmp_path)
    (tmp_path / "README.md").write_text(
        card.replace("<!-- hf-prune: end size -->", "<!-- hf-prune: end size -->\n\nMine.")
    )
    trainer.evaluate()
    trainer.create_model_card()
    assert re.search(r"end size -->\n\nMine\.\n\n<!-- hf-prune: begin usage", card_of(tmp_path))
    assert "evaluation" in sections(card_of(tmp_path))


# ---- Other trainers ----


def test_without_pruning_the_card_is_the_stock_one(tmp_path):
    trainer = trainer_of(tmp_path, config=None)
    trainer.train()
    trainer.create_model_card(model_name="Stock")
    assert "This model card has been generated automatically" in card_of(tmp_path)
    assert not (tmp_path / "run_record.json").exists()


def test_a_seq2seq_trainer_makes_the_card_too(tmp_path):
    trainer = PruningSeq2SeqTrainer(
        model=bert(),
        args=training_arguments(tmp_path, Seq2SeqTrainingArguments),
        train_dataset=bert_examples(),
        eval_dataset=EVALUATION,
        pruning_config=CONFIG,
    )
    trainer.train()
    trainer.evaluate()
    trainer.create_model_card()
    assert load_record(tmp_path).evaluation.main_metric is None
    assert "evaluation" in sections(card_of(tmp_path))


def injected(model, config):
    model.add_adapter(config)
    return model


@pytest.mark.parametrize("put_on", [get_peft_model, injected])
def test_adapters_have_the_card_of_the_trainer_that_is_extended(tmp_path, put_on):
    model = put_on(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    examples = [{"input_ids": example["input_ids"], "labels": example["input_ids"]} for example in bert_examples()]
    trainer = pruning_trainer(tmp_path, model=model, examples=examples, config=AT_ONCE)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    assert "hf-prune: begin" not in card_of(tmp_path)


# ---- Pushes ----


@pytest.fixture
def client(lfs_client):
    return lfs_client


TRAIN = """
import json, sys
import numpy as np
from models import bert, bert_examples, training_arguments
from hf_prune import PruningConfig, PruningTrainer
from transformers import set_seed

settings = json.loads(sys.argv[1])
set_seed(0)
trainer = PruningTrainer(
    model=bert(),
    args=training_arguments(sys.argv[2], **settings),
    train_dataset=bert_examples(),
    eval_dataset=bert_examples(12),
    compute_metrics=lambda p: {"accuracy": float(np.mean(np.argmax(p.predictions, axis=-1) == p.label_ids))},
    pruning_config=PruningConfig(sparsity=0.7, schedule="linear", begin=2, end=8, frequency=2),
)
trainer.train()
trainer.evaluate()
"""


def ran(client, source, folder, token=None, env=None, **settings):
    return client.python(TRAIN + source, json.dumps(settings), folder, token=token, env=env)


def test_a_trainer_pushes_model_and_card_in_one_commit(hub, client, tmp_path):
    push = "info = trainer.push_to_hub(dense_metrics={'eval_accuracy': 0.9})\nprint(info.oid, info.repo_url.repo_id)"
    done = ran(client, push, tmp_path / "film")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["somebody/film"]
    assert len(repo.commits()) == 2
    assert repo.commits()[-1].summary == "End of training"
    assert done.stdout.split()[-2:] == [repo.commits()[-1].oid, "somebody/film"]
    files = repo.files()
    assert "training_args.bin" not in files
    assert "pruning_masks.safetensors" not in files
    assert files["README.md"].decode() == card_of(tmp_path / "film")
    assert "| `accuracy` | 0.9000 |" in files["README.md"].decode()
    assert 'from_pretrained("somebody/film")' in files["README.md"].decode()
    assert "# film" in files["README.md"].decode()


def test_a_trainer_that_pushes_reads_the_model_it_saved_once(hub, client, tmp_path):
    push = """
from reads import counted_reads
with counted_reads() as reads:
    trainer.push_to_hub()
print(json.dumps(reads))
"""
    done = ran(client, push, tmp_path / "film")
    assert done.returncode == 0, done.stderr
    reads = json.loads(done.stdout.splitlines()[-1])
    weights = str(tmp_path / "film" / "model.safetensors")
    assert (reads["skeletons"], reads["counts"]) == ({str(tmp_path / "film"): 1}, {weights: 1})
    assert of_weights(reads["hashes"]) == {weights: 1}


def test_a_push_during_training_hashes_its_copy_once_wherever_it_goes(hub, client, tmp_path):
    settings = {**DURING, "hub_strategy": "checkpoint", "hub_always_push": True}
    counting = "from reads import counted_reads\ncounting = counted_reads()\nreads = counting.__enter__()\n"
    done = client.python(counting + TRAIN + "print(json.dumps(reads))", json.dumps(settings), tmp_path / "film")
    assert done.returncode == 0, done.stderr
    reads = json.loads(done.stdout.splitlines()[-1])
    files = hub.repos["somebody/film"].files()
    assert files["last-checkpoint/model.safetensors"] == files["model.safetensors"]
    assert len(reads["counts"]) >= 2
    assert set(reads["counts"].values()) == set(reads["skeletons"].values()) == {1}
    assert of_weights(reads["hashes"]) == reads["counts"]


def test_a_trainer_pushes_where_and_as_it_is_told(hub, client, tmp_path):
    push = """
open(f"{sys.argv[2]}/words.csv", "w").close()
how = {"blocking": False, "revision": "v1", "private": True, "with_masks": True, "include": ["*.csv"], "license": "mit"}
future = trainer.push_to_hub("Mine", **how)
print(future.result().oid)
"""
    done = ran(client, push, tmp_path / "film", hub_model_id="lab/film")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["lab/film"]
    assert repo.private
    assert repo.commits("v1")[-1].summary == "Mine"
    assert {"pruning_masks.safetensors", "words.csv"} <= set(repo.files("v1"))
    assert "license: mit" in repo.files("v1")["README.md"].decode()
    done = ran(
        client, "print(trainer.push_to_hub(create_pr=True).pr_revision)", tmp_path / "b", hub_model_id="lab/film"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "refs/pr/1"


def test_emissions_are_in_the_card_where_codecarbon_is_on(hub, client, tmp_path):
    nowhere = {"HTTPS_PROXY": "http://127.0.0.1:9"}  # or codecarbon asks the network in which country it is
    done = ran(client, "trainer.create_model_card()", tmp_path / "film", env=nowhere, report_to=["codecarbon"])
    assert done.returncode == 0, done.stderr
    emissions = load_record(tmp_path / "film").emissions
    assert emissions.kilograms > 0
    card = card_of(tmp_path / "film")
    assert f"emissions: {emissions.kilograms * 1000}\n" in card
    assert f"estimated by codecarbon for the electricity of {emissions.country}: " in card
    assert f"{emissions.kilograms * 1000:.4g} g of CO2 equivalent" in card


def test_a_trainer_whose_push_fails_says_what_is_on_the_hub(hub, client, tmp_path):
    hub.fail("POST", "/commit/", cut="before")
    push = """
from hf_prune.errors import PushError
try:
    trainer.push_to_hub()
except PushError as error:
    print(error)
    print(trainer.push_to_hub().oid)
"""
    done = ran(client, push, tmp_path / "film")
    assert done.returncode == 0, done.stderr
    assert "it has nothing of this push" in done.stdout
    assert done.stdout.split()[-1] == hub.repos["somebody/film"].commits()[-1].oid


DURING = {"push_to_hub": True, "hub_strategy": "every_save", "save_strategy": "steps", "save_steps": 5}


def test_pushes_during_training_that_failed_are_told_at_its_end(hub, client, tmp_path):
    fault = hub.fail("POST", "/commit/", status=500, times=None)
    done = ran(client, "print(json.dumps(trainer.failed_pushes))", tmp_path / "film", **DURING, hub_always_push=True)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert [line.split(":")[0] for line in failed] == ["step 5", "step 10"]
    assert all("the Hub has a server error" in line for line in failed)
    assert fault.hits == 2
    assert "Of 2 pushes to the Hub during training, 2 failed" in done.stderr
    hub.faults.clear()


def test_pushes_during_training_with_a_token_that_may_not_are_told(hub, client, tmp_path):
    hub.create_repo("somebody/film")
    settings = DURING | {"hub_model_id": "somebody/film", "hub_token": READ_TOKEN, "hub_strategy": "all_checkpoints"}
    done = ran(client, "print(json.dumps(trainer.failed_pushes))", tmp_path / "film", **settings, hub_always_push=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout.splitlines()[-1])) == 2
    assert READ_TOKEN not in done.stdout + done.stderr


def test_each_commit_during_training_holds_one_model_and_its_card(hub, client, tmp_path):
    hub.create_repo("somebody/film", {"README.md": b"---\nthumbnail: a.png\n---\nMine.\n", "sparsity.json": b"{}"})
    settings = DURING | {"save_steps": 2, "hub_strategy": "checkpoint", "hub_always_push": True}
    done = ran(client, "print(json.dumps(trainer.failed_pushes))", tmp_path / "film", **settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    repo = hub.repos["somebody/film"]
    commits = [commit for commit in repo.commits() if commit.summary.startswith("Training in progress")]
    assert [commit.summary for commit in commits] == [f"Training in progress, step {step}" for step in (2, 4, 6, 8, 10)]
    for commit in commits:
        files = repo.files(commit.oid)
        for name, content in files.items():
            (tmp_path / "there" / commit.oid / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "there" / commit.oid / name).write_bytes(content)
        counted = make_report(tmp_path / "there" / commit.oid)
        assert f"{counted.prunable_sparsity:.2%} of the prunable weights" in files["README.md"].decode()
        assert "Mine." in files["README.md"].decode()
        assert files["model.safetensors"] == files["last-checkpoint/model.safetensors"]
        assert files["pruning_masks.safetensors"] == files["last-checkpoint/pruning_masks.safetensors"]
        assert "last-checkpoint/optimizer.pt" in files
        assert not {"training_args.bin", "optimizer.pt"} & set(files)


def test_a_push_that_is_under_way_is_not_disturbed_by_the_next_save(hub, client, tmp_path):
    hub.fail("POST", "/preupload/", delay=1)
    settings = DURING | {"save_steps": 1}
    done = ran(client, "print(json.dumps(trainer.failed_pushes))", tmp_path / "film", **settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "pruning_masks.safetensors" in hub.repos["somebody/film"].files()


def test_a_token_is_in_no_file_here_or_on_the_hub(hub, client, tmp_path):
    settings = DURING | {"hub_token": WRITE_TOKEN, "hub_strategy": "all_checkpoints", "hub_always_push": True}
    done = ran(client, "trainer.push_to_hub()", tmp_path / "film", **settings, token=OTHER_TOKEN)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["somebody/film"]
    assert len(repo.commits()) > 3
    assert "training_args.bin" not in repo.files()
    for checkpoint in ("checkpoint-5", "checkpoint-10"):
        whole = {f"{checkpoint}/{path.name}" for path in (tmp_path / "film" / checkpoint).iterdir()}
        assert {f"{checkpoint}/training_args.bin", f"{checkpoint}/pruning_masks.safetensors"} <= whole
        assert whole <= set(repo.files())
    written = [path.read_bytes() for path in (tmp_path / "film").rglob("*") if path.is_file()]
    sent = [content for commit in repo.commits() for content in repo.files(commit.oid).values()]
    assert [content for content in written + sent if WRITE_TOKEN.encode() in content] == []
    assert WRITE_TOKEN not in done.stdout + done.stderr


def test_a_checkpoint_is_pushed_without_what_links_lead_to(tmp_path):
    folder, copy = tmp_path / "checkpoint-2", tmp_path / "copy"
    folder.mkdir()
    (tmp_path / "outside.json").write_text("{}")
    (folder / "inside.json").write_text("{}")
    (folder / "link.json").symlink_to("inside.json")
    (folder / "secret.json").symlink_to(tmp_path / "outside.json")
    assert {path.name for path in copy_folder(folder, copy)} == {"inside.json", "link.json"}
    assert (copy / "inside.json").samefile(folder / "inside.json")


def test_a_token_is_the_same_for_all_that_use_it():
    token = UnsavedToken("hf_mine")
    assert (token, f"Bearer {token}", copy.deepcopy(token)) == ("hf_mine", "Bearer hf_mine", "hf_mine")
    assert pickle.loads(pickle.dumps({"token": token})) == {"token": None}


ADAPTERS = """
from peft import LoraConfig, get_peft_model
from models import bert, bert_examples, training_arguments
from hf_prune import PruningConfig, PruningTrainer
import json, sys

trainer = PruningTrainer(
    model=get_peft_model(bert(), LoraConfig(r=2, target_modules=["query"])),
    args=training_arguments(sys.argv[1], push_to_hub=True, save_strategy="steps", save_steps=5, hub_always_push=True),
    train_dataset=bert_examples(),
    pruning_config=PruningConfig(sparsity=0.5),
)
trainer.train()
print(json.dumps(trainer.failed_pushes))
"""


def test_pushes_of_adapters_during_training_have_masks_and_their_failures_are_told(hub, client, tmp_path):
    done = client.python(ADAPTERS, tmp_path / "film")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert {"adapter_model.safetensors", "pruning_masks.safetensors"} <= set(hub.repos["somebody/film"].files())
    hub.fail("POST", "/commit/", status=500, times=None)
    done = client.python(ADAPTERS, tmp_path / "other")
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in json.loads(done.stdout.splitlines()[-1])] == ["step 5", "step 10"]


def test_pushes_during_training_that_went_well_are_not_spoken_of(hub, client, tmp_path):
    push = "print(json.dumps(trainer.failed_pushes))\ntrainer.push_to_hub()"
    done = ran(client, push, tmp_path / "film", **DURING)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert "pushes to the Hub during training" not in done.stderr
    assert not list((tmp_path / "film").glob("_push_*"))
    repo = hub.repos["somebody/film"]
    assert repo.commits()[-1].summary == "End of training"
    assert "hf-prune: begin evaluation" in repo.files()["README.md"].decode()
    assert "pruning_masks.safetensors" not in repo.files()
