"""`hf-prune prune`: a saved model pruned at once, from the command line."""

import json
import re

import pytest
import torch
import transformers
from models import VOCABULARY, bert, llama
from safetensors.torch import load_file
from test_commands import invoke, read_json, refused, words
from test_run import tree, write_csv
from text_models import save_text_model, texts
from transformers import AutoModelForCausalLM

from hf_prune import PruningConfig, prune
from hf_prune.config.pruning import load_configs
from hf_prune.publish.record import load_record
from hf_prune.saved.report import make_report

pytestmark = pytest.mark.usefixtures("eighty_columns")

SHORT = ("--samples", 4, "--length", 12)


def mamba():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Models and a data set; no test may change them."""
    folder = tmp_path_factory.mktemp("material")
    for name, build in (("llama", llama), ("mamba", mamba), ("bert", bert)):
        save_text_model(folder / name, build)
    rows = [{"text": text, "kind": "ab"[number % 2]} for number, text in enumerate(texts(60))]
    write_csv(folder / "texts.csv", rows)
    return folder


def printed(*arguments):
    """What a command prints that succeeds; the path of a temporary folder may be long."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def zeros_of(folder):
    weights = load_file(folder / "model.safetensors")
    return {name: (weight == 0) for name, weight in weights.items() if weight.dim() == 2 and "layers" in name}


def test_a_model_is_pruned_measured_and_saved_with_its_card(material, tmp_path):
    before = tree(material)
    out = tmp_path / "out"
    arguments = ("prune", material / "llama", out, "--data", material / "texts.csv", "--method", "alps")
    said = words(printed(*arguments, "--sparsity", 0.5, "--where", "kind=a", "--base-model", "USER/base", *SHORT))
    assert tree(material) == before
    assert all(int(zeros.sum()) == zeros.numel() // 2 for zeros in zeros_of(out).values())
    record = load_record(out)
    [evaluation] = record.evaluations
    for when, metrics in (("dense", evaluation.dense_metrics), ("pruned", evaluation.metrics)):
        assert f"Perplexity of the {when} model: {metrics['perplexity']:.3f}" in said
    assert "perplexity on other texts" in said
    assert "48 tokens of calibration." in said
    assert record.calibration.dataset.rows == "where kind is a"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Pruned at once from 4 windows of 12 tokens of `texts.csv`, where kind is a, 48 tokens; seed 0." in card
    assert card.count("base_model: USER/base") == 1
    assert {path.name for path in out.iterdir()} >= {
        "pruning_config.json",
        "pruning_masks.safetensors",
        "tokenizer.json",
    }
    assert not (out / "one_shot").exists()
    _, problems = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(problems.values())
    assert make_report(out).prunable_sparsity == 0.5


def test_the_same_command_gives_the_same_masks_and_another_seed_others(material, tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        data = ("--data", material / "texts.csv", "--pattern", "2:4", "--seed", seed)
        printed("prune", material / "llama", out, *data, *SHORT)
        found.append(load_file(out / "model.safetensors"))
    first, same, other = found
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_wanda_is_ranked_by_rows_unless_told_otherwise(material, tmp_path):
    for name, more in (("rows", ()), ("layers", ("--scope", "layer"))):
        out = tmp_path / name
        data = (
            "--data",
            material / "texts.csv",
            "--method",
            "wanda",
            "--sparsity",
            0.5,
            "--set",
            "exclude=['.*k_proj.*']",
        )
        printed("prune", material / "llama", out, *data, *more, *SHORT)
        [config] = load_configs(out)
        assert (config.scope, config.exclude) == ("row" if name == "rows" else "layer", [".*k_proj.*"])
        even = all(len(set(zeros.sum(1).tolist())) == 1 for zeros in zeros_of(out).values())
        assert even == (name == "rows")


def test_a_model_of_another_task_is_pruned_without_perplexity(material, tmp_path):
    out = tmp_path / "out"
    said = printed("prune", material / "bert", out, "--data", material / "texts.csv", "--sparsity", 0.5, *SHORT)
    assert "erplexity" not in said
    assert load_record(out).evaluations == []
    assert make_report(out).prunable_sparsity == 0.5


def test_what_is_never_called_is_refused_or_left_dense(material, tmp_path):
    arguments = (
        "prune",
        material / "mamba",
        tmp_path / "out",
        "--data",
        material / "texts.csv",
        "--sparsity",
        0.5,
        *SHORT,
    )
    [line] = refused(*arguments)
    assert "conv1d.weight and 3 others: expected a call of its layer" in line
    assert "--leave-unreached" in line
    assert not (tmp_path / "out").exists()
    said = words(printed(*arguments, "--leave-unreached"))
    assert "dt_proj.weight: its layer was not called in the first batch; it was left dense." in said
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(bool((weight == 0).any()) for name, weight in weights.items() if "dt_proj.weight" in name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "movement"), "method: expected one of"),
        (("--method", "alps", "--length", "33"), "length: expected at most the 32 positions of the model, got 33"),
        (("--samples", "2000"), "samples: expected 24,000 tokens of text"),
        (("--samples", "0"), "samples: expected 1 or more, got 0"),
        (("--text-column", "words"), "dataset.text_column: expected one of text, kind"),
        (("--where", "kind=c"), "dataset.where: no row of the train split has 'c' in 'kind'"),
        (("--set", "targets=['x']"), "'x'"),
        (("--method", "magnitude", "--set", "structure=neurons"), "structure: expected None"),
        (("--dtype", "float99"), "--dtype: expected one of auto,"),
        (("--device", "nope"), "--device: expected a device of torch, such as cuda, got 'nope'"),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_is_told_before_anything_is_written(material, tmp_path, options, message):
    given = ("prune", material / "llama", tmp_path / "out", "--data", material / "texts.csv", "--sparsity", 0.5)
    [line] = refused(*given, *SHORT, *options)
    assert message in line
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".md", ".json")]


