"""Structures of transformers' architectures: what is kept of all of them, and some tried anew.

Models warn of their own configurations and of the inputs made here, so warnings are no errors in this file.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from architecture_structures import remove
from architectures import architectures, find_trial
from structure_results import OPENED, REFUSED, STRUCTURES, failures, read_results, versions

pytestmark = pytest.mark.filterwarnings("ignore")

TESTS = Path(__file__).parents[1]


def tried_anew(classes, folder):
    """What a process of its own finds: it has not imported hf_prune for a model of these classes yet."""
    command = [sys.executable, TESTS / "architecture_structures.py", *classes, "--results", folder / "results.jsonl"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    _, results = read_results(folder / "results.jsonl")
    return results


def words_of(result):
    return tuple(result.get(structure) for structure in STRUCTURES)


def test_the_readme_and_the_docs_have_the_numbers_that_were_found():
    _, results = read_results()
    found = {name: sum(result.get(name) in OPENED for result in results.values()) for name in STRUCTURES}
    with_import = sum(result.get("heads") == "with import" for result in results.values())
    readme, page = ((TESTS.parent / name).read_text(encoding="utf-8") for name in ("README.md", "docs/structures.md"))
    said = f"Neurons can be removed from {found['neurons']} of them, heads from {found['heads']} and layers from "
    assert f"{said}{found['layers']}," in " ".join(readme.split())
    said = f"{found['neurons']} can lose neurons, {found['heads']} heads ({with_import} of them open after"
    assert said in " ".join(page.split())
    assert f"{found['layers']} layers and {found['hidden']} hidden dimensions" in " ".join(page.split())


@pytest.mark.widths_per_layer
def test_a_plain_decoder_and_encoder_and_one_with_shared_positions(tmp_path):
    results = tried_anew(["LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration"], tmp_path)
    assert {name: words_of(result) for name, result in results.items()} == {
        "LlamaForCausalLM": ("yes", "yes", "yes", "yes"),
        "BertForMaskedLM": ("yes", "with import", "yes", "yes"),
        "T5ForConditionalGeneration": ("yes", "outputs", "yes", "outputs"),
    }
    assert "outputs differ" in results["T5ForConditionalGeneration"]["why"]["heads"]


OPEN_AGAIN = {
    ("AlbertForMaskedLM", "hidden"): "two widths in one model",
    ("BartForCausalLM", "hidden"): "heads of encoder and decoder in one configuration",
    ("Ernie4_5_MoeForCausalLM", "heads"): "an id of a token that is the number of key-value heads",
    ("BailingHybridForCausalLM", "heads"): "a kernel whose size is the number of heads",
    ("Wav2Vec2ForCTC", "heads"): "convolutions with indices before the layers",
    ("RoFormerForMaskedLM", "heads"): "positions that read the number of heads beside the layers",
}


NEED_WIDTHS_PER_LAYER = ("BailingHybridForCausalLM", "Wav2Vec2ForCTC", "RoFormerForMaskedLM")


@pytest.mark.parametrize(
    ("class_name", "structure"),
    [
        pytest.param(*tried, id=why, marks=[pytest.mark.widths_per_layer] if tried[0] in NEED_WIDTHS_PER_LAYER else [])
        for tried, why in OPEN_AGAIN.items()
    ],
)
def test_the_smaller_model_is_opened_with_the_same_outputs(class_name, structure, tmp_path):
    [architecture] = architectures({class_name})
    assert remove(find_trial(architecture), structure, tmp_path) == {"result": "with import"}


@pytest.mark.widths_per_layer
def test_widths_that_differ_in_a_part_of_a_model_are_refused(tmp_path):
    [architecture] = architectures({"Gemma4UnifiedForConditionalGeneration"})
    outcome = remove(find_trial(architecture), "hidden", tmp_path)
    assert outcome["result"] == "widths"
    assert outcome["error"].startswith("expected a model all of whose layers have the same widths")


def test_nothing_that_is_kept_has_failed_or_is_without_a_meaning():
    _, results = read_results()
    assert failures(results) == []
    said = {word for result in results.values() for word in words_of(result) if word is not None}
    assert said <= {*OPENED, *REFUSED}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_twentieth_class_gives_what_is_kept(tmp_path):
    made_with, kept = read_results()
    assert made_with == versions(), "the results are of other versions: make architectures"
    classes = sorted(kept)[::20]
    results = tried_anew(classes, tmp_path)
    assert {name: words_of(results[name]) for name in classes} == {name: words_of(kept[name]) for name in classes}
