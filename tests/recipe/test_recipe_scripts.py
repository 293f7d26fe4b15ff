from pathlib import Path

import pytest
import torch
from forks import run_script as run_forked
from safetensors.torch import load_file
from test_run import PRUNABLE, reviews, save_tiny_bert, write_csv
from text_models import save_text_models, texts

from hf_prune.saved.report import make_report

RECIPES = Path(__file__).parents[2] / "recipes"
SCRIPT = RECIPES / "text_classification.py"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    (folder / "data").mkdir()
    write_csv(folder / "data" / "train.csv", reviews()[:60])
    write_csv(folder / "data" / "test.csv", reviews()[60:])
    return folder


def run_script(script, material, output, *flags):
    flags = [
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "8",
        "--use_cpu",
        "true",
        "--report_to",
        "none",
        *flags,
    ]
    return run_on(script, material / "model", material / "data", output, *flags)


def run_on(script, model, data, output, *flags):
    return run_forked(script, "--model_name", model, "--dataset_name", data, "--output_dir", output, *flags)


def zeros_by_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    return {
        name: int((weight == 0).sum()) / weight.numel() for name, weight in weights.items() if PRUNABLE.fullmatch(name)
    }


def test_the_script_prunes_with_flags_of_trainer_and_pruning(material, tmp_path):
    done = run_script(SCRIPT, material, tmp_path / "out", "--sparsity", "0.5", "--schedule", "linear")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "eval_accuracy" in done.stdout
    shares = zeros_by_tensor(tmp_path / "out")
    assert len(shares) == 12
    assert set(shares.values()) == {0.5}


def test_the_script_goes_on_from_a_checkpoint(material, tmp_path):
    flags = ["--sparsity", "0.5", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "2"]
    whole = run_script(SCRIPT, material, tmp_path / "whole", *flags)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    again = run_script(SCRIPT, material, tmp_path / "again", *flags, "--resume_from_checkpoint", checkpoint)
    assert (whole.returncode, again.returncode) == (0, 0), again.stderr[-2000:]
    assert (whole.stdout.count("{'loss'"), again.stdout.count("{'loss'")) == (4, 2)
    expected, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(weight, weights[name]) for name, weight in expected.items())


def test_every_script_of_a_trainer_takes_the_checkpoint_to_go_on_from():
    for path in RECIPES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "trainer.train()" not in text
        assert ("trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)" in text) == ("Trainer" in text)


def test_the_script_is_a_plain_one_with_one_word_changed_and_one_line_added(material, tmp_path):
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    plain = text.replace("trainer = PruningTrainer(  # was: Trainer", "trainer = Trainer(")
    plain = plain.replace("        pruning_config=pruning.config,  # and this line is new\n", "")
    plain = plain.replace("    TrainingArguments,\n)", "    Trainer,\n    TrainingArguments,\n)")
    assert plain.count("\n") == text.count("\n")
    (tmp_path / "plain.py").write_text(plain, encoding="utf-8")
    done = run_script(tmp_path / "plain.py", material, tmp_path / "out", "--sparsity", "0.5")
    assert done.returncode == 0, done.stderr[-2000:]
    assert max(zeros_by_tensor(tmp_path / "out").values()) < 0.1


def test_a_wrong_flag_is_refused_before_anything_is_written(material, tmp_path):
    done = run_script(SCRIPT, material, tmp_path / "out", "--sparsity", "1.5")
    assert done.returncode != 0
    assert "sparsity: expected 0 <= s < 1, got 1.5" in done.stderr
    assert not (tmp_path / "out").exists()


# ---- Other trainers: a script for each ----

PRUNING = ["--sparsity", "0.5", "--schedule", "linear"]
TRAINING = ["--max_steps", "4", "--per_device_train_batch_size", "4", "--use_cpu", "true", "--report_to", "none"]
TRL = ["--bf16", "false", *TRAINING]

# Script -> model, columns of its data, flags, number of tensors that are pruned, and a word of its card.
SCRIPTS = {
    "seq2seq": ("seq2seq", ("dialogue", "summary"), TRAINING, 32, "exact_match"),
    "sft": ("causal", ("text",), TRL, 14, "- sft"),
    "dpo": ("causal", ("prompt", "chosen", "rejected"), TRL, 14, "- dpo"),
    "sentence_embeddings": (
        "sentences",
        ("query", "answer"),
        [*TRAINING, "--test_size", "8"],
        12,
        "SentenceTransformer",
    ),
    "accelerate_loop": ("causal", ("text",), ["--cpu", "true", "--steps", "4", "--batch_size", "4"], 14, None),
}


@pytest.fixture(scope="module")
def text_material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    save_text_models(folder)
    return folder


def write_columns(folder, columns):
    folder.mkdir()
    for part, count in (("train", 40), ("test", 8)):
        rows = zip(*(texts(count, seed=f"{column} {part}") for column in columns), strict=True)
        write_csv(folder / f"{part}.csv", [dict(zip(columns, row, strict=True)) for row in rows])
    return folder


def test_every_script_is_run_by_a_test():
    assert {path.stem for path in RECIPES.glob("*.py")} == {"text_classification", *SCRIPTS}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_of_another_trainer_prunes(text_material, tmp_path, name):
    model, columns, flags, tensors, word = SCRIPTS[name]
    if name in ("sft", "dpo"):
        pytest.importorskip("trl")
    script, data = RECIPES / f"{name}.py", write_columns(tmp_path / "data", columns)
    assert len(script.read_text(encoding="utf-8").splitlines()) <= 90
    done = run_on(script, text_material / model, data, tmp_path / "out", *flags, *PRUNING)
    assert done.returncode == 0, done.stderr[-2000:]
    prunable = make_report(tmp_path / "out").prunable
    assert [tensor.zeros for tensor in prunable] == [tensor.weights // 2 for tensor in prunable]
    assert len(prunable) == tensors
    assert (tmp_path / "out" / "pruning_masks.safetensors").exists()
    if word is not None:
        card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        assert "**50.00% of the prunable weights" in card
        assert word in card


def test_the_script_of_trl_merges_adapters_into_a_sparse_model(text_material, tmp_path):
    pytest.importorskip("trl")
    data = write_columns(tmp_path / "data", ("text",))
    flags = [*TRL, *PRUNING, "--lora_r", "2", "--adapters", "sparse_merge"]
    done = run_on(RECIPES / "sft.py", text_material / "causal", data, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr[-2000:]
    prunable = make_report(tmp_path / "out").prunable
    assert [tensor.zeros for tensor in prunable] == [tensor.weights // 2 for tensor in prunable]
    assert len(prunable) == 14


def test_the_script_of_a_loop_goes_on_from_what_it_saved(text_material, tmp_path):
    data, flags = write_columns(tmp_path / "data", ("text",)), SCRIPTS["accelerate_loop"][2]

    def run_loop(output, *more):
        done = run_on(RECIPES / "accelerate_loop.py", text_material / "causal", data, output, *flags, *PRUNING, *more)
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(output / "model.safetensors")

    whole = run_loop(tmp_path / "whole", "--save_every", "3")
    assert (tmp_path / "whole" / "checkpoint" / "pruning_masks.safetensors").exists()
    again = run_loop(
        tmp_path / "whole", "--save_every", "3", "--learning_rate", "1"
    )  # the optimizer's state has its own
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
