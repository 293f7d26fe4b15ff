"""Recipes with a calibration: the model is pruned at once, and trained on with its zeros kept."""

import json

import pytest
import torch
import transformers
from models import llama, t5
from safetensors.torch import load_file
from test_commands import words
from test_run import quiet_run, reviews, save_tiny_bert, tree, write_csv, write_recipe
from text_models import save_text_model, texts

from hf_prune.cli.print_result import print_result
from hf_prune.config.pruning import load_configs
from hf_prune.errors import RecipeError
from hf_prune.publish.record import load_record
from hf_prune.recipe.loading import load_recipe
from hf_prune.recipe.prepare import prepare
from hf_prune.recipe.run import run

CALIBRATION = {"samples": 16, "batch_size": 4}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Models and data sets; no test may change them."""
    folder = tmp_path_factory.mktemp("material")
    save_tiny_bert(folder / "model")
    write_csv(folder / "reviews.csv", reviews())
    save_text_model(folder / "causal", lambda: llama(initializer_range=0.3))  # or its outputs hardly differ
    save_text_model(folder / "seq2seq", t5)
    rows = [{"text": f"{text} . {other}", "summary": text} for text, other in zip(texts(80), texts(80, 1), strict=True)]
    write_csv(folder / "texts.csv", rows)
    return folder


def write_language_recipe(folder, material, **changes):
    return write_recipe(
        folder,
        material,
        **{
            "task": "text-generation",
            "metrics": ["perplexity"],
            "model__name": str(material / "causal"),
            "dataset__name": str(material / "texts.csv"),
            "calibration": {"samples": 6, "length": 12, "batch_size": 2},
            "pruning": {"method": "alps", "sparsity": 0.5},
        }
        | changes,
    )


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def zeros_in(before, after):
    return {name for name, weight in after.items() if int((weight == 0).sum()) > int((before[name] == 0).sum())}


# ---- Dense, pruned at once, trained on: a whole run with a language model ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("finished")
    path = write_language_recipe(
        folder,
        material,
        dense={"max_steps": 6},
        distillation={"weight": 1.0},
        generation={"prompts": ["w1 w2"], "max_new_tokens": 2},
    )
    before = tree(material)
    result, said = quiet_run(path)
    assert tree(material) == before
    return {"path": path, "out": folder / "out", "result": result, "said": said}


def test_the_dense_model_is_pruned_and_its_zeros_are_kept(finished):
    dense, pruned = weights_of(finished["out"] / "dense"), weights_of(finished["out"] / "model")
    changed = {name for name in dense if not torch.equal(dense[name], pruned[name])}
    assert {name for name in dense if "layers" in name and "norm" not in name} == zeros_in(dense, pruned)
    for name in zeros_in(dense, pruned):
        assert int((pruned[name] == 0).sum()) == pruned[name].numel() // 2
    assert {name for name in dense if name.endswith("norm.weight")} <= changed  # it was trained on
    assert [config.method for config in load_configs(finished["out"] / "model")] == ["alps"]


def test_each_model_of_the_run_is_measured(finished):
    result = finished["result"]
    written = json.loads((finished["out"] / "results.json").read_text(encoding="utf-8"))
    assert list(written)[1:5] == ["base", "dense", "at_once", "pruned"]
    assert [written[name] for name in ("base", "dense", "at_once", "pruned")] == [
        result.base,
        result.dense,
        result.at_once,
        result.pruned,
    ]
    loss = {name: written[name]["loss"] for name in ("base", "dense", "at_once", "pruned")}
    assert loss["dense"] < loss["base"]
    assert len(set(loss.values())) == 4
    assert set(written["seconds"]) == {"dense", "pruning", "pruned"}
    said = "\n".join(finished["said"])
    for title, metrics in (
        ("Model without training", result.base),
        ("Dense model", result.dense),
        ("Pruned model before it is trained on,", result.at_once),
        ("Pruned model", result.pruned),
    ):
        assert f"{title} on the test split: perplexity {metrics['perplexity']:.4f}" in said


def test_the_measures_are_those_of_the_models(finished, material):
    recipe = load_recipe(finished["path"])
    prepared = prepare(recipe)
    for folder, metrics in ((material / "causal", "base"), (finished["out"] / "model", "pruned")):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        blocks = torch.tensor(prepared.data["test"]["input_ids"])
        with torch.no_grad():
            loss = float(model(input_ids=blocks, labels=blocks).loss)
        assert getattr(finished["result"], metrics)["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_record_says_what_was_done(finished):
    record = load_record(finished["out"] / "model")
    assert (record.dense_steps, record.steps, record.target_sparsity) == (6, 4, 0.5)
    calibration = record.calibration
    assert (calibration.samples, calibration.length, calibration.tokens, calibration.damping) == (6, 12, 72, 0.3)
    assert calibration.dataset.rows == "the other rows of train"
    assert [config["method"] for config in record.pruning] == ["alps"]
    assert record.distillation.teacher.name == "the dense run of the recipe"
    [evaluation] = record.evaluations
    assert evaluation.base_metrics == finished["result"].base
    assert evaluation.at_once_metrics == finished["result"].at_once


def test_the_card_says_what_was_done(finished):
    card = (finished["out"] / "model" / "README.md").read_text(encoding="utf-8")
    assert "`causal`, pruned with hf-prune from calibration data, then distilled:" in card
    assert "| metric | without training | dense | pruned at once | pruned | difference | recovery |" in card
    assert "Without training: `causal`. Dense: after 6 optimizer steps on the training data." in card
    assert "Pruned at once: before any training of the pruned model. Pruned: after 4 more steps." in card
    assert "- First trained dense for 6 optimizer steps of" in card
    assert (
        "- Pruned at once from 6 windows of 12 tokens of `texts.csv`, the other rows of train, 72 tokens; seed 0."
        in card
    )
    assert "- Then trained, with its zeros kept, for 4 optimizer steps" in card
    assert "alps" in card.split("## Citation")[1]
    assert "zhu2017prune" not in card  # there is no schedule


def test_the_results_are_printed_side_by_side(finished, capsys, monkeypatch):
    monkeypatch.setattr("hf_prune.cli.tables.console.width", 100)
    print_result(finished["result"])
    printed = words(capsys.readouterr().out)
    result = finished["result"]
    assert "without training dense pruned at once pruned recovery" in printed
    metrics = (result.base, result.dense, result.at_once, result.pruned)
    assert f"loss {' '.join(format(one['loss'], '.4f') for one in metrics)}" in printed
    assert printed.count("perplexity") == 1
    assert "seconds of pruning at once" in printed


def test_a_recipe_is_planned_and_prunes_what_was_planned(finished):
    plan = prepare(load_recipe(finished["path"])).plan_at_once()
    assert {tensor.name for tensor in plan.tensors} == {
        name for name in weights_of(finished["out"] / "dense") if "layers" in name and "norm" not in name
    }
    assert plan.final_sparsity == 0.5
    assert plan.calibration.samples == 6


def test_the_recipe_in_the_card_gives_the_same_masks(finished, tmp_path, material):
    content = load_record(finished["out"] / "model").recipe
    assert content["calibration"] == {"samples": 6, "length": 12, "batch_size": 2}
    again = write_language_recipe(
        tmp_path,
        material,
        dense={"max_steps": 6},
        distillation={"weight": 1.0},
        generation={"prompts": ["w1 w2"], "max_new_tokens": 2},
    )
    quiet_run(again)
    first, second = weights_of(finished["out"] / "model"), weights_of(tmp_path / "out" / "model")
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- Other tasks, and runs without a dense one or without training ----


def test_a_classifier_is_pruned_at_once_and_not_trained_on(material, tmp_path):
    path = write_recipe(
        tmp_path,
        material,
        dense={"max_steps": 30},
        training__max_steps=0,
        calibration=CALIBRATION,
        pruning={"method": "sparsegpt", "pattern": "2:4"},
    )
    result, said = quiet_run(path)
    assert "Evaluating the pruned model" in said
    assert (result.base, result.at_once) == (None, None)  # its head is new, and nothing came after pruning
    record = load_record(tmp_path / "out" / "model")
    assert (record.steps, record.dense_steps, record.calibration.length) == (None, 30, None)
    assert record.evaluations[0].dense_metrics == result.dense
    dense, pruned = weights_of(tmp_path / "out" / "dense"), weights_of(tmp_path / "out" / "model")
    for name in zeros_in(dense, pruned):
        assert bool(((pruned[name].view(-1, 4) != 0).sum(1) == 2).all())
    unpruned = {name for name in dense if torch.equal(dense[name], pruned[name])}
    assert unpruned == dense.keys() - zeros_in(dense, pruned)
    assert result.report.prunable_sparsity == 0.5
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "pruned with hf-prune from calibration data:" in card
    assert (
        "- First trained dense for 30 optimizer steps of 52 samples of `reviews.csv`, the other rows of train." in card
    )
    assert "Then trained" not in card


def test_an_encoder_decoder_is_pruned_from_its_documents_and_summaries(material, tmp_path):
    path = write_recipe(
        tmp_path,
        material,
        task="summarization",
        metrics=["rouge"],
        model__name=str(material / "seq2seq"),
        dataset__name=str(material / "texts.csv"),
        dataset__summary_column="summary",
        dataset__max_summary_length=6,
        generation={"samples": 1, "max_new_tokens": 3},
        calibration={"samples": 8, "batch_size": 4},
        pruning={"method": "sparsegpt", "sparsity": 0.5},
        training__max_steps=2,
    )
    result, _ = quiet_run(path)
    assert result.report.prunable_sparsity == 0.5
    prepared = prepare(load_recipe(path))
    rows = prepared.data["train"]
    record = load_record(tmp_path / "out" / "model")
    lengths = [max(len(row["input_ids"]), len(row["labels"])) for row in rows]
    assert 8 < record.calibration.tokens <= 8 * max(lengths)
    assert (result.dense, record.evaluations[0].dense_metrics) == (None, None)
    assert result.base is not None
    assert result.base.keys() == result.at_once.keys() == result.pruned.keys()


def test_without_a_dense_run_the_model_learns_from_what_it_was(material, tmp_path):
    path = write_language_recipe(tmp_path, material, distillation={"weight": 1.0}, training__learning_rate=1e-9)
    result, _ = quiet_run(path)
    record = load_record(tmp_path / "out" / "model")
    assert record.distillation.teacher.name == "the model before it was pruned"
    assert result.dense is None
    assert result.base["loss"] != result.at_once["loss"] == pytest.approx(result.pruned["loss"], abs=1e-5)
    # The teacher is the whole model: what it says differs from what the pruned one says by what pruning has cost.
    [first, *_] = [entry for entry in record.history if "distillation_loss" in entry]
    assert first["distillation_loss"] > 1e-4
    assert not (tmp_path / "out" / "dense").exists()


def test_without_training_the_dense_model_is_the_one_that_was_loaded(material, tmp_path):
    path = write_language_recipe(
        tmp_path, material, training__max_steps=0, pruning={"method": "wanda", "sparsity": 0.5}
    )
    result, _ = quiet_run(path)
    record = load_record(tmp_path / "out" / "model")
    assert result.base is None
    assert result.dense["loss"] != result.pruned["loss"]
    assert record.evaluations[0].dense_metrics == result.dense
    assert (record.calibration.dense_weight, record.calibration.damping) == (0.0, None)  # wanda changes no weight
    first, second = weights_of(material / "causal"), weights_of(tmp_path / "out" / "model")
    assert all(torch.equal(first[name] * (second[name] != 0), second[name]) for name in first)
    print_result(result)


def test_a_method_that_reads_the_weights_alone_says_so(material, tmp_path):
    path = write_language_recipe(
        tmp_path,
        material,
        training__num_train_epochs=0,
        training__max_steps=-1,
        pruning={"sparsity": 0.5, "scope": "global"},
    )
    quiet_run(path)
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "- Pruned at once, from the weights alone." in card
    assert "pruned with hf-prune at once:" in card


def test_progress_is_shown_while_layers_are_pruned(material, tmp_path):
    seen = []

    class Layers:
        def __enter__(self):
            return lambda done, total, layer: seen.append((done, total, layer.name))

        def __exit__(self, *problem):
            seen.append("end")

    run(load_recipe(write_language_recipe(tmp_path, material)), say=lambda line: None, show_layers=Layers)
    assert [one[:2] for one in seen[:-1]] == [(number, 14) for number in range(1, 15)]
    assert seen[-1] == "end"


# ---- As sparse as a target quality allows ----


def test_the_highest_sparsity_that_keeps_a_share_of_perplexity_is_found(material, tmp_path):
    path = write_language_recipe(
        tmp_path,
        material,
        dense=None,
        training__max_steps=0,
        pruning={"method": "magnitude", "sparsity": 0.9},
        calibration={"samples": 6, "length": 12, "target_quality": 0.97},
    )
    prepared = prepare(load_recipe(path))
    assert prepared.plan_at_once().target_quality == 0.97
    result, said = quiet_run(path)
    assert "Pruning at most 90.0% of 3,840 prunable weights at once" in said
    tried = [line.replace(":", "").split() for line in said if line.startswith("Sparsity ")]
    kept = {float(words[1]): float(words[-1]) >= 0.97 for words in tried}
    found = load_configs(tmp_path / "out" / "model")[0].sparsity
    assert kept[found]
    assert not any(holds for sparsity, holds in kept.items() if sparsity > found)
    assert not kept[round(found + 0.01, 2)]
    assert result.report.prunable_sparsity == pytest.approx(found, abs=0.001)
    record = load_record(tmp_path / "out" / "model")
    assert (record.pruning[0]["sparsity"], record.target_sparsity) == (found, pytest.approx(found, abs=0.001))
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "0.97 of the dense model's quality is kept; tried" in card


def test_accuracy_is_a_quality_that_rises(material, tmp_path):
    path = write_recipe(
        tmp_path,
        material,
        dense={"max_steps": 30},
        training__max_steps=0,
        calibration=CALIBRATION | {"target_quality": 0.5},
        pruning={"method": "wanda", "sparsity": 0.6},
    )
    result, said = quiet_run(path)
    assert any(line.startswith("Sparsity 0.6: accuracy") for line in said)
    assert result.report.prunable_sparsity == pytest.approx(0.6, abs=0.001)  # the first that was tried keeps half of it


def test_no_sparsity_that_keeps_enough_is_an_error(material, tmp_path):
    path = write_language_recipe(
        tmp_path,
        material,
        dense=None,
        training__max_steps=0,
        pruning={"method": "random", "sparsity": 0.04},
        calibration={"samples": 6, "length": 12, "target_quality": 0.9999999},
    )
    with pytest.raises(RecipeError, match=r"calibration\.target_quality: expected a sparsity at which the model keeps"):
        run(load_recipe(path), say=lambda line: None)


# ---- What is refused, before anything is written ----


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": {"samplse": 3}}, "calibration.samplse: unknown key; did you mean 'samples'?"),
        ({"calibration": {"samples": 0}}, "calibration.samples: expected 1 or more, got 0"),
        ({"calibration": {"samples": 900, "length": 9}}, "calibration.samples: expected 8,100 tokens of text"),
        ({"calibration": {"samples": 6, "length": 33}}, "calibration.length: expected at most the 32 positions"),
        ({"calibration": None}, "calibration: has no value; set {} for the defaults, or remove the line to prune"),
        ({"pruning": [{"sparsity": 0.5}]}, "pruning: expected one configuration, as the model is pruned at once"),
        ({"pruning": {"method": "movement", "sparsity": 0.5}}, "pruning.method: expected one of"),
        ({"pruning": {"structure": "neurons", "sparsity": 0.5}}, "pruning.structure: expected None, as units"),
        ({"pruning": {"sparsity": 0.5, "targets": ["x"], "method": "alps"}}, "pruning.targets: 'x' matches no"),
        ({"training__max_steps": 0, "dense": {}}, "dense: expected null, or max_steps or num_train_epochs of its own"),
        ({"training__max_steps": 0, "distillation": {}}, "distillation: must not be set, as nothing is trained"),
        ({"dense": {"max_steps": 0}}, "dense.max_steps: expected 1 or more"),
        ({"calibration": {"target_quality": 1}}, "calibration.target_quality: expected 0 < target_quality < 1, got 1"),
        (
            {"calibration": {"target_quality": 0.9}, "pruning": {"method": "alps", "pattern": "2:4"}},
            "pruning.sparsity: expected a pattern that leaves a choice of sparsities",
        ),
    ],
    ids=str,
)
def test_what_cannot_be_pruned_at_once_is_refused(material, tmp_path, changes, message):
    path = write_language_recipe(tmp_path, material, **changes)
    with pytest.raises(RecipeError) as refused:
        run(load_recipe(path), say=lambda line: None)
    assert message in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_length_is_refused_for_samples_of_training(material, tmp_path):
    path = write_recipe(tmp_path, material, calibration={"length": 16})
    with pytest.raises(RecipeError, match=r"calibration\.length: must not be set for text-classification"):
        load_recipe(path)


def test_training_without_steps_is_refused_without_a_calibration(material, tmp_path):
    path = write_recipe(tmp_path, material, training__max_steps=0)
    with pytest.raises(RecipeError, match=r"training\.max_steps: expected 1 or more"):
        load_recipe(path)


def test_several_processes_are_refused(material, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_prune.recipe.prepare.launched_processes", lambda: 2)
    path = write_language_recipe(tmp_path, material)
    with pytest.raises(RecipeError, match="calibration: expected one process without FSDP and DeepSpeed"):
        run(load_recipe(path), say=lambda line: None)
    assert not (tmp_path / "out").exists()


def test_samples_of_training_are_too_few(material, tmp_path):
    path = write_recipe(tmp_path, material, calibration={})
    with pytest.raises(RecipeError, match=r"calibration\.samples: expected 128 samples or more, found 52"):
        run(load_recipe(path), say=lambda line: None)


def test_values_that_are_shared_at_once_are_shared_after_training(material, tmp_path):
    pruning = {"method": "sparsegpt", "sparsity": 0.5, "shared_values": 4}
    path = write_language_recipe(tmp_path, material, pruning=pruning, dense=None)
    result, _ = quiet_run(path)
    assert {tensor.distinct_values for tensor in result.report.prunable} == {4}
    assert result.report.prunable_sparsity == 0.5