def test_a_folder_with_files_is_left_alone(material, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    [line] = refused("prune", material / "llama", tmp_path, "--data", material / "texts.csv", "--sparsity", 0.5, *SHORT)
    assert "output: expected an empty folder or a new one, found files" in line
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_was_never_begun_cannot_be_resumed(material, tmp_path):
    data = ("--data", material / "texts.csv", "--sparsity", 0.5)
    result = invoke("prune", material / "llama", tmp_path / "out", *data, *SHORT, "--resume")
    assert result.exit_code == 2
    assert "expected a run to resume, found none; leave out --resume" in result.stderr
    assert not any((tmp_path / "out").rglob("*.safetensors"))


# ---- Dry runs ----


@pytest.fixture
def skeleton(tmp_path):
    """A folder with nothing but the config.json of a model."""
    config = llama().config
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path / "skeleton")
    return tmp_path / "skeleton"


def test_a_dry_run_needs_no_weights_and_no_data(skeleton, tmp_path):
    arguments = ("prune", skeleton, tmp_path / "out", "--data", "nowhere", "--sparsity", 0.5, "--dry-run", *SHORT)
    said = words(printed(*arguments))
    assert "model.layers.0.self_attn.q_proj.weight 16x16 0.00% 50.00%" in said
    assert "lm_head.weight task head" in said
    assert "14 tensors with" in said
    assert "forward passes over 4 samples" in said
    plan = read_json(*arguments, "--json")
    assert plan["final_sparsity"] == 0.5
    assert plan["calibration"]["length"] == 12
    assert plan["memory"]["peak"] == sum(plan["memory"][name] for name in ("passes", "solver", "masks"))
    assert json.dumps(plan) == json.dumps(read_json(*arguments, "--json"))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_plans_in_the_precision_of_the_model(skeleton, tmp_path):
    given = ("prune", skeleton, tmp_path / "out", "--data", "nowhere", "--sparsity", 0.5, "--dry-run", "--json", *SHORT)
    whole, half = (read_json(*given, "--dtype", dtype)["memory"] for dtype in ("float32", "bfloat16"))
    assert half["passes"] < whole["passes"]
    assert half["model"] < whole["model"]


