"""DeepSpeed ZeRO-2 and ZeRO-3 for real, on CPUs, in the environment that `make test-deepspeed` makes."""

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch
from launching import (
    BEST,
    DISTILLED,
    GLOBAL,
    GRADIENTS,
    INPUTS,
    MOVEMENT,
    PENALISED,
    SAVE,
    SENSITIVITY,
    WINDOW,
    assert_alike,
    assert_best_was_loaded,
    assert_pruned_by_the_callback,
    assert_pushed_once,
    assert_same_masks_but_for_rounding,
    assert_same_to_the_bit,
    assert_saved_as_masked,
    in_a_stock_trainer,
    launch,
    launch_and_push,
    launch_failing,
)
from test_launch import launch as accelerate_launch
from test_launch import recipe_for
from test_run import reviews, save_tiny_bert, write_csv
from test_sharing_on_processes import check_saved_and_resumed
from transformers import AutoModelForSequenceClassification

from hf_prune.engines.choose import engine_of
from hf_prune.engines.deepspeed import ZeroThree
from hf_prune.errors import IncompatibleVersionError
from hf_prune.foreign import deepspeed as foreign
from hf_prune.foreign.accelerate import DeepSpeedOptimizerWrapper
from hf_prune.saved.masks import mask_files
from hf_prune.saved.report import make_report
from hf_prune.trainer.checkpoints import is_complete, newest_complete

pytest.importorskip("deepspeed", reason="make test-deepspeed runs these")

BLOCKS = {"sparsity": 0.5, "pattern": "block:4x1", **WINDOW}
LAYER_WISE = {"sparsity": 0.5, **WINDOW}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 8}
# So large a scale that gradients are infinite at first: DeepSpeed leaves those steps out.
SCALED = {"fp16": {"enabled": True, "initial_scale_power": 20, "hysteresis": 1}}
SCALED_A_LITTLE = {"fp16": {"enabled": True, "initial_scale_power": 8, "hysteresis": 1}}  # no step is left out

# What is asked for, the stage, and what is said.
REFUSED = {
    "gradients": (
        {"configs": [GRADIENTS]},
        3,
        "methods that read gradients cannot be used with DeepSpeed, got 'taylor'",
    ),
    "gradients of every step": (
        {"configs": [MOVEMENT]},
        2,
        "methods that read gradients cannot be used with DeepSpeed, got 'movement'",
    ),
    "gradients in a stock trainer": (
        {"configs": [GRADIENTS], "callback": True, "compare": False},
        2,
        "methods that read gradients cannot be used with DeepSpeed, got 'taylor'",
    ),
    "no stage": ({}, 0, "zero_optimization.stage: expected 1, 2 or 3 for pruning under DeepSpeed, got 0"),
    "round robin": ({"zero": {"round_robin_gradients": True}}, 2, "round_robin_gradients: expected false, got true"),
    "second copies": (
        {"zero": {"zero_hpz_partition_size": 3}},
        3,
        "zero_hpz_partition_size must be 1 for pruning",
    ),
}


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}  # the same samples in a step


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs on three processes, so that ranges end anywhere; every update was that of one process."""
    directory = tmp_path_factory.mktemp("trained")
    cases = {
        f"{name} {stage}": {"engine": f"zero{stage}", "configs": [GLOBAL], "model": "bert"} | case
        for stage in (2, 3)
        for name, case in {
            "plain": {"arguments": SAVE, "weights_at": [5]},
            "bf16": {"model": "llama", "configs": [BLOCKS], "arguments": {"bf16": True}},
            "fp16": {"model": "llama", "arguments": {"fp16": True}, "deepspeed": SCALED},
            "groups": {"model": "gpt2", "configs": [{"pattern": "2:4", **WINDOW}]},
            "accumulation": {"arguments": {"gradient_accumulation_steps": 2}},
            "offload": {"zero": {"offload_optimizer": {"device": "cpu"}}},
            "frozen": {"frozen": True, "configs": [LAYER_WISE]},
            "compiled": {"configs": [LAYER_WISE], "arguments": COMPILED},
            "inputs": {"model": "gpt2", "configs": [INPUTS], "compare": False},
            "shares": {"model": "gpt2", "configs": [SENSITIVITY], "compare": False},
            "shares by outliers": {"model": "gpt2", "configs": [SENSITIVITY | {"scope": "owl"}], "compare": False},
            "best": {"arguments": BEST, "weights_at": [8]},
            "distilled": DISTILLED,
            "penalised": PENALISED,
            "penalised once": PENALISED | {"arguments": ACCUMULATED},
            "penalised fp16": PENALISED | {"arguments": {"fp16": True}, "deepspeed": SCALED_A_LITTLE},
        }.items()
    }
    cases["plain 1"] = {"engine": "zero1", "configs": [GLOBAL], "model": "bert"}
    for stage in (2, 3):
        cases |= in_a_stock_trainer(f"zero{stage}", directory, f"callback {stage}")
    for name, (case, stage, _) in REFUSED.items():
        cases[name] = {"engine": f"zero{stage}", "configs": [GLOBAL], "model": "bert", "refused": True} | case
    return directory, launch(3, directory, cases)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs on one process without DeepSpeed, with the batches that three have together."""
    batches = {"per_device_train_batch_size": 12}
    case = {"engine": "ddp", "model": "bert", "configs": [GLOBAL], "arguments": batches}
    cases = {
        "plain": case,
        "callback": case | {"arguments": BEST | batches, "callback": True},
        "inputs": case | {"model": "gpt2", "configs": [INPUTS], "compare": False},
        "distilled": case | DISTILLED,
        "penalised": case | PENALISED,
    }
    return launch(1, tmp_path_factory.mktemp("alone"), cases)


