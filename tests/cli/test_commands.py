import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers
from models import bert, mixtral
from safetensors.torch import load_file, save_file
from shrunk import save_shrunk
from test_run import reviews, save_tiny_bert, tree, write_csv, write_recipe
from typer.testing import CliRunner

import hf_prune
from hf_prune.cli import commands as cli
from hf_prune.cli import tables
from hf_prune.cli.messages import quiet
from hf_prune.publish.record import Cost, RunRecord, save_record
from hf_prune.recipe.outcome import RunResult
from hf_prune.saved.model import SavedModel
from hf_prune.saved.report import Report, make_report
from hf_prune.saved.zeros import TensorReport

pytestmark = pytest.mark.usefixtures("eighty_columns")

TIMEOUT = 240


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model and a data set for recipes; no test may change them."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_csv(folder / "reviews.csv", reviews())
    return folder


@pytest.fixture(scope="module")
def sparse_bert(tmp_path_factory):
    """A saved BERT with a head, a third of whose values are zero; no test may change it."""
    folder = tmp_path_factory.mktemp("sparse") / "model"
    model = bert()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand_like(parameter) < 1 / 3] = 0
    model.save_pretrained(folder)
    return folder


def invoke(*arguments):
    """The result of a command that ends as commands do: with an exit code, never with a traceback."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments):
    """What a command prints that succeeds, in a terminal of 80 columns."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    assert [line for line in result.stdout.splitlines() if len(line.rstrip()) > 80] == []
    return result.stdout