def test_a_dry_run_says_why_the_memory_is_not_known(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config = transformers.JetMoeConfig(vocab_size=VOCABULARY, kv_channels=8, **sizes)  # its forward reads a tensor
    config.architectures = ["JetMoeForCausalLM"]
    config.save_pretrained(tmp_path / "experts")
    given = (
        "prune",
        tmp_path / "experts",
        tmp_path / "out",
        "--data",
        "nowhere",
        "--sparsity",
        0.5,
        "--dry-run",
        *SHORT,
    )
    assert "The memory is not known in advance: JetMoeForCausalLM: expected" in words(invoke(*given).stdout)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_hidden_layers": 10**9}, "model: expected num_hidden_layers of at most 2,000"),
        ({"architectures": ["Unheard"]}, "model: expected a class of transformers among the architectures"),
    ],
    ids=str,
)
def test_a_dry_run_refuses_what_cannot_be_built(skeleton, tmp_path, content, message):
    path = skeleton / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | content))
    [line] = refused("prune", skeleton, tmp_path / "out", "--data", "nowhere", "--sparsity", 0.5, "--dry-run", *SHORT)
    assert message in line


def test_weights_share_values_from_the_command_line(material, tmp_path):
    arguments = ("prune", material / "llama", tmp_path / "out", "--data", material / "texts.csv", "--sparsity", 0.5)
    printed(*arguments, "--shared-values", 8, *SHORT)
    report = make_report(tmp_path / "out")
    assert {tensor.distinct_values for tensor in report.prunable} == {8}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "at most 8 other than zero" in card
    assert "frantar2023gptq" in card
    [said] = refused(*arguments[:2], tmp_path / "other", *arguments[3:], "--shared-values", 1)
    assert "shared_values: expected a whole number from 2 to 256, int8, int4, or None, got 1" in said


def test_a_run_that_cannot_be_resumed_is_told_before_anything_is_measured(material, tmp_path):
    out = tmp_path / "out"
    given = ("prune", material / "llama", out, "--data", material / "texts.csv", *SHORT, "--resume")
    result = invoke(*given, "--sparsity", 0.5)
    assert result.exit_code == 2
    assert "expected a run to resume, found none; leave out --resume" in result.stderr
    assert "Perplexity" not in result.stdout
    assert not out.exists()
    model = AutoModelForCausalLM.from_pretrained(material / "llama")
    windows = torch.zeros(4, 12, dtype=torch.int64)

    def stop(done, total, layer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, PruningConfig(method="sparsegpt", sparsity=0.6), windows, directory=out, progress=stop)
    before = tree(out)
    result = invoke(*given, "--sparsity", 0.5)
    assert result.exit_code == 2
    assert re.search(r"expected the same \S+ as in the run that was stopped \(\S+\), got \S+; resume", result.stderr)
    assert "Perplexity" not in result.stdout
    assert tree(out) == before


def test_a_sparsity_that_is_missing_is_asked_for_by_its_option(material, tmp_path):
    given = ("prune", material / "llama", tmp_path / "out", "--data", material / "texts.csv", *SHORT, "--dry-run")
    [line] = refused(*given)
    assert "--sparsity: expected the share of weights to mask, such as --sparsity 0.5, got none" in line
    assert invoke(*given, "--pattern", "2:4").exit_code == 0
    assert invoke(*given, "--set", "sparsity=0.5").exit_code == 0
    [line] = refused(*given, "--pattern", "2:4", "--target-quality", 0.9)
    assert "expected a pattern that leaves a choice of sparsities" in line
    said = words(invoke(*given, "--target-quality", 0.9).stdout)
    assert "pruned at once to at most 9" in said
