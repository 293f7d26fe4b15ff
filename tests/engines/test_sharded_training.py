"""Training under FSDP2, sharded and hybrid: the masks of one process at every update, and what is saved and resumed."""

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
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from hf_prune.saved.masks import mask_files
from hf_prune.trainer.checkpoints import is_complete, newest_complete

# Slow by nature: some thirty trainings, each on up to four processes. test_sharded_selection and test_launch stay.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs on three processes, so that parts are uneven, and some empty."""
    directory = tmp_path_factory.mktemp("trained")
    cases = {
        "whole": {"engine": "fsdp", "model": "bert", "configs": [GLOBAL], "arguments": SAVE, "evaluate": True}
        | {"weights_at": [5]},
        "sharded": {
            "engine": "fsdp",
            "model": "bert",
            "state_dict": "SHARDED_STATE_DICT",
            "weights_at": [5],
            "configs": [GLOBAL],
            "arguments": SAVE,
        },
        "best": {
            "engine": "fsdp",
            "model": "bert",
            "state_dict": "SHARDED_STATE_DICT",
            "weights_at": [8],
            "configs": [GLOBAL],
            "arguments": BEST,
        },
        "twice": {"engine": "fsdp", "model": "bert", "configs": [GLOBAL], "twice": True},
        "experts": {
            "engine": "fsdp",
            "model": "mixtral",
            "configs": [{"sparsity": 0.6, "scope": "erk", **WINDOW}],
            "arguments": {"gradient_accumulation_steps": 2},
        },
        "blocks": {
            "engine": "fsdp",
            "model": "llama",
            "configs": [{"sparsity": 0.5, "pattern": "block:4x1", "scope": "global", **WINDOW}],
            "arguments": {"bf16": True},
        },
        "groups": {"engine": "fsdp", "model": "gpt2", "configs": [{"pattern": "2:4", **WINDOW}]},
        "one after another": {
            "engine": "fsdp",
            "model": "gpt2",
            "configs": [
                {"sparsity": 0.4, "begin": 2, "end": 4, "frequency": 1},
                {"sparsity": 0.6, "method": "random", "begin": 4, "end": 8, "frequency": 2},
            ],
        },
        "compiled": {
            "engine": "fsdp",
            "model": "bert",
            "configs": [{"sparsity": 0.5, **WINDOW}],
            "arguments": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
        },
        "nothing": {
            "engine": "fsdp",
            "model": "bert",
            "configs": [{"sparsity": 0.5, "exclude": [".*"], **WINDOW}],
            "compare": False,
            "evaluate": True,
        },
        "inputs": {"engine": "fsdp", "model": "gpt2", "configs": [INPUTS], "compare": False},
        "shares": {"engine": "fsdp", "model": "gpt2", "configs": [SENSITIVITY], "compare": False},
        "gradients": {"engine": "fsdp", "model": "gpt2", "configs": [GRADIENTS], "compare": False},
        "movement": {
            "engine": "fsdp",
            "model": "gpt2",
            "configs": [MOVEMENT],
            "arguments": SAVE,
            "weights_at": [5],
            "compare": False,
        },
        "movement in blocks": {
            "engine": "fsdp",
            "model": "gpt2",
            "configs": [MOVEMENT | {"scope": "layer", "pattern": "block:4x1"}],
            "compare": False,
        },
        "dense": {"engine": "fsdp", "model": "bert", "configs": [{"method": "keep"}], "compare": False},
        "distilled": {"engine": "fsdp", **DISTILLED, "arguments": SAVE},
        "penalised": {"engine": "fsdp", **PENALISED},
    } | in_a_stock_trainer("fsdp", directory, "callback")
    return directory, launch(3, directory, cases)


SPARSITY = {
    **{"whole": 0.5, "sharded": 0.5, "experts": 0.6, "blocks": 0.5, "groups": 0.5},
    **{"twice": 0.5, "one after another": 0.6, "compiled": 0.5, "dense": 0.0, "inputs": 0.5, "gradients": 0.5},
    **{"shares": 0.5},
    **{"movement": 0.5, "movement in blocks": 0.5, "distilled": 0.5, "penalised": 0.5},
}


@pytest.mark.parametrize("name", SPARSITY)
def test_the_saved_model_has_exactly_the_zeros_of_the_masks(trained, name):
    """That every update gave the masks of one process was asserted in the run itself."""
    directory, results = trained
    result = results[name]
    assert result["sparsity"] == pytest.approx(SPARSITY[name], abs=1e-3)
    assert_saved_as_masked(directory / name, result)


def test_the_saved_model_opens_with_from_pretrained(trained):
    directory, results = trained
    for name in ("whole", "sharded"):
        model = AutoModelForSequenceClassification.from_pretrained(directory / name / "saved")
        for tensor, weight in model.state_dict().items():
            assert torch.equal(weight, results[name]["weights"][tensor])


def test_a_callback_in_a_stock_trainer_prunes_what_is_sharded_and_resumes(trained):
    directory, results = trained
    assert_pruned_by_the_callback(directory, results, "callback")
    assert len(mask_files(directory / "callback" / "checkpoint-4")) == 3