def printed_wide(*arguments):
    """What a command prints that succeeds, in lines of any length."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def read_json(*arguments):
    """The JSON that a command prints, and nothing beside it."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refused(*arguments):
    """The lines on standard error of a command that is refused: exit code 2, and nothing on standard output."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith("hf-prune: ") for line in lines)
    return lines


def words(text):
    """The text without the places where a table broke its lines."""
    return re.sub(r"\s+", " ", text)


def rows(text):
    """The rows of all tables in a text, as lists of cells; a name that a table broke is put together again."""
    found, current = [], None
    for line in text.splitlines():
        cells = re.split(r" {2,}", line.rstrip())
        if cells == [""]:
            current = None
        elif len(cells) > 1 and cells[0]:
            current = cells
            found.append(current)
        elif current is not None:
            current[0] += cells[-1]
    return found


# ---- Help ----


COMMANDS = ("run", "plan", "report", "card", "push", "space")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda command: "".join(command) or "all")
def test_help_fits_the_terminal(command):
    text = printed(*command, "--help")
    assert text.startswith("Usage: ")
    assert "..." not in text.replace("]...", "").replace("overrides...", "")


def test_help_names_every_command():
    text = printed("--help")
    assert [command for command in COMMANDS if not re.search(rf"^ +{command} ", text, re.MULTILINE)] == []


def test_the_version_is_that_of_the_package():
    assert printed("--version").strip() == f"hf-prune {version('hf-prune')}"


@pytest.mark.parametrize("arguments", [["rnu"], ["report"], ["report", "--jsn", "x"], ["plan", "x", "--steps", "many"]])
def test_a_wrong_command_line_ends_with_code_2(arguments):
    assert invoke(*arguments).exit_code == 2


# ---- report ----


def test_a_report_is_a_table_of_the_prunable_tensors_and_totals(sparse_bert):
    text = printed("report", sparse_bert)
    weights = load_file(sparse_bert / "model.safetensors")
    prunable = {name for name in weights if re.fullmatch(r"bert\.encoder.*(query|key|value|dense)\.weight", name)}
    for name, weight in weights.items():
        zeros = int((weight == 0).sum())
        row = [name, "x".join(map(str, weight.shape)), f"{zeros:,}", f"{zeros / weight.numel():.2%}"]
        assert (row in rows(text)) == (name in prunable), name
    for title, names in (
        ("prunable", prunable),
        ("other tensors", weights.keys() - prunable),
        ("overall", weights.keys()),
    ):
        values = sum(weights[name].numel() for name in names)
        zeros = sum(int((weights[name] == 0).sum()) for name in names)
        assert [title, f"{values:,}", f"{zeros:,}", f"{zeros / values:.2%}"] in rows(text)


def test_a_report_as_json_is_the_report(sparse_bert):
    expected = make_report(str(sparse_bert)).to_dict() | {"costs": []}  # nothing was measured
    assert read_json("report", sparse_bert, "--json") == json.loads(json.dumps(expected))


def test_a_report_only_reads(sparse_bert):
    before = tree(sparse_bert)
    printed("report", sparse_bert)
    printed("plan", sparse_bert, "sparsity=0.5")
    assert tree(sparse_bert) == before


def test_a_report_of_a_sharded_model_with_experts_fits_the_terminal(tmp_path):
    mixtral().save_pretrained(tmp_path, max_shard_size="10KB")
    text = words(printed("report", tmp_path))
    assert "model.layers.1.mlp.experts.gate_up_proj 4x48x16 0 0.00%" in text


def test_a_report_of_a_large_model_fits_the_terminal_with_every_figure(monkeypatch):
    name = "base_model.model.model.language_model.layers.{}.block_sparse_moe.experts.gate_up_proj.base_layer.weight"
    weights = 256 * 28672 * 8192
    tensors = [TensorReport(name.format(index), (256, 28672, 8192), weights, weights - 1, True) for index in range(3)]
    monkeypatch.setattr("hf_prune.saved.report.make_report", lambda model: Report("a/" + "long-name-" * 12, tensors, 1))
    text = printed("report", "a/model")
    assert text.count("256x28672x8192") == 3
    assert text.count(f"{weights - 1:,}") == 3
    assert f"{3 * weights:,}" in text
    assert "…" not in text


def test_names_of_tensors_are_whole_in_a_wide_terminal_and_in_a_pipe(monkeypatch):
    name = "model.vision_tower.encoder.layers.0.self_attn.out_proj.weight"
    tensors = [TensorReport(name, (16, 16), 256, 128, True)]
    monkeypatch.setattr("hf_prune.saved.report.make_report", lambda model: Report("a/model", tensors, 1))
    assert name not in printed("report", "a/model")
    assert f"{name[: name.index('.out_proj')]}" in printed("report", "a/model")
    monkeypatch.setenv("COLUMNS", "100")
    assert [name, "16x16", "128", "50.00%"] in rows(printed_wide("report", "a/model"))
    monkeypatch.delenv("COLUMNS")
    assert [name, "16x16", "128", "50.00%"] in rows(printed_wide("report", "a/model"))


def test_a_report_without_a_known_class_shows_all_tensors_and_says_why(sparse_bert, tmp_path):
    shutil.copytree(sparse_bert, tmp_path / "model")
    name_no_class(tmp_path / "model")
    text = words(printed("report", tmp_path / "model"))
    assert "classifier.bias" in text
    assert "It is unknown which tensors are prunable" in text
    assert not re.search(r"prunable [\d,]+ ", text)


def test_a_module_of_sentence_transformers_without_a_configuration_is_reported(tmp_path):
    save_file({"embedding.weight": torch.eye(4)}, tmp_path / "model.safetensors")  # as StaticEmbedding is saved
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.StaticEmbedding"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert "embedding.weight" in words(printed("report", tmp_path))
    done = invoke("push", tmp_path, "somebody/static", "--dry-run")
    assert (done.exit_code, "model.safetensors" in done.stdout) == (0, True), done.stderr


def test_a_plain_module_that_was_pruned_is_reported(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = hf_prune.PruningConfig(sparsity=0.5, targets=["0.weight"], schedule="one_shot", begin=0, end=None)
    pruner = hf_prune.Pruner(module, config, total_steps=1)
    pruner.start(1)
    save_file(module.state_dict(), tmp_path / "model.safetensors")  # as a Trainer saves it
    pruner.save(tmp_path)
    assert "50.00%" in words(printed("report", tmp_path))


@pytest.mark.parametrize("name", ["model [v2]", "[bold]model", "model[/x]", "model :smile:", "café"])
def test_a_name_is_printed_as_it_is_whatever_is_in_it(sparse_bert, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(sparse_bert, name)
    assert printed("report", name).splitlines()[0].strip() == name


@pytest.mark.parametrize("command", [["report"], ["report", "--json"], ["plan", "sparsity=0.5"]], ids=" ".join)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("./nowhere", "./nowhere: expected a folder with a saved model, found nothing"),
        ("config.json", "config.json: expected a folder with a saved model, found a file"),
        ("nobody/nothing", "nobody/nothing: expected a folder or a model on the Hub"),
    ],
)
def test_what_is_no_model_is_one_line(sparse_bert, monkeypatch, command, name, expected):
    monkeypatch.chdir(sparse_bert)
    (line,) = refused(command[0], name, *command[1:])
    assert line.startswith(f"hf-prune: {expected}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a/b/c"], "repo: expected USER/REPO, the name of a repository on the Hub"),
        (["a b"], "repo: expected USER/REPO, the name of a repository on the Hub"),
        (["somebody/film", "--revision", "a b"], "revision: expected the name of a branch, got 'a b'"),
    ],
)
def test_a_dry_run_of_a_push_that_can_never_be_made_is_refused(sparse_bert, arguments, message):
    done = invoke("push", sparse_bert, *arguments, "--dry-run")
    assert done.exit_code == 1
    assert message in words(done.stderr)
    assert "Dry run" not in done.stdout


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def keep_only_adapter(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def break_config(folder):
    (folder / "config.json").write_text("{")


def name_no_class(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["NobodysModel"]}))


@pytest.mark.parametrize("spoil", [cut_weights, break_config, name_no_class, keep_only_adapter])
def test_a_plan_for_a_folder_that_lacks_something_is_one_line(sparse_bert, tmp_path, spoil):
    shutil.copytree(sparse_bert, tmp_path / "model")
    spoil(tmp_path / "model")
    (line,) = refused("plan", tmp_path / "model", "sparsity=0.5")
    assert str(tmp_path / "model") in line


@pytest.fixture(scope="module")
def small_bert(tmp_path_factory):
    """A saved BERT without neurons and layers; no test may change it."""
    folder = tmp_path_factory.mktemp("small") / "model"
    save_shrunk(folder)
    return folder


def test_a_report_of_a_smaller_model_says_what_was_removed(small_bert):
    text = printed("report", small_bert)
    removed = make_report(small_bert).removed
    kept = removed.layers[0].kept
    for layer in kept:
        assert [f"neurons of bert.encoder.layer.{layer}", "24", "6"] in rows(text)
    assert ["layers of bert.encoder.layer", "4", "2"] in rows(text)
    assert ["parameters", *(f"{number:,}" for number in removed.parameters)] in rows(text)
    assert f"Layers of bert.encoder.layer that are left: {kept[0]}, {kept[1]}." in text
    assert ["overall", f"{removed.parameters[1]:,}", "0", "0.00%"] in rows(text)
    expected = make_report(str(small_bert)).to_dict() | {"costs": []}
    assert read_json("report", small_bert, "--json") == json.loads(json.dumps(expected))


def test_a_report_says_what_a_forward_pass_costs_with_these_weights(small_bert, tmp_path):
    folder = shutil.copytree(small_bert, tmp_path / "model")
    passes = [{"seconds": seconds, "flops": 3_000_000, "memory_bytes": 2_500_000} for seconds in (0.004, 0.001)]
    cost = {"shapes": {"input_ids": [1, 8]}, "passes": 5, "dense": passes[0], "model": passes[1]}
    record = RunRecord(name="model", costs=[Cost.model_validate(cost)], weights=SavedModel(folder).hashes)
    save_record(folder, record)
    shown = invoke("report", folder).stdout
    assert re.search(r"1 sample, milliseconds +4\.0 +1\.0 +25\.0%", shown)
    assert re.search(r"1 sample, million operations +3\.0 +3\.0 +100\.0%", shown)
    assert json.loads(invoke("report", folder, "--json").stdout)["costs"] == [record.costs[0].model_dump()]

    weights = load_file(folder / "model.safetensors")
    save_file({name: one + 1 for name, one in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert "milliseconds" not in invoke("report", folder).stdout  # they were those of other weights


def test_what_was_removed_is_said_where_zeros_cannot_be_counted(small_bert, tmp_path):
    folder = shutil.copytree(small_bert, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({f"{name}.packed": tensor for name, tensor in weights.items()}, folder / "model.safetensors")
    text = invoke("report", folder).stdout
    assert "zeros were not counted" in text
    assert ["layers of bert.encoder.layer", "4", "2"] in rows(text)


def test_a_broken_record_of_what_was_removed_is_one_line(small_bert, tmp_path):
    folder = shutil.copytree(small_bert, tmp_path / "model")
    (folder / "pruning_structure.json").write_text('{"format_version": 1, "units": 3}')
    for command in ("report", "card"):
        [line] = refused(command, folder)
        assert "pruning_structure.json: expected the units that were cut out" in line


# ---- plan ----


def test_a_plan_of_a_structure_says_what_will_be_left(sparse_bert):
    arguments = ("plan", sparse_bert, "structure=neurons", "sparsity=0.75", "--steps", "20")
    text = printed(*arguments)
    assert ["neurons of bert.encoder.layer.0", "24", "18", "6"] in rows(text)
    plan = read_json(*arguments, "--json")
    assert {(one["path"], one["of"], one["removed"]) for one in plan["units"]} == {
        ("bert.encoder.layer.0", 24, 18),
        ("bert.encoder.layer.1", 24, 18),
    }
    lost = 2 * 18 * (16 + 1 + 16)
    assert plan["weights_left"] == plan["all_weights"] - lost
    left, every = plan["weights_left"], plan["all_weights"]
    assert f"The model that is left has {left:,} of {every:,} parameters ({left / every:.2%})." in words(text)


def test_a_plan_calls_hidden_dimensions_by_their_name(sparse_bert):
    text = printed("plan", sparse_bert, "structure=hidden", "sparsity=0.5")
    assert ["hidden dimensions of bert", "16", "8", "8"] in rows(text)


@pytest.mark.widths_per_layer
def test_a_plan_does_not_list_layers_that_lose_no_units(sparse_bert):
    overrides = r"overrides={'bert\.encoder\.layer\.1\..*': 0.0}"
    text = printed("plan", sparse_bert, "structure=neurons", "sparsity=0.75", overrides)
    assert ["neurons of bert.encoder.layer.0", "24", "18", "6"] in rows(text)
    assert "neurons of bert.encoder.layer.1" not in words(text)


def test_a_plan_for_a_target_shows_what_is_chosen_and_from_what(sparse_bert):
    arguments = ("plan", sparse_bert, "target_parameters=0.9", "target_length=16")
    text = printed(*arguments)
    assert "times as fast" in text
    assert "Chosen for 90.0% of the parameters: " in words(text)
    plan = read_json(*arguments, "--json")
    assert plan["weights_left"] == plan["chosen"]["candidate"]["parameters"] <= 0.9 * plan["all_weights"]
    assert plan["chosen"]["conditions"]["inputs"]["input_ids"] == [1, 16]
    [line] = refused("plan", sparse_bert, "target_speedup=1000")
    assert line.startswith("hf-prune: command line: target_speedup: expected at most ")


@pytest.mark.widths_per_layer
def test_a_plan_for_a_target_with_numbers_for_each_layer_shows_them(sparse_bert):
    arguments = ("plan", sparse_bert, "target_parameters=0.9", "scope=global")
    text = words(printed(*arguments))
    plan = read_json(*arguments, "--json")
    assert plan["weights_left"] == plan["chosen"]["candidate"]["parameters"]
    assert "Chosen for each layer" in text
    for path, shares in plan["chosen"]["candidate"]["layers"].items():
        left = "removed" if shares is None else str(24 - round(24 * shares["neurons"]))
        assert f"{path} {left}" in text


def test_a_structure_that_a_model_does_not_have_is_one_line(sparse_bert):
    [line] = refused("plan", sparse_bert, "structure=experts", "sparsity=0.5")
    assert line.startswith("hf-prune: command line: structure: no field of BertConfig sets the number of experts")


@pytest.mark.parametrize("content", ["[]", "5", "null", "[" * 5000])
def test_a_generation_configuration_that_is_no_object_is_one_line(tmp_path, content):
    mixtral().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    (line,) = refused("plan", tmp_path, "sparsity=0.5")
    assert line.startswith(f"hf-prune: {tmp_path}: the weights cannot be loaded: ")


def test_a_plan_for_a_model_shows_tensors_updates_and_totals(sparse_bert):
    text = printed("plan", sparse_bert, "sparsity=0.5", "begin=0", "end=10", "frequency=5", "--steps", "20")
    weights = load_file(sparse_bert / "model.safetensors")
    for name, weight in weights.items():
        if re.fullmatch(r"bert\.encoder.*(query|key|value|dense)\.weight", name):
            share = int((weight == 0).sum()) / weight.numel()
            assert [name, "x".join(map(str, weight.shape)), f"{share:.2%}", "50.00%"] in rows(text)
    assert re.search(r" 0 3\d\.\d\d% 5 4\d\.\d\d% 10 50\.00% ", words(text))
    total = sum(weight.numel() for weight in weights.values())
    assert f"12 tensors with 3,584 of the model's {total:,} weights; 3 mask updates in 20 steps" in words(text)
    assert f"final sparsity 50.00% of these tensors, {0.5 * 3584 / total:.2%} of the model." in words(text)


def test_a_plan_for_a_model_as_json(sparse_bert):
    plan = read_json("plan", sparse_bert, "sparsity=0.5", "begin=2", "end=8", "frequency=3", "--steps", "20", "--json")
    assert [update["step"] for update in plan["updates"]] == [2, 5, 8]
    assert (plan["total_steps"], plan["weights"], plan["final_sparsity"]) == (20, 3584, 0.5)
    zeros = {row["name"]: row["zeros"] for row in read_json("report", sparse_bert, "--json")["tensors"]}
    assert {tensor["name"]: tensor["masked"] for tensor in plan["tensors"]} == {
        tensor["name"]: zeros[tensor["name"]] for tensor in plan["tensors"]
    }


def test_a_plan_needs_no_weights(sparse_bert, tmp_path):
    shutil.copy(sparse_bert / "config.json", tmp_path)
    plan = read_json("plan", tmp_path, "sparsity=0.5", "--json")
    assert (len(plan["tensors"]), plan["weights"], plan["final_sparsity"], plan["total_steps"]) == (12, 3584, 0.5, 1000)
    assert {tensor["masked"] for tensor in plan["tensors"]} == {0}


def test_a_plan_for_a_large_model_fits_the_terminal_and_takes_no_memory(tmp_path):
    config = transformers.MixtralConfig(num_hidden_layers=2, architectures=["MixtralForCausalLM"])
    config.save_pretrained(tmp_path)
    text = words(printed("plan", tmp_path, "sparsity=0.5"))
    assert "8x28672x4096 0.00% 50.00%" in text
    assert "…" not in text


def test_a_plan_of_a_ranking_says_so(sparse_bert):
    text = words(printed("plan", sparse_bert, "sparsity=0.5", "scope=global"))
    assert len(re.findall(r"% by ranking", text)) == 12


def test_a_long_plan_shows_the_first_and_the_last_updates(sparse_bert):
    text = words(printed("plan", sparse_bert, "sparsity=0.5", "begin=1", "end=100", "frequency=1"))
    assert re.search(r" 6 \d+\.\d\d% \.\.\. 96 \d+\.\d\d% ", text)
    assert "100 mask updates in 1,000 steps" in text


def test_a_plan_that_prunes_nothing_says_so(sparse_bert):
    assert "0 tensors with 0 of" in words(printed("plan", sparse_bert, "sparsity=0.5", "exclude=['.*']"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["command line: sparsity: ", "0 <= s < 1", "None"]),
        (["sparsty=0.5"], ["command line: sparsty: ", "did you mean 'sparsity'?"]),
        (["sparsity=high"], ["command line: sparsity: ", "'high'"]),
        (["sparsity"], ["command line: expected KEY=VALUE", "'sparsity'"]),
        (["sparsity=0.5", "end=2000"], ["end", "1000", "2000"]),
        (["sparsity=0.5", "targets=[decoder.*]"], ["targets", "'decoder.*'", "nearest"]),
        (["sparsity=0.5", "pattern=block:5x1"], ["bert.encoder.layer.0.attention.self.query.weight", "(16, 16)"]),
        (["pattern=2:4", "scope=global"], ["command line: scope: ", "'layer'", "'global'"]),
        (["sparsity=0.5", "--steps", "0"], ["--steps", "1 or more", "0"]),
        (["sparsity=0.5", "--steps", "-5"], ["--steps", "1 or more", "-5"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_configuration_that_does_not_fit_a_model_is_one_line(sparse_bert, arguments, parts):
    (line,) = refused("plan", sparse_bert, *arguments)
    assert [part for part in parts if part not in line] == []


# ---- run ----

CONFIGURATIONS = {
    "layer": {"sparsity": 0.7, "begin": 1, "frequency": 2},
    "sequence": [
        {"sparsity": 0.5, "scope": "erk", "begin": 1, "end": 4, "frequency": 1},
        {"method": "random", "sparsity": 0.6, "begin": 5, "end": 8, "frequency": 1},
    ],
}


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def done(request, tmp_path_factory, material):
    """A recipe that was planned and then run, both by the commands."""
    folder = tmp_path_factory.mktemp("run [1]")
    path = write_recipe(
        folder,
        material,
        training__max_steps=-1,
        training__num_train_epochs=2,
        training__per_device_train_batch_size=4,
        training__gradient_accumulation_steps=3,
        training__learning_rate=1e-3,
        metrics=["accuracy", "f1"],
        dense={"num_train_epochs": 1} if request.param == "layer" else None,
        pruning=CONFIGURATIONS[request.param],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setenv("TERM", "dumb")
        before = tree(folder, material)
        plan = read_json("plan", path, "--json")
        table = printed("plan", path)
        assert tree(folder, material) == before
        result = invoke("run", path)
    assert result.exit_code == 0, result.stderr
    return {"kind": request.param, "out": folder / "out", "plan": plan, "table": table, "said": result.stdout}


def test_training_does_what_the_plan_said(done):
    plan, model = done["plan"], done["out"] / "model"
    weights = load_file(model / "model.safetensors")
    assert {tensor["name"]: round(tensor["final_sparsity"] * tensor["weights"]) for tensor in plan["tensors"]} == {
        tensor["name"]: int((weights[tensor["name"]] == 0).sum()) for tensor in plan["tensors"]
    }
    state = json.loads((model / "pruning_state.json").read_text(encoding="utf-8"))
    assert plan["total_steps"] == state["total_steps"] == state["completed_steps"] == 10
    results = json.loads((done["out"] / "results.json").read_text(encoding="utf-8"))
    assert plan["final_sparsity"] == results["prunable_sparsity"] == state["sparsity"]


def test_a_report_of_what_was_trained_agrees_with_the_results(done):
    found = read_json("report", done["out"] / "model", "--json")
    results = json.loads((done["out"] / "results.json").read_text(encoding="utf-8"))
    assert found["prunable"]["sparsity"] == results["prunable_sparsity"]
    assert found["overall"]["sparsity"] == results["overall_sparsity"]


def test_the_plan_of_a_recipe_is_a_table(done):
    assert "12 tensors with 3,584 of" in words(done["table"])
    assert "mask updates in 10 steps" in words(done["table"])


def test_a_run_ends_with_a_table_of_results(done):
    results = json.loads((done["out"] / "results.json").read_text(encoding="utf-8"))
    lines = done["said"][done["said"].index("Results on the test split") :].splitlines()
    assert [line for line in lines if len(line.rstrip()) > 80 and not line.startswith("  ")] == []
    text = words("\n".join(lines))
    for name, value in results["pruned"].items():
        if done["kind"] == "layer":
            dense = results["dense"][name]
            assert f" {name} {dense:.4f} {value:.4f} {value / dense:.1%} " in text
        else:
            assert f" {name} {value:.4f} " in text
    assert f"zeros in prunable tensors {results['prunable_sparsity']:.2%}" in text
    assert f"zeros in all tensors {results['overall_sparsity']:.2%}" in text
    assert ("recovery" in text) == (done["kind"] == "layer")
    assert "20 test samples" in text


def test_a_run_ends_with_the_files_that_it_wrote(done):
    path = done["out"] / "results.json"
    assert f"{path} ({path.stat().st_size:,} bytes)" in done["said"]
    for name in ("dense", "model") if done["kind"] == "layer" else ("model",):
        files = [path for path in (done["out"] / name).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        assert f"{done['out'] / name}/ ({len(files)} files, {size:,} bytes)" in done["said"]


def test_a_result_whose_dense_metric_is_zero_is_a_table_all_the_same(monkeypatch, tmp_path):
    report = Report("m", [TensorReport("a", (2,), 2, 1, True)], 8)
    seconds = {"dense": 1.0, "pruned": 2.0}
    metrics = {"matthews_correlation": 0.0, "accuracy": 0.5}
    pruned, sizes = metrics | {"accuracy": 0.25}, {"dense": 2, "pruned": 2}
    result = RunResult({}, metrics, pruned, {}, None, report, "matthews_correlation", 3, seconds, [], [], sizes, sizes)
    monkeypatch.setattr("hf_prune.recipe.loading.load_recipe", lambda *args: None)
    monkeypatch.setattr("hf_prune.recipe.run.run", lambda *args, **kwargs: result)
    (tmp_path / "recipe.yaml").write_text("{}", encoding="utf-8")
    text = words(printed("run", tmp_path / "recipe.yaml"))
    assert "matthews_correlation 0.0000 0.0000" in text
    assert "accuracy 0.5000 0.2500 50.0%" in text


def test_what_does_not_fit_a_model_is_told_as_of_the_command_line(sparse_bert):
    for override, field in (("end=5000", "end"), ("targets=[foo]", "targets"), ("pruning.sparsty=1", "sparsty")):
        (line,) = refused("plan", sparse_bert, "sparsity=0.5", override)
        assert line.startswith(f"hf-prune: command line: {field}: ")


def test_a_key_for_a_model_may_be_written_as_in_a_recipe(sparse_bert):
    assert read_json("plan", sparse_bert, "pruning.sparsity=0.5", "--json")["final_sparsity"] == 0.5


def test_a_folder_with_a_name_almost_like_it_is_offered(sparse_bert, monkeypatch):
    monkeypatch.chdir(sparse_bert.parent)
    (line,) = refused("report", "modell")
    assert line.endswith("did you mean 'model'?")


def test_what_is_too_long_for_a_heading_is_told_whole(capsys, monkeypatch):
    monkeypatch.setattr(tables, "console", tables.Console(width=80, highlight=False))
    tables.print_line("word " * 30)
    assert capsys.readouterr().out.split() == ["word"] * 30


def test_steps_are_for_a_model_and_not_for_a_recipe(tmp_path, material):
    (line,) = refused("plan", write_recipe(tmp_path, material), "--steps", "20")
    assert line.startswith("hf-prune: --steps: must not be set with a recipe")


@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize(
    ("changes", "overrides", "parts"),
    [
        ({"training__learning_rte": 1}, [], ["recipe.yaml:", "training.learning_rte: unknown key", "'learning_rate'"]),
        ({"pruning__sparsity": 2}, [], ["recipe.yaml:", "pruning.sparsity: expected 0 <= s < 1, got 2"]),
        ({}, ["pruning.sparsity=high"], ["command line: pruning.sparsity: ", "'high'"]),
        ({}, ["pruning"], ["command line: expected KEY=VALUE"]),
        ({"dataset__name": "./nothing.csv"}, [], ["dataset.name", "nothing.csv"]),
        ({"model__name": "package:no_such_package/m"}, [], ["model.name", "no_such_package"]),
        ({"dataset__label_column": "lable"}, [], ["dataset.label_column", "'lable'", "label"]),
        ({"pruning__targets": ["decoder.*"]}, [], ["targets", "'decoder.*'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, (dict, list)) else "",
)
def test_a_wrong_recipe_is_one_line_and_nothing_is_written(
    tmp_path, material, monkeypatch, command, changes, overrides, parts
):
    quiet(data=True)  # `run` shows progress on standard error, unless another command has hidden it in this process
    path = write_recipe(tmp_path, material, **changes)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path, material)
    (line,) = refused(command, path, *overrides)
    assert tree(tmp_path, material) == before
    assert [part for part in parts if part not in line] == []


def test_every_problem_of_a_recipe_is_a_line(tmp_path, material):
    path = write_recipe(tmp_path, material, pruning__sparsity=2, pruning__schedule="cubik", training__seeed=1)
    lines = refused("run", path)
    assert len(lines) == 3
    assert all(re.match(rf"hf-prune: {re.escape(str(path))}:\d+: (pruning|training)\.\w+: ", line) for line in lines)


def test_a_missing_recipe_is_one_line_with_the_nearest(tmp_path, material, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, material)
    (line,) = refused("run", "recipes.yaml")
    assert line == "hf-prune: recipes.yaml: expected a recipe, found nothing; did you mean 'recipe.yaml'?"


# ---- As processes ----


@pytest.fixture(scope="module", autouse=True)
def processes(tmp_path_factory, material, sparse_bert):
    """`python -m hf_prune` with a wrong recipe and `hf-prune` with a model, at work while the tests above are."""
    folder = tmp_path_factory.mktemp("wrong")
    path = write_recipe(folder, material, pruning__sparsty=0.5)
    commands = {
        "wrong recipe": [sys.executable, "-m", "hf_prune", "run", str(path)],
        "report": [str(Path(sys.executable).with_name("hf-prune")), "report", str(sparse_bert)],
    }
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    options["env"] = os.environ | {"COLUMNS": "80", "TERM": "dumb"}
    before = tree(folder)
    started = {name: subprocess.Popen(command, **options) for name, command in commands.items()}
    yield {"path": path, "before": before, **started}
    for process in started.values():
        with process:
            process.kill()


def ours(errors):
    """The lines on the standard error that are ours: torchao and bitsandbytes say there what they could not load."""
    assert "Traceback" not in errors
    return [line for line in errors.splitlines() if "hf-prune" in line or "hf_prune" in line]


def test_python_m_hf_prune_refuses_a_wrong_recipe_with_code_2_and_one_line(processes):
    output, errors = processes["wrong recipe"].communicate(timeout=TIMEOUT)
    assert (processes["wrong recipe"].returncode, output) == (2, "")
    (line,) = ours(errors)
    assert line.startswith(f"hf-prune: {processes['path']}:")
    assert line.endswith("pruning.sparsty: unknown key; did you mean 'sparsity'?")
    assert tree(processes["path"].parent) == processes["before"]


def test_the_script_prints_the_table_that_the_function_prints(processes, sparse_bert):
    output, errors = processes["report"].communicate(timeout=TIMEOUT)
    assert (processes["report"].returncode, ours(errors)) == (0, [])
    assert output == printed("report", sparse_bert)
