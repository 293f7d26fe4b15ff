"""Saved models are read with what was measured of these weights, compared on one data set alone, and written down."""

import json
import os
import re
import shutil

import pytest
import torch
from compared_models import DATA, cost, evaluation, save_compared
from PIL import Image
from safetensors.torch import load_file, save_file
from shrunk import save_shrunk
from test_commands import invoke, printed, refused
from test_run import tree

from hf_prune.cli.compare import told
from hf_prune.cli.sweep import told_setting
from hf_prune.compare.comparison import compare_models
from hf_prune.compare.models import read_models
from hf_prune.compare.page import columns_of, write_comparison
from hf_prune.errors import CompareError
from hf_prune.publish.record import Generation, Hardware, RunRecord, Source, save_record
from hf_prune.saved.model import SavedModel
from hf_prune.saved.report import make_report


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two pruned models of a sweep, evaluated on validation and test data; no test may change them."""
    folder = tmp_path_factory.mktemp("compared")
    save_compared(
        folder / "half",
        0.5,
        [evaluation(0.8, dense=0.9), evaluation(0.7, "validation", samples=100, dense=0.75)],
        [cost(4, dense=5), cost(20, 16, dense=25)],
        with_card=True,
    )
    save_compared(
        folder / "most",
        0.9,
        [evaluation(0.85, dense=0.9), evaluation(0.6, "validation", samples=100, dense=0.75)],
        [cost(3, dense=7), cost(19, 16, dense=27)],
    )
    return folder


def both(folders):
    return [folders / "half", folders / "most"]


def by_name(models):
    return {model.name: model for model in models}


def test_a_model_has_what_is_counted_in_its_files_and_measured_with_them(folders):
    models = by_name(read_models(both(folders)))
    assert list(models) == ["dense model", "half", "most"]
    half, report = models["half"], make_report(folders / "half")
    assert (half.prunable_sparsity, half.overall_sparsity) == (report.prunable_sparsity, report.sparsity)
    assert half.sparsity == pytest.approx(0.5, abs=0.01)
    weights = load_file(folders / "half" / "model.safetensors").values()
    assert half.parameters == sum(weight.numel() for weight in weights)
    assert half.file_bytes == (folders / "half" / "model.safetensors").stat().st_size
    assert (half.milliseconds(1), half.milliseconds(16), half.milliseconds(2)) == (4.0, 20.0, None)
    assert half.speedup(1) == 5 / 4
    assert half.card == folders / "half" / "README.md"
    assert models["most"].card is None


def test_the_dense_model_that_records_tell_of_is_a_model_of_its_own(folders):
    dense = by_name(read_models(both(folders)))["dense model"]
    assert [(one.part, one.metrics) for one in dense.evaluations] == [
        ("test", {"accuracy": 0.9}),
        ("validation", {"accuracy": 0.75}),
    ]
    assert (dense.sparsity, dense.is_pruned, dense.folder, dense.file_bytes) == (0.0, False, None, None)
    assert [dense.milliseconds(1), dense.milliseconds(16)] == pytest.approx([6, 26])  # the medians


def test_models_that_generate_text_are_compared_by_tokens_a_second(folders, tmp_path):
    speeds = {"half": (20.0, 16.0), "most": (30.0, 14.0)}
    saved = [
        save_compared(
            tmp_path / name,
            sparsity,
            [evaluation(40.0, metric="perplexity", dense=30.0)],
            generation=Generation(samples=[], tokens_per_second=of_pruned, dense_tokens_per_second=of_dense),
        )
        for (name, (of_pruned, of_dense)), sparsity in zip(speeds.items(), (0.5, 0.9), strict=True)
    ]
    comparison = compare_models(read_models(saved))
    axis = next(axis for axis in comparison.axes if axis.key == "tokens_per_second")
    assert {model.name: axis.value(model) for model in comparison.models} == {
        "dense model": 15.0,  # the median
        "half": 20.0,
        "most": 30.0,
    }
    assert [model.name for model in comparison.front(axis)] == ["most", "dense model"]
    assert "tokens/s" in columns_of(comparison)
    assert "tokens/s" not in columns_of(compare_models(read_models(both(folders))))


def test_different_dense_models_are_told_apart_and_one_that_is_given_is_not_repeated(folders, tmp_path):
    other = save_compared(tmp_path / "other", 0.5, [evaluation(0.8, dense=0.88)])
    names = list(by_name(read_models([folders / "half", other])))
    assert names == ["dense model of half", "dense model of other", "half", "other"]
    dense = save_compared(tmp_path / "dense", 0.0, [evaluation(0.88)])
    assert list(by_name(read_models([other, dense]))) == ["other", "dense"]


def test_the_size_of_the_dense_model_is_that_in_the_results_of_the_same_run(folders, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folders / "half", run / "model")
    results = {"pruned": {"accuracy": 0.8}, "file_bytes": {"dense": 1234}, "parameters": {"dense": 99}}
    (run / "results.json").write_text(json.dumps(results), encoding="utf-8")
    dense, model = read_models([run])
    assert (model.name, dense.name) == ("run", "dense model of run")
    assert (dense.file_bytes, dense.parameters) == (1234, 99)
    (run / "results.json").write_text(json.dumps(results | {"pruned": {"accuracy": 0.5}}), encoding="utf-8")
    assert read_models([run])[0].file_bytes is None


def test_the_dense_model_of_a_run_that_is_given_has_the_recorded_figures_and_is_shown_once(folders, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folders / "half", run / "model")
    shutil.copytree(folders / "half", run / "dense", ignore=shutil.ignore_patterns("run_record.json"))
    weights = load_file(run / "dense" / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, run / "dense" / "model.safetensors")
    assert by_name(read_models([run, run / "dense"])).keys() == {"dense model", "run", "dense"}  # not of a recipe
    record = RunRecord.model_validate_json((run / "model" / "run_record.json").read_text(encoding="utf-8"))
    save_record(SavedModel(run / "model"), record.model_copy(update={"recipe": {"dense": {}}}))
    models = by_name(read_models([run, run / "dense"]))
    assert list(models) == ["run", "dense"]
    dense = models["dense"]
    assert [one.metrics for one in dense.evaluations] == [{"accuracy": 0.9}, {"accuracy": 0.75}]
    assert (dense.milliseconds(1), dense.folder, dense.notes) == (5.0, run / "dense", ())


def test_a_sweep_stands_for_its_finished_points(folders, tmp_path):
    (tmp_path / "sweep.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CompareError, match="expected a sweep with a finished point, found none"):
        read_models([tmp_path])
    for name in ("half", "most", "failed"):
        shutil.copytree(folders / "half", tmp_path / "points" / name / "model")
        if name != "failed":
            (tmp_path / "points" / name / "results.json").write_text("{}", encoding="utf-8")
    assert list(by_name(read_models([tmp_path]))) == ["dense model", "half", "most"]


def test_measurements_of_other_weights_are_not_shown(folders, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(folders / "half", changed)
    weights = load_file(changed / "model.safetensors")
    weights["classifier.bias"] += 1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    (model,) = read_models([changed])
    assert (model.evaluations, model.costs) == ((), ())
    assert "its weights have changed since its record was written" in model.notes[0]
    comparison = compare_models([*read_models([folders / "half"]), model])
    assert "Not measured, so counted only: changed." in comparison.notes
    assert comparison.choice.best.name == "half"


def test_a_smaller_model_counts_what_was_removed_as_sparsity(tmp_path):
    save_shrunk(tmp_path / "small")
    (model,) = read_models([tmp_path / "small"])
    removed = make_report(tmp_path / "small").removed
    assert model.is_pruned
    assert model.sparsity == 1 - removed.weights[1] / removed.weights[0]
    assert model.prunable_sparsity == 0
    comparison = compare_models([model])
    assert comparison.measure is None
    assert comparison.verdict == ["No metric was measured of any of these models, so none is the best."]


# ---- One metric, one data set ----


def test_validation_data_choose_where_all_have_them_and_the_test_split_is_told_beside_it(folders):
    comparison = compare_models(read_models(both(folders)))
    assert (comparison.measure.part, comparison.measure.tested) == ("validation", True)
    assert comparison.choice.best.name == "half"  # though `most` is better on the test split
    assert "0.8000 on the test split, which chose nothing" in comparison.verdict[0]
    assert not [line for line in comparison.verdict if "chosen among" in line]


def test_without_validation_data_of_all_the_main_evaluations_choose(folders, tmp_path):
    tested = save_compared(tmp_path / "tested", 0.6, [evaluation(0.5)])
    comparison = compare_models(read_models([*both(folders), tested]))
    assert (comparison.measure.part, comparison.measure.tested) == ("test", False)
    assert comparison.choice.best.name == "most"


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"dataset": Source(name="reviews", rows="where source is b")}, "400 samples of reviews, where source is b"),
        ({"samples": 300}, "300 samples of reviews, where source is a"),
        ({"part": "eval"}, "(eval)"),
        ({"dataset": Source(name="reviews", hub_name="someone/reviews", revision="abc", rows=DATA.rows)}, "someone"),
    ],
)
def test_models_that_were_measured_on_other_data_are_refused(tmp_path, other, found):
    models = [
        save_compared(tmp_path / "one", 0.5, [evaluation(0.8)]),
        save_compared(tmp_path / "other", 0.5, [evaluation(0.9, **other)]),
    ]
    with pytest.raises(CompareError, match="expected models that were measured on the same data, got one: ") as error:
        compare_models(read_models(models))
    assert found in str(error.value)


def test_models_with_other_test_data_are_refused_where_those_are_told_beside_validation_data(tmp_path):
    validated = evaluation(0.7, "validation", samples=100)
    models = [
        save_compared(tmp_path / "one", 0.5, [evaluation(0.8, samples=150), validated]),
        save_compared(tmp_path / "other", 0.5, [evaluation(0.9, samples=120), validated]),
    ]
    with pytest.raises(CompareError, match=r"one: 150 samples of reviews, .*; other: 120 samples of reviews"):
        compare_models(read_models(models))


def test_models_with_other_metrics_are_refused_unless_a_common_one_is_named(tmp_path):
    first, second = evaluation(0.8), evaluation(0.6, metric="f1")
    both_metrics = second.model_copy(update={"metrics": {"f1": 0.6, "accuracy": 0.7}})
    models = [
        save_compared(tmp_path / "one", 0.5, [first]),
        save_compared(tmp_path / "other", 0.5, [both_metrics]),
    ]
    read = read_models(models)
    with pytest.raises(CompareError, match=r"same main metric, got one: accuracy; other: f1\. Name one with --metric"):
        compare_models(read)
    assert compare_models(read, metric="accuracy").choice.best.name == "one"
    with pytest.raises(CompareError, match="--metric: one has accuracy, got 'acuracy'; did you mean 'accuracy'"):
        compare_models(read, metric="acuracy")


def test_data_without_a_name_are_compared_with_a_note(tmp_path):
    models = [save_compared(tmp_path / name, 0.5, [evaluation(0.8, dataset=None)]) for name in "ab"]
    notes = "\n".join(compare_models(read_models(models)).notes)
    assert "whether all models were measured on the same is not checked" in notes


def test_times_of_other_machines_lengths_and_busy_machines_are_said(tmp_path):
    fast = Hardware(processor="another", cores=2, threads=4)
    one = save_compared(tmp_path / "one", 0.5, [evaluation(0.8)], [cost(4)])
    other = save_compared(tmp_path / "other", 0.5, [evaluation(0.8)], [cost(3, length=16)], hardware=fast)
    notes = compare_models(read_models([one, other])).notes
    machines = "one: a processor with 1 thread; other: another with 4 threads"
    assert f"Times were measured on different machines and cannot be compared: {machines}." in notes
    assert "Times were measured on inputs of different shapes, so they cannot be compared." in notes
    assert not [note for note in notes if "differ much" in note]
    busy = cost(4)
    busy = busy.model_copy(update={"model": busy.model.model_copy(update={"quartiles": [0.004, 0.009]})})
    models = [save_compared(tmp_path / "busy", 0.5, [evaluation(0.8)], [busy])]
    assert "The times of busy differ much from pass to pass" in "\n".join(compare_models(read_models(models)).notes)


# ---- What cannot be compared ----


def test_a_folder_that_is_none_and_one_that_is_given_twice_are_refused(folders, tmp_path):
    with pytest.raises(CompareError, match="expected a folder with a saved model, found nothing"):
        read_models([tmp_path / "nothing"])
    link = tmp_path / "link"
    link.symlink_to(folders / "half")
    with pytest.raises(CompareError, match="expected different models, got this one twice"):
        read_models([folders / "half", link])


# ---- What is written ----


def test_page_json_markdown_and_picture_say_the_same(folders, tmp_path):
    comparison = compare_models(read_models(both(folders)), title="Half <b>or</b> most", command="hf-prune compare")
    files = write_comparison(comparison, tmp_path / "out")
    assert sorted(path.name for path in files) == ["compare.json", "compare.md", "compare.png", "index.html"]
    written = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(comparison.to_dict()))
    assert [row["name"] for row in written["models"]] == ["dense model", "half", "most"]
    assert (written["best"], written["push"]) == ("half", f"hf-prune push {folders / 'half'} USER/NAME")
    assert written["fronts"]["milliseconds_1"] == ["most", "half", "dense model"]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "Half &lt;b&gt;or&lt;/b&gt; most" in page
    assert not re.search(r"https?://|<script|<img|@import|url\(", page)
    card = os.path.relpath(folders / "half" / "README.md", tmp_path / "out")
    assert page.count(f'href="{card}"') == 5  # a point in each of four charts, and a line of the table
    assert (tmp_path / "out" / card).resolve() == folders / "half" / "README.md"
    markdown = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    for row in ("| 2 | [half]", "| 0.7000 | 0.8000 | 50.0% |", "![Charts"):
        assert row in markdown
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert picture.width > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_names_that_mean_something_in_html_and_markdown_do_no_harm(tmp_path):
    name = "a|b <script>alert(1)</script> & 'x'"
    models = read_models([save_compared(tmp_path / name.replace("/", "_"), 0.5, [evaluation(0.8)], with_card=True)])
    comparison = compare_models(models)
    write_comparison(comparison, tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    rows = [
        line for line in (tmp_path / "out" / "compare.md").read_text(encoding="utf-8").splitlines() if "a\\|b" in line
    ]
    (row,) = [line for line in rows if line.startswith("|")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 3 + len(columns_of(comparison))


def test_the_same_models_give_the_same_bytes(folders, tmp_path):
    for name in ("one", "two"):
        write_comparison(compare_models(read_models(both(folders))), tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# ---- The command ----


@pytest.mark.usefixtures("eighty_columns")
def test_the_command_writes_the_page_and_names_the_best(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(folders)
    said = printed("compare", *(os.path.relpath(one) for one in both(folders)), "--min-sparsity", 0.8)
    assert "Best accuracy with at least 80% sparsity: most, accuracy 0.6000" in said
    assert "hf-prune push" in said
    assert (tmp_path / "comparison" / "index.html").exists()
    assert tree(folders) == before
    page = (tmp_path / "comparison" / "compare.md").read_text(encoding="utf-8")
    half, most = map(os.path.relpath, both(folders))
    assert f"hf-prune compare {half} {most} --output comparison --min-sparsity 0.8" in page


def test_the_command_on_the_page_makes_it_again_and_names_no_folders_elsewhere(folders, tmp_path, monkeypatch):
    shutil.copytree(folders, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    assert invoke("compare", *both(tmp_path / "runs"), "--output", tmp_path / "out/comparison").exit_code == 0
    page = tmp_path / "out/comparison/index.html"
    first = page.read_text(encoding="utf-8")
    (words,) = re.findall("<p>(This command makes this page again.*)</p>", first)
    where, _, command = words.removesuffix("</code>").partition(" <code>")
    assert where == "This command makes this page again. Run it in the folder that has out/comparison:"
    assert command == "hf-prune compare runs/half runs/most --output out/comparison"
    page.unlink()
    assert invoke(*command.split()[1:]).exit_code == 0
    assert page.read_text(encoding="utf-8") == first.replace(f"{tmp_path}/", "")
    monkeypatch.chdir(tmp_path / "runs")
    assert invoke("compare", "half", folders / "most", "--output", tmp_path / "out/comparison").exit_code == 0
    text = (tmp_path / "out/comparison/compare.md").read_text(encoding="utf-8")
    assert "hf-prune compare half path/to/most --output path/to/comparison\n" in text
    assert "in the folder in which it was run; put the real paths where it says path/to/:" in text.replace("\\", "")


def test_the_command_of_a_sweep_names_no_folders_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert told(str(tmp_path / "recipes/own.yaml")) == "recipes/own.yaml"
    assert told("/elsewhere/recipes/own.yaml") == "path/to/own.yaml"
    assert [told(name) for name in ("sparse", "../own.yaml")] == ["sparse", "../own.yaml"]
    assert told_setting(f"model.name={tmp_path / 'model'}") == "model.name=model"
    assert told_setting("pruning.sparsity=0.5,0.7") == "pruning.sparsity=0.5,0.7"


def test_json_is_printed_and_nothing_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("compare", *both(folders), "--json", "--latency-ms", 3.5)
    assert json.loads(result.stdout)["best"] == "most"
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_before_anything_is_written(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("compare", folders / "half", "--latency-ms", -1) == [
        "hf-prune: --latency-ms: expected a number above 0, got -1.0"
    ]
    torch.save({}, tmp_path / "file")
    for output, found in ((tmp_path / "file", "found a file at"), (folders / "half", "which has a model")):
        (line,) = refused("compare", folders / "half", "--output", output)
        assert found in line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
