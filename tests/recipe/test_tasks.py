"""Recipes of every task, on tiny models and texts that are made here."""

import json
import math

import pytest
import torch
import transformers
import yaml
from test_run import reviews, save_tiny_bert, write_csv

from hf_prune.cli.print_result import print_result
from hf_prune.errors import RecipeError
from hf_prune.recipe.data import load_data
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import prepare
from hf_prune.recipe.run import run
from hf_prune.recipe.tasks import first_sentence

TRAINING = {
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A BERT and a Llama with the same tokenizer, and reviews of two sentences each."""
    folder = tmp_path_factory.mktemp("tasks")
    save_tiny_bert(folder / "bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "bert")
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.sep_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "llama")
    rows = [row | {"text": f"{row['text']}. the film was {row['label']}"} for row in reviews(120)]
    write_csv(folder / "reviews.csv", rows)
    return folder


def write_recipe(folder, task, material, **sections):
    content = {
        "task": task,
        "output_dir": str(folder / "out"),
        "model": {"name": str(material / "llama")},
        "dataset": {"name": str(material / "reviews.csv"), "validation_size": 8, "test_size": 20, "max_length": 16},
        "metrics": ["perplexity"],
        "training": TRAINING,
        "dense": {"max_steps": 4},
        "pruning": {"sparsity": 0.5, "end": 0.5},
    }
    for name, values in sections.items():
        content[name] = content[name] | values if isinstance(content.get(name), dict) else values
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}


def summarization(folder, material, **sections):
    return write_recipe(
        folder,
        "summarization",
        material,
        **{
            "model": {"name": None, "config": T5, "tokenizer": str(material / "bert")},
            "metrics": ["rouge"],
            "generation": {"samples": 2, "max_new_tokens": 6},
        }
        | sections,
    )


# ---- Text generation ----


def test_a_language_model_is_pruned_and_measured_by_perplexity(tmp_path, material, capsys):
    recipe = write_recipe(
        tmp_path, "text-generation", material, generation={"prompts": ["the film was", "the"], "max_new_tokens": 5}
    )
    result = run(load_recipe(recipe), say=lambda text: None)
    for values in (result.dense, result.pruned):
        assert values["perplexity"] == pytest.approx(math.exp(values["loss"]))
    assert result.report.prunable_sparsity == pytest.approx(0.5, abs=1e-3)
    assert result.recovery == result.dense["perplexity"] / result.pruned["perplexity"]

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    written = json.loads((tmp_path / "out" / "results.json").read_text())["generation"]
    assert [sample["prompt"] for sample in written["samples"]] == ["the film was", "the"]
    for sample in written["samples"]:
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        again = model.generate(ids, attention_mask=torch.ones_like(ids))[0, ids.shape[1] :]
        assert tokenizer.decode(again, skip_special_tokens=True) == sample["pruned"]
    assert written["tokens_per_second"] > 0
    assert written["dense_tokens_per_second"] > 0

    print_result(result)
    row = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("perplexity"))
    assert row.split()[-1] == f"{result.recovery:.1%}"

    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "perplexity" in card
    assert "tokens/s" in card
    for sample in written["samples"]:
        assert all(text.strip() in card for text in sample.values())


def test_a_training_that_diverges_is_recorded_without_the_metrics_that_are_not_finite(tmp_path, material, capsys):
    training = {"learning_rate": 30.0, "max_grad_norm": 0, "max_steps": 12}
    recipe = write_recipe(tmp_path, "text-generation", material, training=training, pruning={"begin": 0, "end": 0.2})
    result = run(load_recipe(recipe, ["dense.learning_rate=0.01"]), say=lambda text: None)
    assert result.pruned["perplexity"] == math.inf
    assert result.recovery is None
    print_result(result)
    assert "inf" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "results.json").read_text(), parse_constant=pytest.fail)
    assert written["pruned"]["perplexity"] is None
    assert written["dense"]["perplexity"] == result.dense["perplexity"]
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "| `perplexity` | – | not a finite number |" in card


def test_perplexity_is_that_of_every_token_of_the_held_out_texts(tmp_path, material):
    prepared = prepare(load_recipe(write_recipe(tmp_path, "text-generation", material)))
    blocks = torch.tensor(prepared.data["test"]["input_ids"])
    assert blocks.shape[1] == 16
    from hf_prune.recipe.prepare import make_trainer

    found = prepared.task.evaluate(make_trainer(prepared, dense=True), prepared.data["test"])[""]
    prepared.model.eval()
    with torch.no_grad():
        logits = prepared.model(blocks).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten())
    assert found["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_texts_are_packed_one_after_another_with_an_end_each(tmp_path, material):
    prepared = prepare(load_recipe(write_recipe(tmp_path, "text-generation", material)))
    texts = load_data(prepared.recipe.dataset, prepared.task.columns)["test"]["text"]
    end = prepared.tokenizer.eos_token_id
    expected = [token for text in texts for token in (*prepared.tokenizer(text)["input_ids"], end)]
    blocks = prepared.data["test"]["input_ids"]
    assert [token for block in blocks for token in block] == expected[: len(expected) // 16 * 16]
    assert list(prepared.data["test"]["labels"]) == list(blocks)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"metrics": ["accuracy"]}, r"metrics: expected \[perplexity\] for text-generation, got"),
        (
            {"dataset": {"max_length": 60, "test_size": 1}},
            "dataset.max_length: the (train|validation|test) split has too few tokens",
        ),
        ({"dataset": {"group_by": "source"}}, "dataset.group_by: must not be set for text-generation"),
    ],
)
def test_what_does_not_fit_text_generation_is_told(tmp_path, material, sections, message):
    with pytest.raises(RecipeError, match=message):
        prepare(load_recipe(write_recipe(tmp_path, "text-generation", material, **sections)))
    assert not (tmp_path / "out").exists()


# ---- Summarization ----


def test_an_encoder_decoder_is_made_of_a_configuration_and_measured_by_what_it_writes(tmp_path, material):
    result = run(load_recipe(summarization(tmp_path, material)), say=lambda text: None)
    assert {"rouge1", "rouge2", "rougeL"} <= set(result.pruned)
    assert result.report.prunable_sparsity == pytest.approx(0.5, abs=1e-3)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out" / "model")
    assert isinstance(model, transformers.T5ForConditionalGeneration)
    assert model.generation_config.max_new_tokens == 6
    written = json.loads((tmp_path / "out" / "results.json").read_text())["generation"]["samples"]
    assert len(written) == 2
    assert all(sample["dense"] is not None for sample in written)


def test_the_first_sentence_is_the_summary_of_the_rest(tmp_path, material):
    prepared = prepare(load_recipe(summarization(tmp_path, material)))
    example = prepared.data["train"][0]
    summary = prepared.tokenizer.decode(example["labels"], skip_special_tokens=True)
    rest = prepared.tokenizer.decode(example["input_ids"], skip_special_tokens=True)
    assert summary.startswith("the film was")
    assert rest.startswith("the film was")
    assert len(rest.split()) == 4


def test_a_column_of_summaries_is_taken_as_it_is(tmp_path, material):
    prepared = prepare(load_recipe(summarization(tmp_path, material, dataset={"summary_column": "answer"})))
    assert len(prepared.data["test"]) == 20
    assert all(len(labels) <= 5 for labels in prepared.data["train"]["labels"])


@pytest.mark.parametrize(
    ("text", "first", "rest"),
    [
        ("One. Two! Three?", "One.", "Two! Three?"),
        ("A film<br /><br />by U.S. people. Bad.", "A film by U.S.", "people. Bad."),
        ("No end", "No end", ""),
        ("", "", ""),
    ],
)
def test_first_sentences(text, first, rest):
    assert first_sentence(text) == (first, rest)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": None}, "model.name: set name or config, but not both; got neither"),
        ({"config": T5}, "model.name: set name or config, but not both; got both"),
        ({"name": None, "config": T5}, "model.config: must have a model_type, and model.tokenizer must be set"),
        ({"name": None, "config": {"d_model": 16}, "tokenizer": "x"}, "model.config: must have a model_type"),
        (
            {"name": None, "config": T5, "tokenizer": "x", "gguf_file": "a"},
            "model.gguf_file: must not be set with a config",
        ),
    ],
)
def test_a_model_is_named_or_made(tmp_path, material, model, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, "text-generation", material, model=model))


def test_an_unknown_field_of_a_new_model_is_told(tmp_path, material):
    recipe = summarization(
        tmp_path, material, model={"name": None, "config": T5 | {"d_modl": 8}, "tokenizer": str(material / "bert")}
    )
    with pytest.raises(RecipeError, match=r"model.config.d_modl: unknown field of T5Config; did you mean 'd_model'"):
        prepare(load_recipe(recipe))


@pytest.mark.parametrize(
    ("task", "metrics", "expected"),
    [
        ("text-generation", ["accuracy"], r"\[perplexity\] for text-generation, got \['accuracy'\]"),
        ("summarization", ["rouge", "f1"], r"\[rouge\] for summarization, got"),
        ("text-classification", ["rouge"], r"\[accuracy, f1\] for text-classification, got"),
    ],
)
def test_metrics_of_another_task_are_refused_when_the_recipe_is_read(tmp_path, material, task, metrics, expected):
    with pytest.raises(RecipeError, match=f"recipe.yaml:\\d+: metrics: expected {expected}"):
        load_recipe(write_recipe(tmp_path, task, material, metrics=metrics))


# ---- Classification by groups ----


def test_groups_of_the_test_part_are_measured_apart(tmp_path, material):
    recipe = write_recipe(
        tmp_path,
        "text-classification",
        material,
        model={"name": str(material / "bert")},
        metrics=["accuracy", "f1"],
        dataset={"group_by": "source", "max_length": 24},
    )
    result = run(load_recipe(recipe), say=lambda text: None)
    assert set(result.groups) == {"a", "b"}
    record = json.loads((tmp_path / "out" / "model" / "run_record.json").read_text())["evaluations"]
    assert record[0]["samples"] == 20 == sum(one["samples"] for one in record[1:])
    for run_of in ("dense", "pruned"):
        overall = {"dense": result.dense, "pruned": result.pruned}[run_of]["accuracy"]
        weighted = sum(
            one["samples"] * result.groups[name][run_of]["accuracy"]
            for one, name in zip(record[1:], result.groups, strict=True)
        )
        assert weighted / 20 == pytest.approx(overall)
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "where source is a" in card
    assert "where source is b" in card
