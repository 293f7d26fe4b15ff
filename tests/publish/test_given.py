"""What an author says for the card of a model of a loop of one's own: base model, metrics, data set."""

import json

import pytest
from models import bert, bert_examples, training_arguments
from test_card import KNOWN, card_of, metadata_of, parts_of, rows_of, save_with_record
from test_sparsity_json import flip_a_weight, save_sparse
from transformers import Trainer
from typer.testing import CliRunner

from hf_prune import PruningConfig
from hf_prune.cli.commands import app
from hf_prune.errors import CardError
from hf_prune.publish.given import read_metrics
from hf_prune.publish.record import RECORD_NAME, load_record

BERT = "BertForSequenceClassification"


def written(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def run(*words):
    return CliRunner().invoke(app, ["card", *map(str, words)])


def test_a_loop_of_ones_own_has_a_whole_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my-model"
    save_sparse("bert", folder)
    PruningConfig(sparsity=0.3).save_pretrained(folder)
    written(tmp_path / "results.json", {"accuracy": 0.75, "f1": 0.5, "samples": 40})
    words = ["--base-model", "ada/bert", "--metrics", tmp_path / "results.json", "--dataset", "ada/films"]
    done = run(folder, *words)
    assert done.exit_code == 0, done.output
    assert "The license of the base model is unknown: the model card of ada/bert cannot be read" in " ".join(
        done.output.split()
    )
    card = (folder / "README.md").read_text(encoding="utf-8")
    metadata = metadata_of(card)
    assert (metadata["base_model"], metadata["datasets"], metadata["metrics"]) == (
        "ada/bert",
        ["ada/films"],
        ["accuracy", "f1"],
    )
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"] == {"name": "ada/films", "type": "ada/films"}
    assert {row["type"]: row["value"] for row in result["metrics"]} == {"accuracy": 0.75, "f1": 0.5}
    part = parts_of(card)["evaluation"]
    films = "[`ada/films`](https://huggingface.co/datasets/ada/films)"
    assert f"Evaluated on {films}, 40 samples; the metrics are those of `results.json`, given by the author." in part
    assert rows_of(part)["accuracy"] == ["0.7500"]
    assert "`accuracy` is **0.7500**" in parts_of(card)["summary"]
    assert "Method: `magnitude`" in parts_of(card)["sparsity"]
    assert str(tmp_path) not in card + (folder / RECORD_NAME).read_text(encoding="utf-8")
    flip_a_weight(folder)
    assert "has changed since run_record.json was written" in run(folder).output


def test_options_override_what_a_record_says(tmp_path):
    folder = save_with_record(tmp_path / "model", **KNOWN)
    base = tmp_path / "models" / "my-base"
    base.mkdir(parents=True)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    metrics = written(tmp_path / "all_results.json", {"eval_accuracy": 0.5, "eval_samples": 9, "train_loss": 1.0})
    assert run(folder, "--base-model", base, "--metrics", metrics, "--dataset", base).exit_code == 0
    record = load_record(folder)
    (evaluation,) = record.evaluations
    assert (evaluation.metrics, evaluation.samples, evaluation.part) == ({"accuracy": 0.5}, 9, "eval")
    assert (record.steps, evaluation.dataset.name, evaluation.dataset.hub_name) == (1234, "my-base", None)
    card = card_of(folder)
    assert "`my-base`, fine-tuned" in card
    assert metadata_of(card)["license"] == "apache-2.0"
    assert "base_model" not in metadata_of(card)
    assert str(tmp_path) not in card
    assert run(folder, "--base-model", "ada/other", "--dataset", "ada/news").exit_code == 0
    metadata = metadata_of(card_of(folder))
    assert (metadata["base_model"], metadata["datasets"]) == ("ada/other", ["ada/news"])
    assert run(folder, "--base-model", base).exit_code == 0
    assert "base_model" not in metadata_of(card_of(folder))


def test_without_metrics_the_data_set_is_that_of_the_training(tmp_path):
    save_sparse("bert", tmp_path)
    assert run(tmp_path, "--dataset", "ada/films").exit_code == 0
    assert load_record(tmp_path).training_data.hub_name == "ada/films"
    assert metadata_of(card_of(tmp_path))["datasets"] == ["ada/films"]


def test_an_empty_name_is_refused(tmp_path):
    save_sparse("bert", tmp_path)
    for option in ("--base-model", "--dataset"):
        done = run(tmp_path, option, " ")
        assert (done.exit_code, f"{option}: expected a name, got ' '" in done.output) == (2, True)


def test_each_prefix_is_an_evaluation(tmp_path):
    values = {
        "epoch": 3.0,
        "total_flos": 1e12,
        "train_loss": 0.1,
        "train_samples": 100,
        "eval_loss": 2.0,
        "eval_runtime": 1.5,
        "eval_samples": 10,
        "perplexity": 7.5,
        "predict_accuracy": 0.5,
        "eval_f1": float("nan"),
    }
    first, second = read_metrics(written(tmp_path / "all_results.json", values), "GPT2LMHeadModel")
    assert (first.part, first.metrics, first.main_metric) == ("eval", {"loss": 2.0, "perplexity": 7.5}, "perplexity")
    assert (first.samples, first.not_finite, first.given_in) == (10, ["f1"], "all_results.json")
    assert (second.part, second.metrics, second.samples) == ("predict", {"accuracy": 0.5}, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[0.5]", "expected a JSON object of name -> number, got list"),
        ("{", "expected JSON, got a file that cannot be read"),
        ('{"accuracy": ' + "[" * 9999 + "]" * 9999 + "}", "expected at most 100 levels of nesting"),
        ('{"accuracy": 1' + "0" * 400 + "}", "expected whole numbers up to 1e+308"),
        ({"accuracy": "0.5"}, "expected a number as accuracy, got '0.5'"),
        ({"accuracy": True}, "expected a number as accuracy, got True"),
        ({"train_loss": 0.5, "epoch": 3}, "expected at least one metric with a finite number, found none"),
    ],
    ids=["list", "no JSON", "nested", "endless number", "text", "boolean", "of training"],
)
def test_a_file_without_metrics_is_refused_before_anything_is_written(tmp_path, content, message):
    save_sparse("bert", tmp_path)
    file = written(tmp_path / "metrics.json", content)
    with pytest.raises(CardError) as caught:
        read_metrics(file, BERT)
    assert message in str(caught.value)
    done = run(tmp_path, "--without-measurements", "--metrics", file)
    assert (done.exit_code, "--metrics: " in done.output) == (2, True)
    assert not (tmp_path / RECORD_NAME).exists()
    assert not (tmp_path / "README.md").exists()


