"""`explain` as a whole, on tiny models: complete, deterministic, and refused where it cannot be done."""

import json

import numpy as np
import pytest
import torch
from models import bert, llama, t5
from shrunk import save_shrunk
from text_models import texts, tokenizer
from transformers import set_seed

from hf_prune import Pruner, PruningConfig
from hf_prune.errors import ExplainError
from hf_prune.explain.complexity import energy_of
from hf_prune.explain.explain import explain
from hf_prune.explain.page import make_page
from hf_prune.explain.perturbations import PERTURBATIONS, perturbed
from hf_prune.explain.samples import Samples
from hf_prune.explain.settings import Known, Settings, check_model
from hf_prune.explain.writing import write_explanation
from hf_prune.publish.explanation import load_explanation
from hf_prune.publish.record import Source
from hf_prune.recipe.explaining import make_reader
from hf_prune.saved.model import SavedModel

KNOWN = Known(model="pruned", dense_model="dense", data=Source(name="words"), command="hf-prune explain pruned")
SETTINGS = Settings(resamples=100, costs=False, show_texts=True)


def answering(build, **changes):
    """A model whose answers differ from text to text."""
    set_seed(1)
    model = build(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) / 2)
    return model


def samples(count=60, seed=0):
    labels = np.random.default_rng(seed).integers(0, 2, count)
    kinds = ["ab"[index % 2] for index in range(count)]
    return Samples(texts=texts(count, seed), labels=labels, columns={"kind": kinds})


def pruned_from(build, **changes):
    model = answering(build, **changes)
    pruner = Pruner(model, PruningConfig(sparsity=0.7, begin=0, end=1, frequency=1), total_steps=2)
    pruner.step()
    return model


def reader(model):
    return make_reader(model, tokenizer(), 16)


@pytest.fixture(scope="module")
def classified():
    pruned, dense = pruned_from(bert).train(), answering(bert)
    found = [
        explain(reader(pruned), samples(), KNOWN, dense=reader(dense), training=samples(40, 1), settings=SETTINGS)
        for _ in range(2)
    ]
    assert pruned.training
    return found


def test_a_classifier_is_explained_the_same_every_time(classified, tmp_path):
    first, again = classified
    assert first == again
    path, *page = write_explanation(tmp_path, first)
    assert {one.name for one in page} >= {"index.html", "explanation.md"}
    assert json.loads(path.read_text())["samples"] == 60
    assert load_explanation(tmp_path) == first


def test_an_explanation_of_a_classifier_is_complete(classified):
    found = classified[0]
    answers = found.answers
    flips = answers.to_wrong.value + answers.to_right.value + answers.other.value
    assert answers.agreement.value == pytest.approx(1 - flips)
    assert len(answers.flipped) == round(60 * flips) > 0
    assert found.metrics[0].difference.value == pytest.approx(answers.to_right.value - answers.to_wrong.value)
    assert {one.by for one in found.slices} == {"length", "kind", "rarity", "label"}
    labels = [one for one in found.slices if one.by == "label"]
    assert sum(one.metric.samples for one in labels) == 60
    recalls = {one.name: one.pruned.value for one in answers.classes}
    assert {one.value: one.metric.pruned.value for one in labels} == recalls
    assert [one.model for one in found.gaps] == ["dense", "pruned"]
    assert found.gaps[1].test.value == found.metrics[0].pruned.value
    assert [one.name for one in found.perturbations] == [one.name for one in PERTURBATIONS]
    assert sum(one.zeros for one in found.matrices) / sum(one.weights for one in found.matrices) == pytest.approx(
        0.7, abs=1e-3
    )
    assert found.complexity.parameters - found.complexity.nonzero >= sum(one.zeros for one in found.matrices)
    assert [one.layer for one in found.drift] == [0, 1]
    assert found.tokens_counted_in == "the training texts"
    assert b"How rare tokens are was counted in the training texts." in make_page(found)


