"""DeepSpeed ZeRO-2 and ZeRO-3 for real, on CPUs, in the environment that `make test-deepspeed` makes."""

import os
import subprocess
import sys

import pytest
import torch
from launching import GLOBAL, SAVE, WINDOW, assert_alike, assert_saved_as_masked, launch
from test_launch import launch as accelerate_launch
from test_launch import recipe_for
from test_run import reviews, save_tiny_bert, write_csv
from transformers import AutoModelForSequenceClassification

from hf_prune.checkpoints import is_complete, newest_complete
from hf_prune.mask_files import mask_files
from hf_prune.report import make_report

pytest.importorskip("deepspeed", reason="make test-deepspeed runs these")

BLOCKS = {"sparsity": 0.5, "pattern": "block:4x1", **WINDOW}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs on three processes, so that ranges end anywhere; every update was that of one process."""
    directory = tmp_path_factory.mktemp("trained")
    cases = {
        f"{name} {stage}": {"engine": f"zero{stage}", "configs": [GLOBAL], "model": "bert"} | case
        for stage in (2, 3)
        for name, case in {
            "plain": {"arguments": SAVE, "weights_at": 5},
            "bf16": {"model": "llama", "configs": [BLOCKS], "arguments": {"bf16": True}},
            "groups": {"model": "gpt2", "configs": [{"pattern": "2:4", **WINDOW}]},
            "accumulation": {"arguments": {"gradient_accumulation_steps": 2}},
            "offload": {"zero": {"offload_optimizer": {"device": "cpu"}}},
            "frozen": {"frozen": True, "configs": [{"sparsity": 0.5, **WINDOW}]},
        }.items()
    }
    return directory, launch(3, directory, cases)


KINDS = ("plain", "bf16", "groups", "accumulation", "offload", "frozen")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_model_has_exactly_the_zeros_of_the_masks(trained, kind, stage):
    directory, results = trained
    name = f"{kind} {stage}"
    assert results[name]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert_saved_as_masked(directory / name, results[name])


@pytest.mark.parametrize("stage", [2, 3])
def test_the_saved_model_opens_with_from_pretrained(trained, stage):
    directory, results = trained
    model = AutoModelForSequenceClassification.from_pretrained(directory / f"plain {stage}" / "saved")
    for tensor, weight in results[f"plain {stage}"]["weights"].items():
        assert torch.equal(model.state_dict()[tensor], weight)


@pytest.mark.parametrize("stage", [2, 3])
def test_processes_train_what_one_trains_to_rounding(trained, stage, tmp_path):
    """The gradient norms, too: masked gradients do not count in them, although DeepSpeed steps inside backward."""
    arguments = {"per_device_train_batch_size": 12}
    case = {"engine": "ddp", "model": "bert", "configs": [GLOBAL], "arguments": arguments}
    alone = launch(1, tmp_path, {"plain": case})["plain"]
    for name in ("plain", "offload"):
        assert_alike(alone, trained[1][f"{name} {stage}"])


@pytest.mark.parametrize("stage", [2, 3])
def test_checkpoints_are_complete_and_resumed(trained, stage, tmp_path):
    directory, results = trained
    name = f"plain {stage}"
    files = [file.name for file in mask_files(directory / name / "checkpoint-5")]
    parts = [f"pruning_masks-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    assert files == (parts if stage == 3 else ["pruning_masks.safetensors"])
    assert is_complete(directory / name / "checkpoint-5")
    case = {"engine": f"zero{stage}", "model": "bert", "configs": [GLOBAL], "arguments": {}}
    resumed = launch(3, tmp_path, {"again": case | {"resume": str(directory / name / "checkpoint-5")}})["again"]
    for tensor, weight in results[name]["weights"].items():
        assert torch.equal(resumed["weights"][tensor], weight)
        assert torch.equal(resumed["masks"].get(tensor, weight), results[name]["masks"].get(tensor, weight))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_universal_checkpoint_resumes_on_another_number_of_processes(trained, stage, tmp_path):
    """DeepSpeed itself resumes on as many processes as before, or from what its converter makes of a checkpoint."""
    directory, results = trained
    checkpoint = directory / f"plain {stage}" / "checkpoint-5"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", "global_step5"]
    command += ["--output_folder", "global_step5_universal", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--inject_missing_state"] if stage == 2 else []
    subprocess.run(command, cwd=checkpoint, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    case = {
        "engine": f"zero{stage}",
        "model": "bert",
        "configs": [GLOBAL],
        "arguments": {"per_device_train_batch_size": 6},
        "deepspeed": {"checkpoint": {"load_universal": True}},
        "resume": str(checkpoint),
    }
    assert_alike(launch(2, tmp_path, {"universal": case})["universal"], results[f"plain {stage}"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_process_killed_in_a_save_leaves_the_checkpoint_before(tmp_path, stage):
    case = {"engine": f"zero{stage}", "model": "bert", "configs": [GLOBAL], "arguments": SAVE}
    errors = launch(2, tmp_path, {"run": case | {"killed_at": 10}}, succeeds=False)
    assert "(exitcode: 9)" in errors
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-5"
    result = launch(2, tmp_path, {"run": case | {"resume": True, "compare": False}})["run"]
    assert result["sparsity"] == 0.5
    assert_saved_as_masked(tmp_path / "run", result)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_recipe_runs_under_accelerate_launch(tmp_path, stage):
    """As shipped, in bf16: dense, then pruned, and a model that opens and has exactly the zeros."""
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews())
    recipe = recipe_for(tmp_path, tmp_path, batch_size=8)
    code, output, errors = accelerate_launch(
        f"zero{stage}", "-m", "hf_prune", "run", recipe, "training.optim=adamw_torch"
    )
    assert code == 0, errors[-4000:]
    assert output.count("Pruned model on the test part") == 1
    report = make_report(tmp_path / "out" / "model")
    assert report.prunable_sparsity == 0.8125
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