OTHERS = [("offload", "plain"), ("callback", "callback"), ("inputs", "inputs"), ("distilled", "distilled")]
OTHERS += [("penalised", "penalised"), ("penalised once", "penalised")]

KINDS = (
    "plain",
    "bf16",
    "fp16",
    "groups",
    "accumulation",
    "offload",
    "frozen",
    "compiled",
    "inputs",
    "best",
    "distilled",
    "shares",
    "shares by outliers",
    "penalised",
    "penalised once",
    "penalised fp16",
)


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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_processes_train_what_one_trains_to_rounding(trained, alone, stage):
    """The gradient norms, too: masked gradients do not count in them, although DeepSpeed steps inside backward."""
    assert_alike(alone["plain"], trained[1][f"plain {stage}"])


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize(("name", "expected"), OTHERS)
def test_other_runs_train_what_one_process_trains_to_rounding(trained, alone, name, expected, stage):
    assert_alike(alone[expected], trained[1][f"{name} {stage}"])


def test_steps_that_fp16_leaves_out_are_the_same_in_both_stages(trained):
    two, three = (trained[1][f"fp16 {stage}"] for stage in (2, 3))
    assert two["norms"][0] == math.inf
    assert any(math.isfinite(norm) for norm in two["norms"])
    for kind in ("losses", "norms"):
        torch.testing.assert_close(torch.tensor(two[kind]), torch.tensor(three[kind]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("stage", [2, 3])
def test_penalties_are_scaled_as_the_losses_of_fp16_are(trained, alone, stage):
    ours, expected = trained[1][f"penalised fp16 {stage}"], alone["penalised"]
    for kind, tolerance in (("norms", 3e-2), ("penalties", 3e-3)):
        torch.testing.assert_close(torch.tensor(ours[kind]), torch.tensor(expected[kind]), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_inputs_give_the_masks_of_one_process(trained, alone, stage):
    assert_same_masks_but_for_rounding(trained[1][f"inputs {stage}"]["masks"], alone["inputs"]["masks"])


@pytest.mark.parametrize("stage", [2, 3])
def test_a_callback_in_a_stock_trainer_prunes_and_resumes(trained, stage):
    directory, results = trained
    assert_pruned_by_the_callback(directory, results, f"callback {stage}")


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["best", "callback"])
def test_the_best_model_at_final_sparsity_is_loaded_in_the_end(trained, name, stage):
    directory, results = trained
    assert_best_was_loaded(directory / f"{name} {stage}", results[f"{name} {stage}"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_is_refused_on_every_process(trained, name):
    messages = trained[1][name]["refused"]
    assert len(messages) == 3
    for message in messages:
        assert REFUSED[name][2] in message


def test_an_update_sends_master_weights_and_moments_in_stage_two_and_counts_in_stage_three(trained):
    """That only integers are sent in stage 3 was asserted in the run itself."""
    _, results = trained
    masks = results["plain 2"]["masks"]
    weights = sum(mask.numel() for mask in masks.values())
    for stage in (1, 2):  # twice the weights and once each moment, in float32, and two digests
        assert max(results[f"plain {stage}"]["sent"]) == (2 + 2) * 4 * weights + 16
    digits, some_counts = 8 * 256 * 8, 4 * 8 * (len(masks) + 1)
    assert digits < max(results["plain 3"]["sent"]) < digits + some_counts


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
    assert_same_to_the_bit(results[name], resumed)


@pytest.mark.parametrize(("stage", "bf16"), [(1, False), (2, True), (3, False), (3, True)])
def test_weights_share_values_in_every_stage_and_resume_to_the_bit(stage, bf16, tmp_path):
    """The float32 master weights are those of the file too, also where the parameters are bfloat16."""
    arguments = SAVE | {"bf16": bf16}
    check_saved_and_resumed({"engine": f"zero{stage}", "arguments": arguments}, tmp_path)
    whole = torch.load(tmp_path / "whole" / "result.pt", weights_only=True)
    for name, mask in whole["masks"].items():
        assert len(whole["weights"][name][mask].unique()) == 4, name


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
    codes, _ = launch_failing(2, tmp_path, {"run": case | {"killed_at": 10}})
    assert 9 in codes
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
    assert output.count("Pruned model on the test split") == 1
    report = make_report(tmp_path / "out" / "model")
    assert report.prunable_sparsity == 0.8125
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")


def test_a_recipe_whose_method_reads_gradients_is_refused_before_anything_is_written(tmp_path):
    save_tiny_bert(tmp_path / "model")
    write_csv(tmp_path / "reviews.csv", reviews())
    recipe = recipe_for(tmp_path, tmp_path, batch_size=8)
    more = ("pruning.method=taylor", "pruning.begin=1", "training.optim=adamw_torch")
    code, _, errors = accelerate_launch("zero2", "-m", "hf_prune", "run", recipe, *more)
    assert code != 0
    assert "pruning.method: methods that read gradients cannot be used with DeepSpeed, got 'taylor'" in errors
    assert not (tmp_path / "out").exists()


def test_models_are_pushed_in_one_commit_by_the_first_process(hub, lfs_client, tmp_path):
    results, repos = launch_and_push(
        hub, lfs_client, 2, tmp_path, {"two": {"engine": "zero2"}, "three": {"engine": "zero3"}}
    )
    during = ["Training in progress, step 5", "Training in progress, step 10"]
    for name, result in results.items():
        assert_pushed_once(repos[name], result, tmp_path / f"{name} on the Hub")
        assert result["failed_pushes"] == []
        assert [commit.summary for commit in repos[name].commits()] == ["initial commit", *during, "End of training"]


# ---- What DeepSpeed does not document ----


@pytest.mark.parametrize("name", foreign.NAMES)
def test_a_name_that_is_gone_is_refused(name, monkeypatch):
    module, _, attribute = foreign.NAMES[name].path.partition(":")
    assert getattr(foreign, name) is not None
    monkeypatch.delattr(importlib.import_module(module), attribute)
    with pytest.raises(
        IncompatibleVersionError, match=rf"^deepspeed .*: hf-prune needs {attribute} to .*deepspeed>=\S+$"
    ):
        getattr(foreign, name)


def trained_by_zero(*, without):
    """A model and an optimizer as a stage of ZeRO leaves them, but for one of its marks on the parameters."""
    model = torch.nn.Linear(4, 4)
    stage_three = without is not foreign.MASTER_OF_TWO
    marks = foreign.OF_STAGE_THREE.keys() if stage_three else []
    for parameter in model.parameters():
        for mark in [*marks, "_z3_optimizer" if stage_three else "_hp_mapping"]:
            if without is None or mark != without.name.rpartition(".")[2]:
                setattr(parameter, mark, object())
    zero = foreign.ZeROOptimizer.__new__(foreign.ZeROOptimizer)
    optimizer = DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper)
    optimizer.optimizer = zero
    return model, optimizer


def test_parameters_with_every_mark_are_let_in():
    assert isinstance(engine_of(*trained_by_zero(without=None)), ZeroThree)


WITHOUT_ID = [entry for name, entry in foreign.OF_STAGE_THREE.items() if name != "ds_id"]  # without it is another stage


@pytest.mark.parametrize(
    "entry", [*WITHOUT_ID, foreign.MASTER_OF_TWO, foreign.MASTER_OF_THREE], ids=lambda entry: entry.name
)
def test_parameters_without_a_mark_are_refused_and_not_taken_for_those_of_torch(entry):
    model, optimizer = trained_by_zero(without=entry)
    with pytest.raises(IncompatibleVersionError, match=f"needs {entry.name} to {entry.why}, found no such name"):
        engine_of(model, optimizer)


def test_parameters_that_stage_three_no_longer_marks_at_all_are_refused():
    model, optimizer = trained_by_zero(without=foreign.MASTER_OF_TWO)
    assert not any(foreign.is_of_stage_three(parameter) for parameter in model.parameters())
    with pytest.raises(IncompatibleVersionError, match=r"needs Parameter\._hp_mapping"):
        engine_of(model, optimizer)
