"""A sample of transformers' architectures in each run, and all of them in `make test-all`.

Models warn of their own configurations and of the inputs made here, so warnings are no errors in this file.
"""

import json
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
@pytest.mark.timeout(1800)
def test_all_architectures_pass_and_the_table_is_what_they_give(tmp_path):
    """In a process of its own, which forks one for each: none sees what another has left, or this run's settings."""
    written, told = tmp_path / "architectures.md", tmp_path / "outcomes.json"
    command = [sys.executable, TESTS / "architectures.py", "--write", written, "--json", told]
    run = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    assert told.exists(), run.stderr
    rows = [row for row in json.loads(told.read_text()) if "reason" not in row[-1]]
    built = {class_name: outcome for _, class_name, _, outcome in rows}
    failed = {class_name: outcome["error"] for class_name, outcome in built.items() if "error" in outcome}
    assert not failed
    assert run.returncode == 0
    assert len({model_type for model_type, *_ in rows}) >= 250
    assert set(SAMPLE) <= set(built)
    assert _rows(TABLE) == _rows(written), "write it anew: make architectures"


def _rows(path):
    """The text by lines, for a difference that names the lines."""
    return re.sub(r"\n+", "\n", path.read_text()).splitlines()
