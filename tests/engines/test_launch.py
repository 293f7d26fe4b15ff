"""`accelerate launch --config_file recipes/accelerate/NAME.yaml -m hf_prune run RECIPE`, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from test_run import PRUNABLE, reviews, save_tiny_bert, write_csv, write_recipe
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_prune.cli import messages
from hf_prune.engines.launch import check_engine, wrapping_layers
from hf_prune.engines.launched import deepspeed_precision
from hf_prune.errors import LaunchError, RecipeError
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import prepare
from hf_prune.recipe.run import run
from hf_prune.saved.masks import mask_files

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "recipes" / "accelerate"
WRAPPED = "FSDP_TRANSFORMER_CLS_TO_WRAP"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_csv(folder / "reviews.csv", reviews())
    return folder


@pytest.fixture(autouse=True)
def fresh_state():
    """What accelerate remembers of the processes of a test is not left to the next."""
    yield
    PartialState._reset_state()


def recipe_for(folder, material, batch_size, **changes):
    """Three steps of 16 samples in all; SGD, for Adam makes much of the last digit of a small gradient."""
    return write_recipe(
        folder,
        material,
        training__per_device_train_batch_size=batch_size,
        training__max_steps=3,
        training__optim="sgd",
        training__learning_rate=0.1,
        training__use_cpu=False,
        dense={},
        pruning={"sparsity": 0.8125, "scope": "global"},
        **changes,
    )


def launch(config, *command, timeout=150):
    """What `accelerate launch` of a configuration came to: its exit code, standard output, and standard error."""
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--main_process_port", "0"]
    process = subprocess.Popen(
        [*launcher, "--config_file", str(CONFIGS / f"{config}.yaml"), *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"not ended after {timeout} s:\n{output[-2000:]}\n{errors[-4000:]}")
    return process.returncode, output, errors


# ---- What is launched comes to what one process comes to ----


@pytest.fixture(scope="module")
def alone(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("alone")
    result = run(load_recipe(recipe_for(folder, material, batch_size=16)), say=lambda text: None)
    return folder / "out", result


def compare(out, alone, processes=2):
    """The files and the results of a launched run, with those of the same run by one process."""
    expected_out, expected = alone
    for model in ("dense", "model"):
        weights = load_file(out / model / "model.safetensors")
        expected_weights = load_file(expected_out / model / "model.safetensors")
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], rtol=1e-4, atol=1e-6)
            assert torch.equal(weight == 0, expected_weights[name] == 0), (model, name)
    pruned = {name: weight for name, weight in weights.items() if PRUNABLE.fullmatch(name)}
    total = sum(weight.numel() for weight in pruned.values())
    assert sum(int((weight == 0).sum()) for weight in pruned.values()) == round(0.8125 * total)

    written = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (written["dense"], written["pruned"]) == (expected.dense, expected.pruned)
    assert written["prunable_sparsity"] == 0.8125
    loaded, problems = AutoModelForSequenceClassification.from_pretrained(out / "model", output_loading_info=True)
    assert type(loaded).__name__ == "BertForSequenceClassification"
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    record = json.loads((out / "model" / "run_record.json").read_text(encoding="utf-8"))
    base_model = json.loads((expected_out / "model" / "run_record.json").read_text(encoding="utf-8"))["base_model"]
    assert record["base_model"] == base_model
    assert (record["hardware"]["processes"], record["costs"]) == (processes, [])
    assert "**81.25% of the prunable weights" in (out / "model" / "README.md").read_text(encoding="utf-8")
    assert sorted(path.name for path in out.iterdir()) == ["dense", "model", "results.json"]


SAID = (
    "Not in the model's file and initialised at random: classifier.bias, classifier.weight",
    "Fine-tuning the dense model",
    "Dense model on the test split: accuracy",
    "Fine-tuning and pruning 81.2% of 3,584 prunable weights",
    "Pruned model on the test split: accuracy",
    "Results on the test split",
    "20 test samples. Files written:",
)


def test_two_replicated_processes_write_once_what_one_would(tmp_path, material, alone, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # or the tokens of the run alone would be taken
    recipe = recipe_for(tmp_path, material, batch_size=16)
    code, output, errors = launch(
        "ddp", "-m", "hf_prune", "run", recipe, "training.per_device_train_batch_size=8", timeout=200
    )
    assert code == 0, errors[-4000:]
    assert [output.count(text) for text in SAID] == [1] * len(SAID), output
    assert errors.count("Tokenizing: 100%") == 3, "a bar for each part of the data, of the first process"
    compare(tmp_path / "out", alone)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("fsdp2", 2), ("fsdp2_hybrid", 4)])
def test_processes_with_sharded_weights_write_once_what_one_would(tmp_path, material, alone, name, processes):
    recipe = recipe_for(tmp_path, material, batch_size=16 // processes)
    script = HERE / "launch_fsdp.py"
    code, output, errors = launch(name, "--mixed_precision", "no", script, "run", recipe, timeout=200)
    assert code == 0, errors[-4000:]
    assert [output.count(text) for text in SAID] == [1] * len(SAID), output
    compare(tmp_path / "out", alone, processes)
    assert len(mask_files(tmp_path / "out" / "model")) == 2, "the weights were not sharded in two"


# ---- What is refused ----


def test_a_sharded_launch_on_cpus_is_refused_once_and_nothing_is_written(tmp_path, material):
    code, output, errors = launch("fsdp2", "-m", "hf_prune", "run", recipe_for(tmp_path, material, batch_size=8))
    assert code != 0
    said = [line for line in errors.splitlines() if line.startswith("hf-prune")]
    assert len(said) == 1
    assert "got 2 process(es) on cpu, where FSDP shards nothing" in said[0]
    assert "recipes/accelerate/ddp.yaml" in said[0]
    assert output == ""
    assert not (tmp_path / "out").exists()
    exits = re.findall(r"exitcode *: (-?\d+)", errors)
    assert exits
    assert "0" not in exits


def test_processes_that_would_train_each_alone_are_refused(tmp_path, material, monkeypatch):
    recipe = recipe_for(tmp_path, material, batch_size=8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # of a kind that accelerate does not know
    with pytest.raises(LaunchError, match=r"expected 2 processes .* got 1, .*training argument use_cpu"):
        load_recipe(recipe)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
            "zero3_init_flag: expected false",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"},
            "fsdp_cpu_ram_efficient_loading: expected false",
        ),
    ],
)
def test_what_a_launcher_may_not_ask_for_is_refused(environment, message, tmp_path, material, monkeypatch):
    recipe = recipe_for(tmp_path, material, batch_size=8)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=message):
        load_recipe(recipe)


def test_sharding_that_a_recipe_asks_for_without_a_launcher_is_refused(tmp_path, material):
    recipe = load_recipe(recipe_for(tmp_path, material, batch_size=8, training__fsdp="full_shard"))
    with pytest.raises(LaunchError, match=r"got 1 process\(es\) on cpu, where FSDP shards nothing"):
        run(recipe)
    assert not (tmp_path / "out").exists()


def test_a_trainer_that_does_not_train_as_was_asked_is_refused(tmp_path, material, monkeypatch):
    model = prepare(load_recipe(recipe_for(tmp_path, material, batch_size=8))).model
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none"))
    check_engine(trainer)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(LaunchError, match=r"^fsdp_version: expected 2, got 1;"):
        check_engine(trainer)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(LaunchError, match="DeepSpeed was requested, but does not train the model on cpu"):
        check_engine(trainer)


def test_a_mistake_that_only_another_process_meets_is_told_by_that_process(tmp_path, material, monkeypatch, capsys):
    """The others wait a while, in which the launcher ends them if the first process has met it, too."""
    waited = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(messages.time, "sleep", waited.append)
    with pytest.raises(messages.typer.Exit) as ended, messages.errors_as_lines():
        raise RecipeError("model.name", "nothing there")
    assert ended.value.exit_code == 2
    assert len(waited) == 1
    assert capsys.readouterr().err == "hf-prune, process 1: model.name: nothing there\n"


def test_a_configuration_of_deepspeed_that_contradicts_the_recipe_is_refused(monkeypatch):
    config = SimpleNamespace(mismatches=["- ds bf16.enabled=True vs hf bf16=False", "- ds a=1 vs hf b=2"])
    plugin = SimpleNamespace(hf_ds_config=config, zero_stage=2)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(is_fsdp2=False, state=state)
    args = SimpleNamespace(fsdp=None, deepspeed=None)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, is_deepspeed_enabled=True)
    with pytest.raises(LaunchError, match=r"got ds bf16\.enabled=True vs hf bf16=False, ds a=1 vs hf b=2$"):
        check_engine(trainer)
    config.mismatches = []
    check_engine(trainer)
    plugin.zero_stage = 0
    with pytest.raises(LaunchError, match=r"stage: expected 1, 2 or 3 for pruning under DeepSpeed, got 0"):
        check_engine(trainer)


def test_the_precision_of_a_deepspeed_launch_is_an_argument_and_that_of_others_is_not(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert deepspeed_precision() is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert deepspeed_precision() == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert deepspeed_precision() is None


# ---- Which layers FSDP shards by ----


def test_layers_to_shard_by_are_named_while_a_trainer_is_made(tmp_path, material, monkeypatch):
    model = prepare(load_recipe(recipe_for(tmp_path, material, batch_size=8))).model
    with wrapping_layers(model):
        assert os.environ[WRAPPED] == "BertLayer"
    assert WRAPPED not in os.environ
    monkeypatch.setenv(WRAPPED, "BertEncoder")
    with wrapping_layers(model):
        assert os.environ[WRAPPED] == "BertEncoder"
    assert os.environ[WRAPPED] == "BertEncoder"


# ---- The configurations ----


def test_every_configuration_is_named_here():
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(SETTINGS)


# Kind, processes, mixed precision.
SETTINGS = {
    "ddp": (DistributedType.MULTI_GPU, 2, "no"),
    "fsdp2": (DistributedType.FSDP, 2, "bf16"),
    "fsdp2_hybrid": (DistributedType.FSDP, 4, "bf16"),
    "zero2": (DistributedType.DEEPSPEED, 2, "bf16"),
    "zero3": (DistributedType.DEEPSPEED, 2, "bf16"),
}


def parsed(name):
    """What `accelerate launch` makes of a configuration and a command."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), "-m", "hf_prune", "run", "recipe.yaml", "output_dir=out"]
    return _validate_launch_command(launch_command_parser().parse_args(command))[0]


