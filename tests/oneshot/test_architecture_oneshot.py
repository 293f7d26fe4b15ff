"""Transformers' architectures pruned at once: what is kept of all of them, and some tried anew.

Models warn of their own configurations and of the inputs made here, so warnings are no errors in this file.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from architecture_oneshot import prune_at_once
from architectures import architectures, find_trial
from oneshot_results import RESULTS, WORDS, at_once_lines, can_be_pruned, failures
from structure_results import read_results, versions

pytestmark = pytest.mark.filterwarnings("ignore")

TESTS = Path(__file__).parents[1]


def test_the_docs_have_the_numbers_that_were_found():
    _, results = read_results(RESULTS)
    tried = [result for result in results.values() if result]
    number = {word: sum(result["result"] == word for result in tried) for word in WORDS}
    page = " ".join((TESTS.parent / "docs" / "one_shot.md").read_text(encoding="utf-8").split())
    assert f"{sum(map(can_be_pruned, tried))} of {len(tried)} model classes were pruned" in page
    assert f"{number['unreached']} of them have weights whose layers are not called" in page
    assert f"bit for bit, but for {number['random']} that draw random numbers" in page


def test_nothing_that_is_kept_has_failed_or_is_without_a_meaning():
    _, results = read_results(RESULTS)
    assert failures(results) == []
    assert failures({"LlamaForCausalLM": {"error": "AssertionError: outputs differ"}}) == ["LlamaForCausalLM"]


def test_a_word_is_told_with_its_number():
    lines = at_once_lines([{"result": "yes"}, {"result": "yes"}, {"result": "random"}, {"error": "KeyError: 0"}])
    assert "**3 of 4 classes can be pruned at once.**" in lines
    assert lines[-2:] == [f"- **yes** (2): {WORDS['yes']}", f"- **random** (1): {WORDS['random']}"]


SAMPLE = {
    "MixtralForCausalLM": {"result": "yes"},
    "MambaForCausalLM": {"result": "unreached", "left": 4},
    "SwitchTransformersForConditionalGeneration": {"result": "yes"},
}


@pytest.mark.parametrize("class_name", SAMPLE)
def test_a_class_is_pruned_at_once(class_name):
    [architecture] = architectures({class_name})
    assert prune_at_once(find_trial(architecture)) == SAMPLE[class_name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_twentieth_class_is_pruned_as_it_was(tmp_path):
    made_with, kept = read_results(RESULTS)
    assert made_with == versions(), "the results are of other versions: make architectures"
    classes = sorted(kept)[::20]
    command = [sys.executable, TESTS / "architecture_oneshot.py", *classes, "--results", tmp_path / "results.jsonl"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    _, results = read_results(tmp_path / "results.jsonl")
    assert {name: results[name].get("result") for name in classes} == {
        name: kept[name].get("result") for name in classes
    }
