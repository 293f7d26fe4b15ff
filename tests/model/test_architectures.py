"""A sample of transformers' architectures in each run, and a twentieth of all in `make test-all`.

Models warn of their own configurations and of the inputs made here, so warnings are no errors in this file.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import architectures
import pytest
from architectures import TASKS, check, find_targets, find_trial
from transformers import TrainingArguments

from hf_prune import PruningTrainer

pytestmark = pytest.mark.filterwarnings("ignore")

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "docs" / "architectures.md"

# What each of the sample is there for.
SAMPLE = {
    "LlamaForCausalLM": "a plain decoder",
    "GPT2LMHeadModel": "transposed weights",
    "MambaForCausalLM": "no attention, convolutions over time",
    "MixtralForCausalLM": "fused experts",
    "GptOssForCausalLM": "transposed fused experts",
    "DeepseekV3ForCausalLM": "shared experts beside fused ones, low-rank attention",
    "Zamba2ForCausalLM": "one block that several layers share",
    "BertForMaskedLM": "a head tied to the embeddings",
    "AlbertForMaskedLM": "layers that share all weights",
    "DebertaV2ForSequenceClassification": "a convolution beside attention",
    "BartForConditionalGeneration": "an encoder and a decoder, three tied names",
    "T5ForConditionalGeneration": "embeddings as head, embeddings of positions inside layers",
    "WhisperForConditionalGeneration": "audio to text",
    "Wav2Vec2ForCTC": "audio, with a parametrised convolution",
    "ASTForAudioClassification": "spectrograms",
    "ViTForImageClassification": "3-D positions",
    "ResNetForImageClassification": "4-D weights alone",
    "ConvNextForImageClassification": "4-D weights, and 1-D scales of layers",
    "SegformerForSemanticSegmentation": "a head with layers of its own",
    "CLIPModel": "an image and a text encoder",
    "LlavaForConditionalGeneration": "a vision encoder before a decoder",
    "Qwen2VLForConditionalGeneration": "flat patches, a 5-D convolution",
}


@pytest.fixture(scope="module")
def by_class():
    return {architecture.class_name: architecture for architecture in architectures.architectures(SAMPLE)}


def prune_in_trainer(trial, model, config, folder):
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = PruningTrainer(
        model=model,
        args=args,
        train_dataset=[trial.batch],
        data_collator=lambda batches: batches[0],
        pruning_config=config,
    )
    trainer.train()
    return trainer.pruner


@pytest.mark.parametrize("class_name", SAMPLE)
def test_a_model_of_the_sample_is_pruned_trained_saved_and_loaded(class_name, by_class, tmp_path):
    trial = find_trial(by_class[class_name])
    assert find_targets(trial.model())
    check(trial, "layer")
    check(trial, "global")
    check(trial, "layer", lambda *given: prune_in_trainer(*given, tmp_path))


def test_the_sample_has_every_task(by_class):
    assert {by_class[class_name].task for class_name in SAMPLE} == set(TASKS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_twentieth_class_passes_and_has_its_row_in_the_table(tmp_path):
    """In a process of its own, which forks one for each: none sees what another has left, or this run's settings."""
    kept = _rows(TABLE)
    classes = sorted(kept)[::20]
    assert len(classes) >= 35
    written = tmp_path / "architectures.md"
    command = [sys.executable, TESTS / "architectures.py", "--write", written, "--only", f" ({'|'.join(classes)})$"]
    run = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert _rows(written) == {class_name: kept[class_name] for class_name in classes}, (
        "write it anew: make architectures"
    )


def test_the_table_has_the_sample_and_none_that_fails():
    kept = _rows(TABLE)
    assert set(SAMPLE) <= set(kept)
    assert "fails" not in {cell for row in kept.values() for cell in row}
    assert len({row[0] for row in kept.values() if row[2]}) >= 250


def _rows(path):
    """Class -> the cells of its row in a table of architectures: model type, class, tensors, shares and structures."""
    lines = [line for line in path.read_text().splitlines() if re.match(r"\| [a-z0-9]", line)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[1]: row for row in rows}