def test_metrics_for_a_record_of_other_weights_are_refused(tmp_path):
    folder = save_with_record(tmp_path / "model", **KNOWN)
    metrics = written(tmp_path / "metrics.json", {"accuracy": 0.5})
    before = (folder / RECORD_NAME).read_bytes()
    flip_a_weight(folder)
    assert "has changed since run_record.json was written" in run(folder, "--metrics", metrics).output
    assert (folder / RECORD_NAME).read_bytes() == before
    assert run(folder, "--metrics", metrics, "--without-measurements").exit_code == 0
    assert [one.metrics for one in load_record(folder).evaluations] == [{"accuracy": 0.5}]


def test_what_becomes_of_a_card_that_the_trainer_generated_is_told(tmp_path):
    told = "The text that the Trainer had generated was replaced; its metadata were kept."
    hint = "To have its results in the card, pass them with --metrics."
    arguments = training_arguments(tmp_path)
    trainer = Trainer(bert(), arguments, train_dataset=bert_examples(), eval_dataset=bert_examples())
    trainer.train()
    results = written(tmp_path / "results.json", trainer.evaluate())
    for words, lines in (((), [told, hint]), (("--metrics", results), [told])):
        trainer.save_model()
        trainer.create_model_card(language="en", finetuned_from="ada/bert")
        (tmp_path / "sparsity.json").unlink(missing_ok=True)
        done = run(tmp_path, *words)
        assert done.exit_code == 0, done.output
        assert done.output.splitlines()[1:] == lines
        metadata = metadata_of((tmp_path / "README.md").read_text(encoding="utf-8"))
        assert (metadata["language"], metadata["base_model"]) == (["en"], "ada/bert")
    assert told not in run(tmp_path).output