@pytest.mark.parametrize("name", ["best", "callback"])
def test_the_best_model_at_final_sparsity_is_loaded_in_the_end(trained, name):
    """From shards with `PruningTrainer`, and from a whole model with the callback."""
    directory, results = trained
    assert_best_was_loaded(directory / name, results[name])


def test_a_second_training_goes_on_under_the_same_masks(trained):
    """That they are the same, and weights are not, was asserted in the run itself."""
    assert trained[1]["twice"]["completed_steps"] == 10


def test_a_sharded_model_with_nothing_to_prune_is_trained_and_evaluated(trained):
    """No process waits for another that knows of no shards."""
    assert trained[1]["nothing"]["masks"] == {}


def test_masks_are_saved_in_parts_that_together_are_a_bit_a_weight(trained):
    directory, results = trained
    for name in ("whole", "sharded"):
        checkpoint = directory / name / "checkpoint-10"
        assert is_complete(checkpoint)
        files = mask_files(checkpoint)
        assert [file.name for file in files] == [f"pruning_masks-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
        sizes = [sum(packed.nbytes for packed in load_file(file).values()) for file in files]
        assert sum(sizes) == sum(mask.numel() for mask in results[name]["masks"].values()) / 8
        assert max(sizes) < sum(sizes) / 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs on one process, with the batches that several have together."""
    arguments = {"per_device_train_batch_size": 12}
    cases = {
        "whole": {"engine": "ddp", "model": "bert", "configs": [GLOBAL], "arguments": arguments},
        "callback": {"engine": "ddp", "model": "bert", "configs": [GLOBAL], "arguments": BEST | arguments}
        | {"callback": True},
        "groups": {"engine": "ddp", "model": "gpt2", "configs": [{"pattern": "2:4", **WINDOW}], "arguments": arguments},
        "inputs": {"engine": "ddp", "model": "gpt2", "configs": [INPUTS], "arguments": arguments, "compare": False},
        "gradients": {
            "engine": "ddp",
            "model": "gpt2",
            "configs": [GRADIENTS],
            "arguments": arguments,
            "compare": False,
        },
        "movement": {"engine": "ddp", "model": "gpt2", "configs": [MOVEMENT], "arguments": arguments, "compare": False},
        "distilled": {"engine": "ddp", **DISTILLED, "arguments": arguments},
        "penalised": {"engine": "ddp", **PENALISED, "arguments": arguments},
    }
    return launch(1, tmp_path_factory.mktemp("alone"), cases)


@pytest.mark.parametrize("name", ["whole", "callback", "groups", "inputs", "gradients", "distilled", "penalised"])
def test_processes_train_what_one_trains_to_rounding(trained, alone, name):
    """Losses, gradient norms (masked gradients do not count in them) and weights, from the same batches."""
    assert_alike(alone[name], trained[1][name])


def test_inputs_and_gradients_seen_by_copies_and_parts_give_the_masks_of_one_process(trained, hybrid, alone):
    for results in (trained[1], hybrid[1]):
        assert_same_masks_but_for_rounding(results["inputs"]["masks"], alone["inputs"]["masks"])
        assert_same_masks_but_for_rounding(results["gradients"]["masks"], alone["gradients"]["masks"])
        assert_same_masks_but_for_rounding(results["movement"]["masks"], alone["movement"]["masks"])


def test_collected_statistics_are_of_the_global_batch(trained, tmp_path):
    """However it is split: into three processes, or two replicas with two micro-batches each."""
    arguments = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    case = {"engine": "ddp", "model": "gpt2", "arguments": arguments, "compare": False}
    configs = {"inputs": [INPUTS], "gradients": [GRADIENTS]}
    split = launch(2, tmp_path, {name: case | {"configs": config} for name, config in configs.items()})
    for name in configs:
        assert_same_masks_but_for_rounding(trained[1][name]["masks"], split[name]["masks"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_three_processes_resumes_on_another_number(trained, tmp_path, processes):
    """Sharded or not: weights and masks are the same, and what is trained on is, to rounding."""
    directory, results = trained
    arguments = {"per_device_train_batch_size": 12 // processes}
    cases = {
        f"{name} {engine}": {
            "engine": engine,
            "model": "bert",
            "state_dict": {"whole": "FULL_STATE_DICT", "sharded": "SHARDED_STATE_DICT"}[name],
            "configs": [GLOBAL],
            "arguments": arguments,
            "resume": str(directory / name / "checkpoint-5"),
        }
        for name in ("whole", "sharded")
        for engine in ("fsdp", "ddp")
    }
    cases["movement fsdp"] = {
        "engine": "fsdp",
        "model": "gpt2",
        "configs": [MOVEMENT],
        "arguments": arguments,
        "resume": str(directory / "movement" / "checkpoint-5"),  # what it remembers is cut anew
        "compare": False,
    }
    for name, result in launch(processes, tmp_path, cases).items():
        assert result["completed_steps"] >= 8
        if name == "movement fsdp":
            assert_same_masks_but_for_rounding(result["masks"], results["movement"]["masks"])
        else:
            assert_alike(result, results[name.split()[0]])


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Runs on two copies of two parts."""
    directory = tmp_path_factory.mktemp("hybrid")
    blocks = [{"sparsity": 0.5, "pattern": "block:4x1", **WINDOW}]
    small_batches = {"per_device_train_batch_size": 3}
    cases = {
        "hybrid": {"model": "bert", "configs": [GLOBAL], "arguments": SAVE, "weights_at": [5]},
        "resumed": {"model": "bert", "configs": [GLOBAL], "resume": str(directory / "hybrid" / "checkpoint-5")},
        "blocks": {"model": "gpt2", "configs": blocks},
        "groups": {"model": "gpt2", "configs": [{"pattern": "2:4", **WINDOW}]},
        "bf16": {
            "model": "llama",
            "configs": blocks,
            "arguments": {"bf16": True, "gradient_accumulation_steps": 2},
        },
        "inputs": {"model": "gpt2", "configs": [INPUTS], "arguments": small_batches, "compare": False},
        "gradients": {"model": "gpt2", "configs": [GRADIENTS], "arguments": small_batches, "compare": False},
        "movement": {"model": "gpt2", "configs": [MOVEMENT], "arguments": small_batches, "compare": False},
        "shares": {"model": "gpt2", "configs": [SENSITIVITY], "arguments": small_batches, "compare": False},
        "distilled": {**DISTILLED, "arguments": small_batches},
        "penalised": {**PENALISED, "arguments": small_batches},
    }
    return directory, launch(4, directory, {name: {"engine": "hsdp"} | case for name, case in cases.items()})


@pytest.mark.parametrize(
    "name",
    ["hybrid", "blocks", "groups", "bf16", "inputs", "gradients", "movement", "shares", "distilled", "penalised"],
)
def test_two_copies_of_two_parts(hybrid, name):
    """That every update gave the masks of one process was asserted in the run itself."""
    directory, results = hybrid
    assert results[name]["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert_saved_as_masked(directory / name, results[name])


@pytest.mark.parametrize("name", ["distilled", "penalised"])
def test_two_copies_of_two_parts_train_what_one_process_trains_to_rounding(hybrid, alone, name):
    assert_alike(alone[name], hybrid[1][name])


def test_two_copies_of_two_parts_save_masks_once_and_resume(hybrid):
    directory, results = hybrid
    names = [file.name for file in mask_files(directory / "hybrid" / "checkpoint-10")]
    assert names == [f"pruning_masks-0000{part}-of-00004.safetensors" for part in (1, 2)]
    assert_same_to_the_bit(results["hybrid"], results["resumed"])


@pytest.mark.parametrize("state_dict", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_process_killed_in_a_save_leaves_the_checkpoint_before_and_resuming_takes_it(tmp_path, state_dict):
    case = {"engine": "fsdp", "model": "bert", "state_dict": state_dict, "configs": [GLOBAL], "arguments": SAVE}
    codes, _ = launch_failing(2, tmp_path, {"run": case | {"killed_at": 10}})
    assert 9 in codes
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / "checkpoint-5"
    assert not (tmp_path / "run" / "checkpoint-10").exists()
    results = launch(2, tmp_path, {"run": case | {"resume": True, "compare": False}, "uninterrupted": case})
    assert_same_to_the_bit(results["uninterrupted"], results["run"])


def test_replicas_whose_weights_differ_stop_training_with_the_tensor_and_the_ranks(tmp_path):
    case = {"engine": "ddp", "model": "bert", "configs": [{"sparsity": 0.5, **WINDOW}], "compare": False}
    _, errors = launch_failing(3, tmp_path, {"diverged": case | {"diverges": True}})
    expected = "bert.encoder.layer.1.output.dense.weight: expected the same mask on all processes that hold the same"
    told = [error for error in errors if expected in error]
    assert told
    assert all("got other masks on rank 1 than on rank 0" in error for error in told)


def test_sharded_models_are_pushed_in_one_commit_by_the_first_process(hub, lfs_client, tmp_path):
    """A checkpoint in shards has no model to be pushed during training, and that is told."""
    cases = {
        "whole": {"engine": "fsdp", "arguments": {"hub_strategy": "checkpoint"}},
        "shards": {"engine": "fsdp", "state_dict": "SHARDED_STATE_DICT"},
    }
    results, repos = launch_and_push(hub, lfs_client, 2, tmp_path, cases)
    for name, result in results.items():
        assert_pushed_once(repos[name], result, tmp_path / f"{name} on the Hub")
    summaries = [commit.summary for commit in repos["whole"].commits()]
    during = ["Training in progress, step 5", "Training in progress, step 10"]
    assert summaries == ["initial commit", *during, "End of training"]
    assert results["whole"]["failed_pushes"] == []
    for part in (1, 2):
        assert f"last-checkpoint/pruning_masks-0000{part}-of-00002.safetensors" in repos["whole"].files()
    assert [commit.summary for commit in repos["shards"].commits()] == ["initial commit", "End of training"]
    assert [line.split(":")[0] for line in results["shards"]["failed_pushes"]] == ["step 5", "step 10"]