def test_a_model_with_units_cut_out_is_explained(tmp_path):
    save_shrunk(tmp_path, model=answering(bert, num_hidden_layers=4))
    saved = SavedModel(tmp_path)
    pruned = type(saved.skeleton).from_pretrained(tmp_path)
    known = Known(model="p", data=Source(name="words"), command="c", removed=saved.removed)
    dense = answering(bert, num_hidden_layers=4)
    found = explain(reader(pruned), samples(), known, dense=reader(dense), settings=SETTINGS)
    assert found.removed_words == "75% of the neurons of each layer and 2 of 4 layers"
    assert [one.moved is None for one in found.drift].count(True) == 2
    left = [one.layer for one in found.drift if one.moved is not None]
    assert left == list(found.layers_left[0].kept)
    assert {one.layer for one in found.matrices} == {one.layer for one in found.units} == set(left)
    assert {one.units for one in found.units if one.structure == "neurons"} == {6}


@pytest.mark.parametrize("width", [16, 8])
def test_a_language_model_is_explained(width):
    pruned = pruned_from(llama, hidden_size=width)
    few = Samples(texts=texts(30), columns={"kind": ["ab"[index % 2] for index in range(30)]})
    seen = Samples(texts=texts(20, 1))
    found = explain(reader(pruned), few, KNOWN, dense=reader(answering(llama)), training=seen, settings=SETTINGS)
    assert found.metric == "loss"
    assert {one.by for one in found.slices} == {"kind", "length", "position", "token frequency"}
    assert found.answers.divergence.value > 0
    assert found.perturbations == ()
    assert {one.by for one in found.drift} == {"distance" if width == 16 else "cka"}
    assert found.gaps[1].test.value == found.metrics[0].pruned.value


def test_without_a_dense_model_only_what_is_known_is_said():
    found = explain(reader(pruned_from(bert)), samples(), KNOWN, settings=SETTINGS)
    assert found.dense_model is None
    assert found.answers.agreement is None
    assert {one.is_worse for one in found.slices} == {None}
    values = [one.metric.pruned.value for one in found.slices]
    assert values == sorted(values)
    assert found.tokens_counted_in.endswith("as no training data were given")


def test_other_models_and_samples_are_refused():
    with pytest.raises(ExplainError, match=r"text-classification or text-generation .* got T5ForConditional"):
        check_model(t5())
    with pytest.raises(ExplainError, match="one label for each text"):
        check_model(bert(num_labels=1))
    with pytest.raises(ExplainError, match="dense: expected the labels"):
        explain(reader(bert()), samples(), KNOWN, dense=reader(bert(num_labels=3)), settings=SETTINGS)
    with pytest.raises(ExplainError, match="dense: expected a model like Bert"):
        explain(reader(bert()), samples(), KNOWN, dense=reader(llama()), settings=SETTINGS)
    with pytest.raises(ExplainError, match="data: expected 10 samples or more, got 9"):
        explain(reader(bert()), samples(9), KNOWN, settings=SETTINGS)


def test_perturbations_do_what_they_say():
    text = "Nothing in this picture was remarkable but it ended"
    changed = {one.name: perturbed([text] * 50, one, seed=0) for one in PERTURBATIONS}
    assert changed == {one.name: perturbed([text] * 50, one, seed=0) for one in PERTURBATIONS}
    assert set(changed["upper case"]) == {text.upper()}
    for one in changed["typos"]:
        assert [sorted(word) for word in one.split()] == [sorted(word) for word in text.split()]
    typos = sum(a != b for one in changed["typos"] for a, b in zip(one.split(), text.split(), strict=True))
    assert typos / (50 * 6) == pytest.approx(0.2, abs=0.07)
    left = sum(len(one.split()) for one in changed["dropped words"]) / (50 * 9)
    assert left == pytest.approx(0.9, abs=0.05)
    assert perturbed(["a"] * 50, PERTURBATIONS[3], 0) == ["a"] * 50


def test_costs_and_energy_are_measured_on_both(monkeypatch):
    monkeypatch.setattr("hf_prune.explain.complexity._SECONDS", 0.3)
    pruned, dense = reader(pruned_from(bert, num_hidden_layers=1)), reader(answering(bert))
    found = explain(pruned, samples(12), KNOWN, dense=dense, settings=Settings(resamples=100, perturbations=False))
    one, many = found.complexity.costs
    assert (one.samples, many.samples) == (1, 12)
    assert many.dense.flops > many.model.flops > 0
    energy = found.complexity.energy
    assert energy.pruned > 0
    assert energy.dense > 0
    assert energy.method.startswith("codecarbon ")


def test_energy_is_left_out_without_codecarbon(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert energy_of(reader(bert()), None, [], [], 1) == (None, "Energy was not measured: codecarbon is not installed.")
