import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_run import PRUNABLE, reviews, save_tiny_bert, write_csv

SCRIPT = Path(__file__).parents[1] / "recipes" / "text_classification.py"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    (folder / "data").mkdir()
    write_csv(folder / "data" / "train.csv", reviews()[:60])
    write_csv(folder / "data" / "test.csv", reviews()[60:])
    return folder


def run_script(script, material, output, *flags):
    command = [sys.executable, str(script), "--model_name", str(material / "model")]
    command += ["--dataset_name", str(material / "data"), "--output_dir", str(output), "--max_steps", "4"]
    command += ["--per_device_train_batch_size", "8", "--use_cpu", "true", "--report_to", "none", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


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


def test_the_script_is_a_plain_one_with_one_word_changed_and_one_line_added(material, tmp_path):
    text = SCRIPT.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 120
    plain = text.replace("trainer = PruningTrainer(  # was: Trainer", "trainer = Trainer(")
    plain = plain.replace("        pruning_config=pruning_config,  # and this line is new\n", "")
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