@pytest.mark.parametrize("name", SETTINGS)
def test_accelerate_reads_a_configuration(name, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    kind, processes, mixed_precision = SETTINGS[name]
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, processes, mixed_precision)
    assert not config.use_cpu
    args = parsed(name)
    assert (args.training_script, args.training_script_args) == ("hf_prune", ["run", "recipe.yaml", "output_dir=out"])
    used = {"ddp": "multi_gpu", "fsdp2": "use_fsdp", "fsdp2_hybrid": "use_fsdp"}.get(name, "use_deepspeed")
    assert getattr(args, used)
    assert args.use_parallelism_config == (name == "fsdp2_hybrid")
    assert f"recipes/accelerate/{name}.yaml -m hf_prune run RECIPE" in (CONFIGS / f"{name}.yaml").read_text("utf-8")


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_hybrid"])
def test_a_sharded_launch_asks_for_what_pruning_knows(name):
    environment = prepare_multi_gpu_env(parsed(name))
    wanted = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    assert {key: environment.get(key) for key in wanted} == wanted
    assert WRAPPED not in environment
    if name == "fsdp2_hybrid":
        sizes = [int(environment[f"PARALLELISM_CONFIG_DP_{kind}_SIZE"]) for kind in ("REPLICATE", "SHARD")]
        assert sizes == [2, 2]


@pytest.mark.parametrize(("name", "stage"), [("zero2", 2), ("zero3", 3)])
def test_a_deepspeed_launch_asks_for_its_stage(name, stage):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml")).deepspeed_config
    assert config["zero_stage"] == stage
    assert (config["gradient_accumulation_steps"], config["gradient_clipping"]) == ("auto", "auto")
    assert config.get("zero3_save_16bit_model", False) == (stage == 3)
    assert not config.get("zero3_init_flag", False)
